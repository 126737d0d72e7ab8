"""Figures of one machine that the arithmetic and the simulation of many machines start from, read from its records."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.index.contenders import DEFAULT, ON_DISK
from benchmarks.suite.results import RESULTS

DEVICE = "cpu-emerald-rapids-2-threads"
"""The machine whose records are read."""
KEPT = 100
"""Candidates of the interaction in the figure for it."""
_STAGES_AT = 100_000
_QUERY = f"tokenise and query pass{DEFAULT}"
_PREFILTERED = f"{ON_DISK} prefilter{DEFAULT}"


class Figures(NamedTuple):
    """Seconds of the stages of one query on one machine, with its index on disk and the system's cache warm."""

    query: float
    """Tokenising and encoding the query."""
    interaction: float
    """Scoring `KEPT` candidates in full."""
    dual_per_document: float
    """The dual score of one more document; from the largest index that was measured."""
    prefiltered: dict[int, float]
    """Documents -> a whole query with the default prefilter, as measured."""
    largest: int
    """Documents of the largest index that was measured."""
    catalogue_per_document: float
    """Bytes of ids and checksums in that index."""
    opening: float
    """Opening that index."""
    threads: int
    """Threads of the machine."""
    commits: tuple[str, ...]
    """Commits of the records."""

    def seconds(self, documents: int) -> float:
        """A query over an index with so many documents, by the stages; measured only where `prefiltered` has it."""
        return self.query + documents * self.dual_per_document + self.interaction


def read_figures(folder: Path = RESULTS / DEVICE) -> Figures:
    """Read the figures of a machine from its records ``index_speed`` and ``index_million``.

    Raises:
        OSError: a record is missing.
        KeyError: a record lacks a figure.
    """
    speed, million = (_record(folder / f"index_{name}.json") for name in ("speed", "million"))
    seconds = {record["N"]: record["seconds"] for record in speed["records"]}
    query = seconds[_STAGES_AT][_QUERY]
    interaction = seconds[KEPT][_PREFILTERED] - seconds[KEPT][_QUERY]
    largest, whole = million["documents"], million["seconds"]["rank with prefilter"]
    return Figures(
        query,
        interaction,
        (whole - query - interaction) / largest,
        {N: found[_PREFILTERED] for N, found in seconds.items() if N > KEPT} | {largest: whole},
        largest,
        million["catalogue_bytes"] / largest,
        million["seconds"]["open"],
        million["provenance"]["threads"],
        tuple(record["provenance"]["commit"] for record in (speed, million)),
    )


def encoding_rate(folder: Path = RESULTS / DEVICE) -> float | None:
    """Texts that a plain build encodes and writes in a second, from the record ``ray_build``; None without it."""
    path = folder / "ray_build.json"
    if not path.exists():
        return None
    found = _record(path)["stages"]["plain"]
    return found["documents"] / found["seconds"]


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
