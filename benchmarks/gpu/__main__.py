"""Check and time the kernels on a GPU: ``python -m benchmarks.gpu`` (docs/gpu.md).

Groups: the tests of the operators with compiled kernels; the host time of calls; candidate attention at the key shapes
against every rival; training steps; the rest of the layer; the grid of all shapes. Each group writes its own JSON file
after every shape. At the end the targets of design.md section 7 are printed. Needs a GPU; exits with 2 without one.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.attention import Bench, attention, grid, training
from benchmarks.gpu.layer import host, layer
from benchmarks.gpu.records import machine_at_hand, read_records, target_table, targets
from benchmarks.gpu.tuning import tuning
from benchmarks.measuring.gpu_timing import reason
from benchmarks.measuring.provenance import ROOT, slug, write_json

CORRECTNESS_TESTS = (
    "tests/kernels/test_candidate_attention.py",
    "tests/kernels/test_attention_gradients.py",
    "tests/kernels/test_torch_operators.py",
    "tests/kernels/test_layer_operators.py",
    "tests/kernels/test_layer_gradients.py",
    "tests/kernels/test_top_k.py",
    "tests/kernels/test_candidate_attention_operator.py",
)
GROUPS: dict[str, Callable[[Bench], object]] = {
    "host": host,
    "attention": attention,
    "training": training,
    "layer": layer,
    "grid": grid,
    "tuning": tuning,
}
DEFAULT_GROUPS = ("correctness", "host", "attention", "training", "layer", "grid")

_WORKERS = 12
_OPERATOR_SWITCHES = ("MIXKERNELS_BACKEND", "MIXKERNELS_CHECKS", "MIXKERNELS_DETERMINISTIC", "MIXKERNELS_TUNING")


# -- correctness -------------------------------------------------------------------------------------------------------


def correctness(folder: Path, seconds: float, tests: Sequence[str] = CORRECTNESS_TESTS) -> dict[str, Any]:
    """Run the operators' tests with compiled kernels; write counts and failures, and pytest's output to a log.

    Returns:
        What it wrote: "passed" is true if no test failed and some ran.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OPERATOR_SWITCHES}
    environment.pop("TRITON_INTERPRET", None)
    # several workers share the cores
    environment.setdefault("OMP_NUM_THREADS", "2")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        shown = " ".join(command[1:-1])
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
        begin = time.monotonic()
        with (folder / "correctness.log").open("w", encoding="utf-8") as log:
            try:
                status = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=None if seconds == float("inf") else max(seconds, 1.0),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        outcome = read_report(report) if report.exists() else {"tests": 0, "skipped": 0, "failures": []}
    outcome |= {
        "group": "correctness",
        "passed": status == 0 and outcome["tests"] > outcome["skipped"],
        "exit_status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "command": shown,
    }
    write_json(folder / "correctness.json", outcome)
    return outcome


def read_report(path: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit report."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (problem.get("message") or "")[:300]}
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    return {
        "tests": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failures": failures,
    }


def correctness_lines(outcome: dict[str, Any]) -> list[str]:
    """Lines that summarise a run of the tests."""
    if outcome["passed"]:
        return [f"correctness: {outcome['tests'] - outcome['skipped']} tests passed, {outcome['skipped']} skipped"]
    if outcome["exit_status"] is None:
        first = f"correctness: the tests did not end in time ({outcome['seconds']:.0f} s)"
    else:
        first = f"correctness: {len(outcome['failures'])} of {outcome['tests']} tests failed; see correctness.log"
    return [first, *(f"  {failure['test']}: {failure['message']}" for failure in outcome["failures"][:20])]


# -- command line ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where files go (default: benchmarks/results/NAME-OF-THE-GPU)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=["correctness", *GROUPS],
        help=f"a group; may be repeated (default: {', '.join(DEFAULT_GROUPS)})",
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes of every group, and no grid")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time limit: start nothing that may take longer"
    )
    parser.add_argument("--keep-going", action="store_true", help="time wrong kernels too")
    parser.add_argument("--commit", help="the commit, if the checkout has no repository")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="only print the targets of the files in DIR; needs no GPU"
    )
    return parser


def report(folder: Path, name: str) -> None:
    """Print the targets of a folder's files."""
    print(f"targets of docs/design.md section 7 for an H100, measured on {name}:")
    print("\n".join(target_table(targets(read_records(folder)))))
    print("end to end, over 1e6 candidates and against the cross-encoder: python -m benchmarks.gpu.ranking")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if tests or a group failed, 2 without a GPU that runs compiled kernels."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if options.report is not None:
        records = read_records(options.report)
        report(options.report, records[0]["device"] if records else "no GPU yet")
        return 0
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu needs a GPU: none is visible", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    name = torch.cuda.get_device_name()
    folder = options.output or ROOT / "benchmarks" / "results" / slug(name)
    groups = options.only or [group for group in DEFAULT_GROUPS if not (options.quick and group == "grid")]
    # before the tests, so that a GPU that cannot be measured ends the run at once
    machine = machine_at_hand(arguments, options.commit)
    torch.cuda.empty_cache()
    print(f"{name}, {json.dumps(machine.versions)}, commit {machine.commit}")
    print(f"measured: {machine.measured}", flush=True)
    failed = False
    if "correctness" in groups:
        outcome = correctness(folder, options.seconds)
        print("\n".join(correctness_lines(outcome)), flush=True)
        failed = not outcome["passed"]
        if failed and not options.keep_going:
            print("nothing was timed, because tests failed (--keep-going times kernels anyway)")
            return 1
    bench = Bench(machine, "triton", folder, deadline, quick=options.quick)
    for group in (group for group in GROUPS if group in groups):
        begin = time.monotonic()
        try:
            GROUPS[group](bench)
        except Exception as error:
            # what was measured is on disk; the other groups may still run
            print(f"{group}: stopped by {reason(error)}", flush=True)
            failed = True
        print(f"{group}: {time.monotonic() - begin:.0f} s", flush=True)
    report(folder, name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
