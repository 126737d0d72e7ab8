"""The exported bundled model beside the library: ``python -m benchmarks.processes.onnx PART --device NAME ...``.

``export`` writes the graphs, in float32 and int8, into --exported. ``quality`` compares their nDCG@10 with the model's
on candidate lists (--data). ``seconds`` times whole processes that rank twenty candidates, in turns, and their peak
memory: docs/examples/onnx_rank.py in a Python without PyTorch (--python), and this library. The last two write into
benchmarks/results/DEVICE/onnx.json.
"""

import argparse
import gzip
import json
import os
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.provenance import ROOT, commit, versions, write_json

EXAMPLES = ROOT / "docs" / "examples"
KINDS = ("float32", "int8")
QUERY = "How do I undo my last git commit?"
LIBRARY = f"""
from pathlib import Path
from mixencoder import MixEncoder
texts = Path({str(EXAMPLES / "candidates.txt")!r}).read_text(encoding="utf-8").splitlines()
print(MixEncoder.from_pretrained(device="cpu").rank({QUERY!r}, texts, top_k=5))
"""


def ndcg(scores: np.ndarray, labels: Iterable[int]) -> float:
    """nDCG@10 of one list; ties count against the model."""
    gains = 2.0 ** np.array(list(labels)) - 1
    discounts = 1 / np.log2(np.arange(2, 12))
    order = np.lexsort((gains, -scores))[:10]
    best = np.sort(gains)[::-1][:10]
    return float((gains[order] * discounts[: len(order)]).sum() / (best * discounts[: len(best)]).sum())


def lists(path: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    return [row for row in rows if any(row["labels"])]


def mean_ndcg(rows: list[dict[str, Any]], score: Callable[[str, list[str]], np.ndarray]) -> float:
    return statistics.fmean(ndcg(score(row["query"], row["candidates"]), row["labels"]) for row in rows)


def quality(exported: Path, data: list[Path]) -> dict[str, Any]:
    from mixencoder import MixEncoder

    model = MixEncoder.from_pretrained(device="cpu")
    ranker = runpy.run_path(str(EXAMPLES / "onnx_rank.py"))["OnnxRanker"]
    graphs = {kind: ranker(exported / kind) for kind in KINDS}
    found: dict[str, Any] = {}
    for path in data:
        rows = lists(path)
        scorers = {
            f"onnxruntime, {kind}": lambda q, t, g=graph: g.score(q, g.encode_document(t))
            for kind, graph in graphs.items()
        }
        scorers["mixencoder"] = lambda q, t: model.predict([(q, text) for text in t])
        figures = {name: mean_ndcg(rows, scorer) for name, scorer in scorers.items()}
        found[path.name.partition(".jsonl")[0]] = {"queries": len(rows), **figures}
        print(path.name, figures)
    return {"quality": found}


_LAUNCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss)
"""
"""Starts a process from a small one: Linux counts the memory of the process that started it as its own."""


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of a process from its start to its end, and its peak memory in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launched = [sys.executable, "-S", "-c", _LAUNCHER, *command]
    found = subprocess.run(launched, capture_output=True, text=True, env=environment, check=True).stdout.split()
    assert found[0] == "0", command
    return float(found[1]), float(found[2]) * 1024


def seconds(exported: Path, python: str, rounds: int) -> dict[str, Any]:
    example = [str(EXAMPLES / "onnx_rank.py")], [QUERY, str(EXAMPLES / "candidates.txt")]
    commands = {f"onnxruntime, {kind}": [python, *example[0], str(exported / kind), *example[1]] for kind in KINDS}
    commands["mixencoder"] = [sys.executable, "-c", LIBRARY]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            # the first round reads from the disk
            if (found := measured(command)) and turn:
                samples[name].append(found)
    medians = {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in samples.items()}
    sizes = {f"onnxruntime, {kind}": sum(path.stat().st_size for path in (exported / kind).iterdir()) for kind in KINDS}
    for name, values in medians.items():
        print(name, values)
    return {
        "seconds": {name: value for name, (value, _) in medians.items()},
        "peak bytes": {name: value for name, (_, value) in medians.items()},
        "bytes of files": sizes,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["export", "quality", "seconds"])
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--exported", type=Path, required=True, help="folder of the exported models")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files of candidate lists")
    parser.add_argument("--python", default=sys.executable, help="a Python without PyTorch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.part == "export":
        from mixencoder import MixEncoder
        from mixencoder.export import export_onnx

        for kind in KINDS:
            print(
                kind,
                export_onnx(MixEncoder.from_pretrained(device="cpu"), options.exported / kind, int8=kind == "int8"),
            )
        return
    part = (
        quality(options.exported, options.data)
        if options.part == "quality"
        else seconds(options.exported, options.python, options.rounds)
    )
    path = ROOT / "benchmarks" / "results" / options.device / "onnx.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    names = [Path(value).name if "/" in value else value for value in arguments]
    provenance = {
        "command": " ".join(["python -m benchmarks.processes.onnx", *names]),
        "commit": commit(),
        "versions": versions(),
        "cores": os.cpu_count(),
    }
    records = {**before.get("provenance", {}), options.part: provenance}
    write_json(path, {**before, **part, "provenance": records})


if __name__ == "__main__":
    main(sys.argv[1:])
