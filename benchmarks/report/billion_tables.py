"""Tables of a billion candidates: bytes, machines, hours and simulated latencies, from records of one machine."""

import json
import math

from benchmarks.measuring.markdown import markdown
from benchmarks.scale.figures import DEVICE, encoding_rate, read_figures
from benchmarks.scale.record import CANDIDATES
from benchmarks.suite.results import RESULTS

PRECISIONS_OF = "cpu-zen3-2-threads"
"""The machine whose record of stored precisions is read; bytes are the same on every machine."""
MEMORY = 256e9
"""Bytes of the machines that a table counts."""
_ENCODERS = (1, 100, 1000)
_SHARDS = (10_000, 100_000, 1_000_000, 10_000_000)


def scale_bytes_table() -> str:
    """Bytes a candidate and of a billion, by layout and precision."""
    found = json.loads((RESULTS / PRECISIONS_OF / "index_precision.json").read_text(encoding="utf-8"))
    sizes = {(record["layout"], record["precision"]): record["bytes_per_candidate"] for record in found["records"]}
    catalogue = read_figures().catalogue_per_document
    header = ["layout", "precision", "bytes a candidate", "with ids and checksums", "a billion", "machines of 256 GB"]
    rows = [header, ["---"] * len(header)]
    for (layout, precision), size in sorted(sizes.items(), key=lambda item: -item[1]):
        whole = (size + catalogue) * CANDIDATES
        machines = str(math.ceil(whole / MEMORY))
        rows.append([layout, precision, f"{size:,}", f"{size + catalogue:,.0f}", f"{whole / 1e12:.1f} TB", machines])
    return markdown(rows)


def scale_stages_table() -> str:
    """Time of a query by stage, by documents of a shard, and what a billion candidates need then."""
    figures = read_figures()
    header = [
        "documents of a shard",
        "query",
        "dual scores",
        "interaction",
        "sum",
        "measured",
        "machines for a billion",
        "machine-seconds a query",
    ]
    rows = [header, ["---"] * len(header)]
    for documents in _SHARDS:
        whole, machines = figures.seconds(documents), CANDIDATES // documents
        dual = documents * figures.dual_per_document
        measured = figures.prefiltered.get(documents)
        rows.append(
            [
                f"{documents:,}",
                _milliseconds(figures.query),
                _milliseconds(dual),
                _milliseconds(figures.interaction),
                _milliseconds(whole),
                "" if measured is None else _milliseconds(measured),
                f"{machines:,}",
                f"{whole + (machines - 1) * dual:,.0f}",
            ]
        )
    commits = " and ".join(commit[:7] for commit in figures.commits)
    return f"{markdown(rows)}\n\n{DEVICE}; records `index_speed` and `index_million`, commits {commits}"


def scale_encoding_table() -> str:
    """Hours to encode a billion texts, from the rate of a plain build."""
    rate = encoding_rate()
    if rate is None:
        return "Not recorded yet: the record `ray_build` is missing."
    seconds = CANDIDATES / rate
    rows = [["machines", "texts a second", "hours", "machine-hours"], ["---"] * 4]
    for machines in _ENCODERS:
        hours = seconds / machines / 3600
        rows.append([f"{machines:,}", f"{machines * rate:,.0f}", f"{hours:,.0f}", f"{seconds / 3600:,.0f}"])
    return f"{markdown(rows)}\n\n{DEVICE}; record `ray_build`"


def scale_simulation_table() -> str:
    """Simulated latencies of a billion candidates."""
    path = RESULTS / DEVICE / "scale_simulation.json"
    if not path.exists():
        return "Not recorded yet: `python -m benchmarks.scale.record` does it."
    found = json.loads(path.read_text(encoding="utf-8"))
    header = [
        "first step",
        "documents of a shard",
        "replicas",
        "machines",
        "queries a second",
        "spread",
        "failures",
        "deadline",
        *found["records"][0]["seconds"],
        "partial answers",
        "busy",
    ]
    rows = [header, ["---"] * len(header)]
    for record in found["records"]:
        cluster, deadline = record["cluster"], record["deadline"]
        rows.append(
            [
                "vector index" if record["vector_index"] else "dual scores",
                f"{record['documents']:,}",
                str(record["replicas"]),
                f"{cluster['shards'] * cluster['replicas']:,}",
                f"{record['rate']:g}",
                f"{record['spread']:g}",
                f"{record['failures_per_day']:g} a day" if record["failures_per_day"] else "none",
                "" if deadline is None else f"{deadline:g} s",
                *(_milliseconds(seconds) for seconds in record["seconds"].values()),
                f"{record['partial']:.2%}",
                f"{record['busy']:.0%}",
            ]
        )
    return f"{markdown(rows)}\n\n`{found['command']}`; commit {found['commit'][:7]}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"
