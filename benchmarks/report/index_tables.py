"""Tables of rankings out of an index: times of every machine that was measured, and what faster products cost."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.index.contenders import CROSS, CROSS_PAIRS, DEFAULT, NARROW, NARROW_ON_DISK, ON_DISK
from benchmarks.measuring.markdown import markdown, multiple
from benchmarks.suite.results import RESULTS

MACHINES = {
    "cpu-zen3-2-threads": "AMD Zen 3 (AVX2), two threads",
    "cpu-emerald-rapids-2-threads": "Intel Emerald Rapids (AVX-512, bfloat16, AMX), two threads",
}
"""Device -> what documents call it."""

_OURS = {
    "float32": ON_DISK,
    "float32, default prefilter": f"{ON_DISK} prefilter",
    "int8 products": f"{ON_DISK} int8 products",
    "bfloat16 products": f"{ON_DISK} bfloat16 products",
    "bfloat16 model": NARROW_ON_DISK,
    "bfloat16 model, default prefilter": f"{NARROW_ON_DISK} prefilter",
}
"""Way to rank -> the name of its time in a record, without the suffix of the bundled model's settings."""
_RIVALS = {
    "dual-encoder": "dual-encoder",
    "dual-encoder, bfloat16": f"dual-encoder{NARROW}",
    "late interaction": "late interaction",
    "the same model in plain PyTorch": "plain eager",
    "cross-encoder": CROSS,
    "cross-encoder, bfloat16": f"{CROSS}{NARROW}",
}
_COMPARED = 1000
"""N of the last two columns."""


def index_records() -> dict[str, list[dict[str, Any]]]:
    """Return {device: records of rankings out of an index} for every CPU that was measured, newest first."""
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in RESULTS.glob("cpu-*/index_speed.json")
    }
    newest = sorted(found, key=lambda device: found[device]["provenance"]["started"], reverse=True)
    return {device: found[device]["records"] for device in newest}


def index_table() -> str:
    """For every machine and way to rank the time from a query's text to its best ten, rivals below."""
    return "\n\n".join(
        f"{MACHINES.get(device, device)}:\n\n{_machine_table(records)}" for device, records in index_records().items()
    )


def index_limits_table() -> str:
    """For every machine whose peaks were measured in the same run: the share of its limit that each way reaches."""
    parts = []
    for device, records in index_records().items():
        if not all("limits" in record for record in records):
            continue
        header = ["", *(f"N = {record['N']:,}" for record in records)]
        rows = [header, ["---"] * len(header)]
        for name, part in {**_OURS, **_RIVALS}.items():
            cells = []
            for record in records:
                count = record["N"]
                cells.append(_share_of_limit(record["limits"], part, _time(record["seconds"], part, count), count))
            if any(cells):
                rows.append([f"**{name}**" if name in _OURS else name, *cells])
        parts.append(f"{MACHINES.get(device, device)}:\n\n{markdown(rows)}")
    return "\n\n".join(parts) or "Not recorded yet: `python -m benchmarks.index.speed` does it."


def _machine_table(records: Sequence[Mapping[str, Any]]) -> str:
    by_count = {record["N"]: record["seconds"] for record in records}
    by_limit = {record["N"]: record.get("limits", {}) for record in records}
    beside = by_count.get(_COMPARED)
    header = ["", *(f"N = {count:,}" for count in by_count)]
    if beside is not None:
        header += [f"cross-encoder, N = {_COMPARED:,}", f"of the limit, N = {_COMPARED:,}"]
    rows = [header, ["---"] * len(header)]
    for name, part in {**_OURS, **_RIVALS}.items():
        times = [_time(seconds, part, count) for count, seconds in by_count.items()]
        if not any(times):
            continue
        cells = [_milliseconds(time) for time in times]
        if beside is not None:
            own = _time(beside, part, _COMPARED)
            cross = _time(beside, CROSS, _COMPARED)
            cells.append("" if own is None or cross is None or part == CROSS else multiple(cross / own))
            cells.append(_share_of_limit(by_limit[_COMPARED], part, own, _COMPARED))
        rows.append([f"**{name}**" if name in _OURS else name, *cells])
    return markdown(rows)


def _time(seconds: Mapping[str, float], part: str, count: int) -> float | None:
    """Return a time, for MixEncoder with the bundled model's settings if they were measured; cross-encoders scaled."""
    found = seconds.get(f"{part}{DEFAULT}", seconds.get(part))
    return found * count / CROSS_PAIRS if found is not None and part.startswith(CROSS) else found


def _share_of_limit(limits: Mapping[str, float], part: str, own: float | None, count: int) -> str:
    """Return the least time as a share of the measured one; empty in a record without limits."""
    limit = _time(limits, part, count)
    if own is None or limit is None:
        return ""
    if limit > own:
        raise ValueError(f"{part} takes {own:.4f} s, less than its limit of {limit:.4f} s: measure it again")
    return f"{limit / own:.0%}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds * 1000:,.0f} ms"


def products_table() -> str:
    """What faster products cost in quality, on every machine that was measured."""
    paths = sorted(RESULTS.glob("cpu-*/index_products.json"))
    if not paths:
        return "Not recorded yet: `python -m benchmarks.index.products` does it."
    header = ["set", "products", "nDCG@10", "best ten found again"]
    parts = []
    for path in paths:
        rows = [header, ["---"] * len(header)]
        for record in json.loads(path.read_text(encoding="utf-8"))["records"]:
            name = record["set"].rsplit("/", 1)[-1].split(".jsonl")[0]
            figures = f"{record['ndcg_at_10']:.4f}", f"{record['overlap_at_10']:.1%}"
            rows.append([f"{name}, {record['queries']} queries", record["way"], *figures])
        parts.append(f"{MACHINES.get(path.parent.name, path.parent.name)}:\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def first_stage_table() -> str:
    """First stages beside the exact prefilter, on every machine that was measured."""
    paths = sorted(RESULTS.glob("cpu-*/index_first_stage.json"))
    if not paths:
        return "Not recorded yet: `python -m benchmarks.index.first_stage` does it."
    parts = []
    for path in paths:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        one = records[0]
        where = MACHINES.get(path.parent.name, path.parent.name)
        header = [
            f"{one['documents']:,} documents, {one['queries']} queries",
            f"recall at {one['fully_scored']}",
            "other best ten",
            "to choose",
            "to rank",
            "to build",
            "bytes per document",
        ]
        rows = [header, ["---"] * len(header)]
        for record in records:
            times = [_milliseconds(record[name]) for name in ("choice_seconds", "rank_seconds")]
            if "recall" not in record:
                # the exact prefilter stores nothing besides the index
                rows.append([record["stage"], "100%", "none", *times, "", ""])
                continue
            found = [f"{record['recall']:.2%}", f"{record['other_set']:.1%} of queries"]
            rows.append(
                [record["stage"], *found, *times, f"{record['build_seconds']:.0f} s", f"{record['bytes']:,.0f}"]
            )
        parts.append(f"{where}:\n\n{markdown(rows)}")
    return "\n\n".join(parts)
