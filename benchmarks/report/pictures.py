"""The data of the pictures, from committed results; `benchmarks.report.drawing` draws them.

A file holds the digest of its picture's data, so that a test can tell without drawing whether the file is up to date.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison.settings import CONTENDERS, CURVE_CONTENDERS
from benchmarks.comparison.tables import COLUMNS, Figure, cells, read_records, task_mean
from benchmarks.index.contenders import DEFAULT, NARROW_ON_DISK, ON_DISK
from benchmarks.measuring.provenance import ROOT
from benchmarks.report.index_tables import MACHINES, index_records
from benchmarks.report.learning_tables import CURVE_LABELS, CURVES_COMMAND, curve_reports, curves_of, read_curves
from benchmarks.report.tables import ATTENTION, COMPARISONS, FOLDER, latency_record, share_of_limit, suite_records
from benchmarks.suite.case import Record
from benchmarks.suite.results import read_results

OURS, RIVAL, LIMIT = "ours", "rival", "limit"


@dataclass(frozen=True)
class Series:
    """Points of one contender or mode."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    role: str
    """`OURS`, `RIVAL` or `LIMIT`."""
    mark: str = "o"
    """A marker of matplotlib; "" for none."""
    joined: bool = True
    notes: tuple[str, ...] = ()
    """Texts next to the points."""


@dataclass(frozen=True)
class BandedSeries(Series):
    """Points with intervals."""

    low: tuple[float, ...] = ()
    """Lower ends of the intervals; empty for none."""
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_log: bool = True


@dataclass(frozen=True)
class Picture:
    """The data of one file."""

    alt: str
    """Description in words, for readers who cannot see it."""
    panels: tuple[Panel, ...]
    columns: int = 1

    @property
    def digest(self) -> str:
        """Digest of everything that is drawn."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def picture_path(name: str) -> Path:
    """Path of a picture."""
    return ROOT / "docs" / "images" / f"{name.replace(' ', '-')}.svg"


def is_current(name: str) -> bool:
    """Whether the file shows the current results; without results there must be no file."""
    picture, path = PICTURES[name](), picture_path(name)
    if picture is None:
        return not path.exists()
    return path.exists() and picture.digest in path.read_text(encoding="utf-8")


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Round to six digits, so that the digest is the same on every machine."""
    return tuple(float(f"{value:.6g}") for value in values)


def _series(label: str, points: Iterable[tuple[float, float]], role: str, **options: Any) -> Series:
    x, y = zip(*points, strict=True)
    return Series(label, _rounded(x), _rounded(y), role, **options)


def _merged(series: Iterable[Series]) -> tuple[Series, ...]:
    """Replace series with the same points by one with all their names."""
    found: dict[tuple[tuple[float, ...], ...], Series] = {}
    for one in series:
        first = found.get((one.x, one.y))
        found[one.x, one.y] = one if first is None else replace(first, label=f"{first.label} = {one.label}")
    return tuple(found.values())


def _by_contender(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["backend"], []).append(record)
    return found


def _role(record: Record) -> str:
    return OURS if record["own"] else RIVAL


# -- ranking against N -------------------------------------------------------------------------------------------------


def cost_picture() -> Picture | None:
    """Time of a query against N, every architecture, with the limit of ours."""
    found = _by_contender(suite_records("end_to_end", "rank"))
    if not found:
        return None
    series = [
        _series(name, [(r["shape"]["N"], r["seconds"] * 1000) for r in records], _role(records[0]))
        for name, records in found.items()
    ]
    own = next(records for records in found.values() if records[0]["own"])
    least = [(r["shape"]["N"], share_of_limit(r) * r["seconds"] * 1000) for r in own]
    series.append(_series("limit of mixencoder", least, LIMIT, mark=""))
    shape = own[0]["shape"]
    title = f"a query of {shape['m']} tokens, candidates of {shape['n']}, {shape['L']} layers, d = {shape['d']}"
    label = "milliseconds from text to ranking"
    panels = [Panel(title, "candidates N", label, tuple(series))]
    for device, records in list(index_records().items())[:1]:
        lines = {
            _INDEX_LINES[name]: [(r["N"], r["seconds"][name] * 1000) for r in records if name in r["seconds"]]
            for name in _INDEX_LINES
        }
        series = [
            _series(line, points, RIVAL if line == "dual-encoder" else OURS) for line, points in lines.items() if points
        ]
        title = f"out of an index on disk: {MACHINES.get(device, device)}"
        panels.append(Panel(title, "candidates N", label, tuple(series)))
    return Picture(
        "Time of a query against the number of candidates, on log axes: six architectures with the limit of the "
        "machine, and out of an index with and without the prefilter.",
        tuple(panels),
    )


