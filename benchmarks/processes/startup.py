"""Start of the command line: ``python -m benchmarks.processes.startup --device cpu-zen3-2-threads``.

Times whole processes, in turns, medians: ``mixencoder rank`` over twenty candidates with the bundled model, against
``import torch, transformers``, which every program on these libraries needs, and against the import of the backbone's
model class from transformers. Writes benchmarks/results/DEVICE/startup.json.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from benchmarks.measuring.provenance import ROOT, commit, versions, write_json

RANK = "mixencoder rank, 20 candidates"
LIBRARIES = "import torch, transformers"
MODEL = "import of transformers' BertModel"
CANDIDATES = ROOT / "docs" / "examples" / "candidates.txt"
COMMANDS = {
    RANK: ["-m", "mixencoder", "rank", "How do I undo my last git commit?", "--candidates", str(CANDIDATES)],
    LIBRARIES: ["-c", "import torch, transformers"],
    MODEL: ["-c", "import torch; from transformers import BertModel"],
}


def seconds_of(arguments: list[str]) -> float:
    """Seconds of a Python process from its start to its end, imports from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def run(rounds: int) -> dict[str, Any]:
    """Medians of `rounds`, after one round that fills the system's file cache."""
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = seconds_of(arguments)
            if turn:
                samples[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratios = {f"{RANK} / {name}": medians[RANK] / medians[name] for name in (LIBRARIES, MODEL)}
    return {"seconds": medians, "samples": samples, "ratios": ratios}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    found = run(options.rounds)
    for name, value in {**found["seconds"], **found["ratios"]}.items():
        print(f"{name:60} {value:.3g}")
    document = {
        "provenance": {
            "command": " ".join(["python -m benchmarks.processes.startup", *arguments]),
            "started": started,
            "commit": commit(),
            "versions": {**versions(), "transformers": metadata.version("transformers")},
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "timing": "whole processes in turns, medians; the first round, which reads from the disk, is left out",
        },
        **found,
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "startup.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
