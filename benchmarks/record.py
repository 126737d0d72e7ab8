"""Record all results again: ``python -m benchmarks.record --device cpu-zen3-2-threads``, on a quiet machine.

Runs the suite, one process per group, and the measurements outside the suite, and writes benchmarks/results/DEVICE/;
without ``--device`` the folder is named after this kind of machine. Two measurements need data: without
``--beir-folder`` and ``--backbone`` their files stay unchanged, and the summary says so. Figures that stay noisy are
listed, not recorded. ``python -m benchmarks.report`` then renders all documents.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.machine import kind_name, machine_facts
from benchmarks.measuring.provenance import ROOT
from benchmarks.suite.results import GROUPS, kind_mismatch, refused, split, write_results

MEASUREMENTS = ("gate", "index_speed", "index_million", "index_precision", "comparison_latency")
"""Measurements outside the suite, by the name of their file."""
NEEDED = {"index_precision": "--beir-folder", "comparison_latency": "--backbone"}


def suite_command(group: str, *, long: bool) -> list[str]:
    """Arguments of pytest that run a group of the suite."""
    selection = ["-m", "long or not long"] if long else []
    return ["pytest", f"benchmarks/bench_suite.py::bench_{group}", "--benchmark-only", "-q", *selection]


def measurement_command(name: str, options: argparse.Namespace) -> list[str] | None:
    """Arguments of python for a measurement outside the suite; None if its data are not given."""
    device = ["--device", options.device]
    if name == "gate":
        return ["-m", "benchmarks.compare", "--quick", "--record", options.device]
    if name in ("index_speed", "index_million"):
        return ["-m", f"benchmarks.{name.replace('_', '.')}", *device]
    if name == "index_precision":
        return options.beir_folder and ["-m", "benchmarks.index.precision", str(options.beir_folder), *device]
    return options.backbone and ["-m", "benchmarks.comparison.latency", "--backbone", str(options.backbone), *device]


def record_group(group: str, device: str, *, long: bool) -> str | None:
    """Run a group of the suite and write its file; return what went wrong, or None.

    Cases that stayed noisy are left out of the file and listed; the others are written.
    """
    arguments = suite_command(group, long=long)
    shown = " ".join(f'"{part}"' if " " in part else part for part in arguments)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", *arguments, f"--benchmark-json={written}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status != 0:
            return f"pytest ended with {status}"
        document = json.loads(written.read_text(encoding="utf-8"))
    found = split(document, f"python -m benchmarks.record --device {device} --only {group} ({shown})").get(group)
    if found is None:
        return "nothing was measured"
    noisy = refused(found)
    if found.records:
        write_results(device, group, found)
    return "\n  ".join([f"{len(found.records)} records; without:", *noisy]) if noisy else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 if a measurement failed (its file stays unchanged) or a case was too noisy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--device", help="name of the folder of results (default: named after this kind of machine)")
    parser.add_argument(
        "--only", action="append", choices=[*GROUPS, *MEASUREMENTS], help="a group or measurement; may be repeated"
    )
    parser.add_argument("--no-long", action="store_true", help="leave out cases that take minutes or a compiler")
    parser.add_argument("--beir-folder", type=Path, help="SciFact, for index_precision")
    parser.add_argument("--backbone", type=Path, help="an encoder, for comparison_latency")
    options = parser.parse_args(arguments)
    machine = machine_facts()
    options.device = options.device or kind_name(machine)
    if reason := kind_mismatch(options.device, machine):
        parser.error(reason)
    wanted, notes, failed = options.only or [*GROUPS, *MEASUREMENTS], [], False
    for name in wanted:
        start = time.monotonic()
        if name in GROUPS:
            problem = record_group(name, options.device, long=not options.no_long)
        elif command := measurement_command(name, options):
            status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
            problem = None if status == 0 else f"{' '.join(command)} ended with {status}"
        else:
            notes.append(f"{name}: left as it was; it needs {NEEDED[name]}")
            continue
        failed |= problem is not None
        notes.append(f"{name}: {problem or 'recorded'} ({time.monotonic() - start:.0f} s)")
    print("\n".join(notes))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