_INDEX_LINES = {
    ON_DISK: "all fully scored",
    f"{ON_DISK} int8 products": "all, int8 products",
    f"{NARROW_ON_DISK}{DEFAULT}": "all, bfloat16 model",
    f"{ON_DISK} prefilter{DEFAULT}": "with the default prefilter",
    f"{NARROW_ON_DISK} prefilter{DEFAULT}": "the same, bfloat16 model",
    "dual-encoder": "dual-encoder",
}
"""Name in the records of `benchmarks.index.speed` -> label of a line."""


def memory_picture() -> Picture | None:
    """Bytes kept of all candidates, and bytes that a query allocates, against N."""
    found = _by_contender(suite_records("end_to_end", "rank"))
    if not found:
        return None
    kept = [
        _series(
            name,
            [(r["shape"]["N"], r["shape"]["N"] * r["facts"]["stored_bytes"] / 1e6) for r in records],
            _role(records[0]),
        )
        for name, records in found.items()
    ]
    taken = [
        _series(name, [(r["shape"]["N"], r["peak_bytes"] / 1e6) for r in records], _role(records[0]))
        for name, records in found.items()
    ]
    return Picture(
        "Memory kept of all candidates, and memory that a query takes at most, against the number of candidates.",
        (
            Panel("kept of all candidates", "candidates N", "megabytes", _merged(kept)),
            Panel("taken by a query, at most", "candidates N", "megabytes", tuple(taken)),
        ),
    )


# -- operators against the limit ---------------------------------------------------------------------------------------

_MODES = {"": ("forward", "o"), " backward": ("backward", "s"), " training step": ("training step", "^")}
_OPERATORS = (ATTENTION, "residual_layer_norm", "gate_layer_norm", "score_candidates")


def roofline_picture() -> Picture | None:
    """FLOP/s of every operator against FLOPs per byte, below the roof of this machine, float32."""
    path = FOLDER / "operators.json"
    peaks = read_results(path).peaks.get("float32") if path.is_file() else None
    panels = [panel for name in _OPERATORS if peaks and (panel := _roofline(name, peaks))]
    if not panels:
        return None
    alt = "FLOP/s against FLOPs a byte of every operator, beneath the roof of memory and of matrix units."
    return Picture(alt, tuple(panels), columns=2)


def _roofline(operator: str, peaks: Mapping[str, float]) -> Panel | None:
    series = []
    for suffix, (mode, mark) in _MODES.items():
        records = [
            record
            for record in suite_records("operators", operator + suffix)
            if record["dtype"] == "float32" and not record["variant"]
        ]
        ours = [record for record in records if record["own"]]
        rivals = [record for record in records if record["backend"] == record["rival"]]
        for label, points, role in ((mode, ours, OURS), (f"{mode}, best rival", rivals, RIVAL)):
            if points:
                for record in points:
                    # raises if one lies above the roof
                    share_of_limit(record)
                coordinates = [(r["flops"] / r["bytes"], r["flops"] / r["seconds"] / 1e9) for r in points]
                notes = tuple(map(_sizes, points)) if role == OURS and len(points) > 1 else ()
                series.append(_series(label, coordinates, role, mark=mark, joined=False, notes=notes))
    if not series:
        return None
    left, right = (pick([x for one in series for x in one.x]) for pick in (min, max))
    ridge = peaks["flops"] / peaks["bytes"]
    roof = sorted({left / 3, ridge, max(right * 3, ridge * 3)})
    points = [(x, min(x * peaks["bytes"], peaks["flops"]) / 1e9) for x in roof]
    series.append(_series("roof", points, LIMIT, mark=""))
    return Panel(operator, "FLOPs a byte", "GFLOP/s", tuple(series))


