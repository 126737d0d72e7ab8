"""Tables of quality after training: learning curves, variants of the interaction, labels on stored vectors.

Quality does not depend on the processor, so the records of all CPUs are read together.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.comparison.settings import CURVE_CONTENDERS, CURVES
from benchmarks.comparison.tables import COLUMNS, Figure, cells
from benchmarks.interaction.variants import VARIANTS
from benchmarks.measuring.markdown import markdown_table
from benchmarks.suite.results import RESULTS

Record = dict[str, Any]

CURVE_LABELS = {name: name for name in CURVE_CONTENDERS} | {
    "mixencoder": "mixencoder, with the dual term",
    "mixencoder-published": "mixencoder, as published",
}
"""Contender of a learning curve -> its name in the table and the picture."""
EARLY = 500
"""Steps of the column that shows a variant early in training."""


def _not_recorded(command: str) -> str:
    return f"Not recorded yet: `{command}` does it."


def _records(pattern: str) -> list[Record]:
    """Records whose files match a pattern below the folders of CPUs, each with its `device`."""
    paths = sorted(RESULTS.glob(f"cpu-*/{pattern}"))
    return [
        {"device": path.relative_to(RESULTS).parts[0], **json.loads(path.read_text(encoding="utf-8"))} for path in paths
    ]


def _provenance(records: Sequence[Record]) -> str:
    """Machines, threads and commits of some records, each once."""
    machines = dict.fromkeys(
        f"{record['device']}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}" for record in records
    )
    commits = dict.fromkeys(record["commit"][:7] for record in records)
    return f"{', '.join(machines)}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


# -- learning curves ---------------------------------------------------------------------------------------------------


CURVES_COMMAND = "python -m benchmarks.comparison.curves"


def curve_reports() -> dict[str, tuple[str, str]]:
    """Return {report: (task, measure)} of all reports with learning curves, in the order of the tables."""
    known = {
        name: (task, report.measure)
        for task, curve in CURVES.items()
        for report in curve.reports
        for name in COLUMNS
        if Path(report.path).name.startswith(f"{name}.")
    }
    return {name: known[name] for name in COLUMNS if name in known}


def read_curves() -> list[Record]:
    """Records of all learning curves."""
    return _records("curves/*.json")


def curves_of(records: Sequence[Record], report: str) -> dict[str, dict[int, Figure]]:
    """Return {contender: {steps: its figure}} of a report, contenders in the order of the settings."""
    found: dict[str, dict[int, Figure]] = {}
    for steps in sorted({point["steps"] for record in records for point in record["points"]}):
        points = [
            {"contender": record["contender"], "reports": {report: point["reports"][report]}}
            for record in records
            for point in record["points"]
            if point["steps"] == steps and report in point["reports"]
        ]
        for contender, figures in cells(points).items():
            found.setdefault(contender, {})[steps] = figures[report]
    return {contender: found[contender] for contender in CURVE_CONTENDERS if contender in found}


def curves_table() -> str:
    """Every contender's figure after each number of steps."""
    records = read_curves()
    if not records:
        return _not_recorded(CURVES_COMMAND)
    steps = sorted({point["steps"] for record in records for point in record["points"]})
    rows = [["measured", "contender", *(f"{count:,} steps" for count in steps)]]
    for report, (_, measure) in curve_reports().items():
        for contender, figures in curves_of(records, report).items():
            rows.append(
                [
                    f"{COLUMNS[report]}, {measure}",
                    CURVE_LABELS[contender],
                    *(f"{figures[count].value:.3f}" if count in figures else "" for count in steps),
                ]
            )
    return f"{markdown_table(rows)}\n\n{_provenance(records)}"


# -- variants of the interaction ---------------------------------------------------------------------------------------


def interaction_table() -> str:
    """Every variant of the interaction on a frozen encoder, those that did not help included."""
    records = _records("interaction/*.json")
    if not records:
        return _not_recorded("python -m benchmarks.interaction")
    header = [
        "variant",
        "steps",
        "dual term alone",
        "full, share 1",
        "full, share chosen on the others",
        "interaction alone",
        f"full, share 1, at {EARLY} steps",
        "SciFact, full, share 1",
    ]
    rows = [header, *_encoder_row(records)]
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["variant"], []).append(record)
    for name in [*VARIANTS, *sorted(set(by_name) - set(VARIANTS))]:
        if seeds := by_name.get(name):
            rows.append(_variant_row(seeds))
    return f"{markdown_table(rows)}\n\n{_provenance(records)}"


