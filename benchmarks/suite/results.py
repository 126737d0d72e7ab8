"""Files of the suite's results: benchmarks/results/DEVICE/GROUP.json.

Written by `benchmarks.record`, read by `benchmarks.report` and `benchmarks.compare`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.machine import kind_differences
from benchmarks.measuring.peaks import products_of, with_peaks
from benchmarks.measuring.provenance import ROOT, write_json
from benchmarks.suite.case import RECORD_KEYS, Record
from mixkernels.roofline import Peaks

RESULTS = ROOT / "benchmarks" / "results"
GROUPS = ("operators", "layers", "end_to_end", "index")
GATE = "gate"
"""Name of the file that CI compares with: a few cases of all groups, on one thread."""


class Results(NamedTuple):
    """One group on one machine."""

    machine: dict[str, Any]
    peaks: dict[str, dict[str, float]]
    """Peak rates of the machine, measured in the same run, by kind of products."""
    records: list[Record]
    skipped: list[dict[str, Any]]
    provenance: dict[str, Any]


def case_name(record: Mapping[str, Any]) -> str:
    """Name of a record's case, as `benchmarks.suite.case.Case.name`."""
    sizes = " ".join(f"{name}={size}" for name, size in record["shape"].items())
    return " ".join(filter(None, [record["operator"], sizes, record["dtype"], record.get("variant", "")]))


def read_results(path: Path) -> Results:
    """Read a file of a group."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return Results(*(document[name] for name in Results._fields))


def machines(names: Sequence[str] = GROUPS) -> dict[str, dict[str, Any]]:
    """Facts of the machines that have one of the files `names`, by name of their folder."""
    found = {}
    for path in sorted(path for name in names for path in RESULTS.glob(f"*/{name}.json")):
        found.setdefault(path.parent.name, read_results(path).machine)
    return found


def kind_mismatch(device: str, machine: Mapping[str, Any], names: Sequence[str] = GROUPS) -> str | None:
    """Why a machine must not write files `names` into a device's folder, or None: they are of another kind."""
    there = machines(names).get(device)
    if there is None or not (differences := kind_differences(machine, there)):
        return None
    return f"{device} holds records of another kind of machine: {', '.join(differences)}; give another --device"


def committed_records(device: str, names: Sequence[str] = GROUPS) -> list[Record]:
    """All records of a device's files `names`."""
    paths = [RESULTS / device / f"{name}.json" for name in names]
    return [record for path in paths if path.is_file() for record in read_results(path).records]


def split(document: Mapping[str, Any], command: str) -> dict[str, Results]:
    """Split a document of pytest-benchmark into results by group, without its own statistics and options.

    Fractions of the limit use the best peaks of the whole run.

    Args:
        document: written by ``pytest --benchmark-json``.
        command: the command that made it.
    """
    info = document["machine_info"]
    provenance = {"command": command, "date": document["datetime"], "timing": "medians of interleaved rounds"}
    peaks = {name: Peaks(**numbers) for name, numbers in info["peaks"].items()}
    found = {}
    for group in GROUPS:
        records = [
            {key: one["extra_info"][key] for key in RECORD_KEYS}
            for one in document["benchmarks"]
            if one["extra_info"].get("group") == group
        ]
        records = [with_peaks(record, peaks[products_of(record)]) for record in records]
        skipped = [entry for entry in document["skipped"] if entry["group"] == group]
        if records or any("refused" in entry for entry in skipped):
            found[group] = Results(info["facts"], info["peaks"], records, skipped, provenance)
    return found


def refused(results: Results) -> list[str]:
    """Contenders that were measured and have no record, with the reasons."""
    return [
        f"{case_name(entry)}: {entry['backend']}: {entry['reason']}" for entry in results.skipped if "refused" in entry
    ]


def write_results(device: str, group: str, results: Results) -> Path:
    """Write a group's file, whole or not at all, and return its path."""
    path = RESULTS / device / f"{group}.json"
    write_json(path, results._asdict())
    return path