def _sizes(record: Record) -> str:
    return " ".join(f"{name}={size:,}" for name, size in record["shape"].items() if name in ("N", "k", "m"))


# -- quality against time ----------------------------------------------------------------------------------------------


_TRAINED = {
    "small": "trained alike for minutes on a CPU: the joint ones have hardly begun",
    "medium": "trained alike for minutes on a GPU",
}


def _with_prefilter(own: Series, latency: Mapping[str, Any]) -> Series:
    """The same quality at the time with the default prefilter.

    The quality is that of the same rankings: lists of the four tasks have at most 100 candidates, fewer than it keeps.
    """
    name = f"{own.label}, prefilter"
    seconds = latency["mixencoder, prefilter"]["seconds"]
    return _series(name, [(seconds * 1000, own.y[0])], OURS, notes=(name,))


def quality_picture() -> Picture | None:
    """Mean quality of the architectures trained alike, against the time of a query; one panel per setting."""
    document = latency_record()
    latency, shape = document["contenders"], document["shape"]
    x_label = f"milliseconds a query, {shape['N']:,} candidates, {document['threads']} CPU threads"
    panels = []
    for setting, title in _TRAINED.items():
        found = cells(read_records(COMPARISONS[setting])) if COMPARISONS[setting].is_dir() else {}
        series = tuple(
            _series(
                name,
                [(latency[contender.architecture]["seconds"] * 1000, quality)],
                OURS if contender.architecture == "mixencoder" else RIVAL,
                notes=(name,),
            )
            for name, contender in CONTENDERS.items()
            # a contender with a teacher costs the same as the one without
            if name in found and not contender.teacher and (quality := task_mean(found[name])) is not None
        )
        series += tuple(_with_prefilter(one, latency) for one in series if one.role == OURS)
        if series:
            panels.append(Panel(title, x_label, "mean over four tasks", series, y_log=False))
    if not panels:
        return None
    return Picture("Mean quality over four tasks against the time of a query, for six architectures.", tuple(panels))


# -- quality against steps of training ---------------------------------------------------------------------------------


def curves_picture() -> Picture | None:
    """Quality after every number of steps, with intervals; one panel per report."""
    records = read_curves()
    panels = []
    for report, (_, measure) in curve_reports().items():
        if found := curves_of(records, report):
            series = tuple(_curve(contender, figures) for contender, figures in found.items())
            panels.append(Panel(COLUMNS[report], "steps of training", measure, series, y_log=False))
    if not panels:
        return None
    alt = "Quality against steps of training, on a log axis, with 95% intervals, one panel for each data set."
    return Picture(alt, tuple(panels))


def _curve(contender: str, figures: Mapping[int, Figure]) -> BandedSeries:
    intervals = [figure.interval for figure in figures.values() if figure.interval]
    low, high = zip(*intervals, strict=True) if len(intervals) == len(figures) else ((), ())
    return BandedSeries(
        CURVE_LABELS[contender],
        tuple(map(float, figures)),
        _rounded(figure.value for figure in figures.values()),
        OURS if CURVE_CONTENDERS[contender].architecture == "mixencoder" else RIVAL,
        low=_rounded(low),
        high=_rounded(high),
    )


PICTURES: Mapping[str, Callable[[], Picture | None]] = {
    "cost": cost_picture,
    "memory": memory_picture,
    "roofline": roofline_picture,
    "quality": quality_picture,
    "curves": curves_picture,
}
"""By the name in a document's marks."""
RECORDED_BY = {"curves": CURVES_COMMAND}
"""Name of a picture -> the command that records its data, for the text in place of a picture without data."""