def _encoder_row(records: Sequence[Record]) -> list[list[str]]:
    """The encoder's own cosine: the dual term of a variant that trains nothing on it; no row without such a variant."""
    for record in records:
        if record["heads"] == "none":
            point = record["points"][-1]
            figures = point["unseen"]["0.0"], point["sets"]["scifact"]["0.0"]
            unseen, scifact = (f"{figure:.3f}" for figure in figures)
            return [["the encoder's cosine, nothing trained", "", unseen, "", "", "", "", scifact]]
    return []


def _variant_row(seeds: Sequence[Record]) -> list[str]:
    """The row of a variant, means over its seeds."""
    first = seeds[0]
    last = [record["points"][-1] for record in seeds]
    early = [point for record in seeds for point in record["points"] if point["steps"] == EARLY]

    def shown(points: Iterable[Record], figure: Callable[[Record], float]) -> str:
        values = [figure(point) for point in points]
        return f"{mean(values):.3f}" if values else ""

    return [
        first["what"],
        f"{last[0]['steps']:,}",
        shown(last, lambda point: point["unseen"]["0.0"]),
        shown(last, lambda point: point["unseen"]["1.0"]),
        shown(last, lambda point: point["unseen"]["chosen on the others"]),
        # without an interaction its scores are all equal
        shown(last if first["interacts"] else [], lambda point: point["unseen"]["alone"]),
        shown(early, lambda point: point["unseen"]["1.0"]),
        shown(last, lambda point: point["sets"]["scifact"]["1.0"]),
    ]


# -- labels on stored vectors ------------------------------------------------------------------------------------------


def adapting_table() -> str:
    """What labelled queries of one domain give on top of stored vectors, by what is trained and number of labels."""
    found = _records("adapting.json")
    if not found:
        return _not_recorded("python -m benchmarks.interaction.adapting")
    document = found[0]
    by_what: dict[str, dict[int, Record]] = {}
    for record in document["records"]:
        by_what.setdefault(record["what"], {})[record["labels"]] = record
    counts = sorted({record["labels"] for record in document["records"]})
    trained = [count for count in counts if count]
    columns: list[tuple[str, int]] = [(measure, count) for measure in ("nDCG@10", "Success@1") for count in counts]
    columns += [("seconds", count) for count in trained]
    rows = [["what is trained", *(_adapting_header(*column) for column in columns)]]
    rows += [
        [_TRAINED.get(what, what), *(_adapting_cell(records.get(count), name) for name, count in columns)]
        for what, records in by_what.items()
    ]
    described = f"{document['held out']:,} questions that were held out rank all {document['answers']:,} answers"
    return f"{markdown_table(rows)}\n\n{described}; {_provenance([document])}"


_TRAINED = {"cosine": "nothing: the cosine of the vectors"}


def _adapting_header(name: str, count: int) -> str:
    labels = f"{count:,} labels" if count else "no labels"
    return f"{'minutes' if name == 'seconds' else name}, {labels}"


def _adapting_cell(record: Mapping[str, Any] | None, name: str) -> str:
    if record is None:
        return ""
    return f"{record['seconds'] / 60:.1f}" if name == "seconds" else f"{record[name]:.3f}"


# -- candidates for the bundled checkpoint -----------------------------------------------------------------------------


TRIALS_COMMAND = "python -m benchmarks.checkpoint.trials"


def trials_table() -> str:
    """Candidates for the bundled checkpoint on domains that none was trained on, by the share with the best mean."""
    found = _records("default_trials.json")
    if not found:
        return _not_recorded(TRIALS_COMMAND)
    (record,) = found
    tasks = list(next(iter(record["records"].values()))["figures"])
    rows = [["model", "score", *tasks, "mean"]]
    for name, trial in record["records"].items():
        by_share = {share: [trial["figures"][task][share] for task in tasks] for share in trial["figures"][tasks[0]]}
        best = max((share for share in by_share if float(share)), key=lambda share: mean(by_share[share]), default=None)
        shown = {"0.0": "cosine" if best is None else "dual term alone"}
        if best is not None:
            shown |= {best: f"full score, {best} of the interaction", "1.0": "full score"}
        for share, what in sorted(shown.items()):
            values = [*by_share[share], mean(by_share[share])]
            rows.append([name, what, *(f"{value:.3f}" for value in values)])
    commits = ", ".join(dict.fromkeys(trial["commit"][:7] for trial in record["records"].values()))
    return f"{markdown_table(rows)}\n\n{record['measure']}, {record['queries']} queries a set; commit {commits}"
