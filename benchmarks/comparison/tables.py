"""The tables of the comparison, from its records."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.comparison.settings import ABLATED, ABLATIONS, CONTENDERS, LONG, TASKS

Record = dict[str, Any]

COLUMNS = {
    "mnli_matched.dev": "NLI",
    "ubuntu_irc_1in10.dev": "replies 1 in 10",
    "ubuntu_irc_1in100.dev": "replies 1 in 100",
    "wikiqa.test": "WikiQA",
    "trecqa.dev": "TREC-QA",
    "scifact.test": "SciFact",
}
"""Name of a measured task -> heading."""
LONG_NAME = Path(LONG).stem
PARTS = {"full": "", "interaction": ", interaction alone", "dual": ", dual term alone"}


class Figure(NamedTuple):
    """A figure, the mean over seeds, and its interval if there is one seed."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"


def read_records(folder: Path) -> list[Record]:
    """Return the records in a folder of results, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def cells(records: list[Record], part: str = "full") -> dict[str, dict[str, Figure]]:
    """Return {contender: {measured task: its figure}} of one part of the score; classification has only "full"."""
    found: dict[str, dict[str, list[Figure]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, report in record["reports"].items():
            if part in report["results"][name]:
                measure = report["measure"]
                low_high = report["intervals"][name][part][measure]
                cell = Figure(report["results"][name][part][measure], low_high and tuple(low_high))
                found[record["contender"]][name].append(cell)
    return {
        contender: {
            name: seeds[0] if len(seeds) == 1 else Figure(mean(seed.value for seed in seeds), None)
            for name, seeds in reports.items()
        }
        for contender, reports in found.items()
    }


def task_mean(figures: dict[str, Figure]) -> float | None:
    """Mean over the four tasks, a task's reports averaged first; None if one is missing."""
    means = []
    for names in _names_by_task().values():
        if any(name not in figures for name in names):
            return None
        means.append(mean(figures[name].value for name in names))
    return mean(means)


def _names_by_task() -> dict[str, list[str]]:
    names = {}
    for task, compared in TASKS.items():
        stems = [Path(report.path).name.removesuffix(".jsonl.gz") for report in compared.reports if report.path != LONG]
        names[task] = [next(name for name in COLUMNS if name.startswith(stem)) for stem in stems]
    return names


def comparison_rows(records: list[Record], latency: dict[str, Any], *, intervals: bool) -> list[list[str]]:
    """Every contender's figures, their mean, and what a query and a candidate cost."""
    header = ["", *COLUMNS.values(), "mean of tasks", "of cross-encoder", "N = 1,000", "bytes per candidate"]
    rows = [header, ["---"] * len(header)]
    found = cells(records)
    best = task_mean(found["cross-encoder"])
    for contender in filter(found.get, CONTENDERS):
        figures, average = found[contender], task_mean(found[contender])
        cost = latency[CONTENDERS[contender].architecture]
        size = cost["bytes_per_candidate"]
        rows.append(
            [
                contender,
                *(_shown(figures.get(name), intervals) for name in COLUMNS),
                "" if average is None else f"{average:.3f}",
                "" if average is None or best is None else f"{average / best:.1%}",
                f"{cost['seconds'] * 1000:,.0f} ms",
                "its text" if size is None else f"{size:,.0f}",
            ]
        )
    return rows


def part_rows(records: list[Record]) -> list[list[str]]:
    """MixEncoder's whole score and its parts, and the dual-encoder."""
    names = [name for name in COLUMNS if name != "mnli_matched.dev"]
    rows = [["", *(COLUMNS[name] for name in names)], ["---"] * (1 + len(names))]
    for contender in CONTENDERS:
        parts = PARTS if CONTENDERS[contender].architecture == "mixencoder" else {"full": ""}
        if contender == "dual-encoder" or len(parts) > 1:
            for part, suffix in parts.items():
                if figures := cells(records, part).get(contender):
                    rows.append([contender + suffix, *(_shown(figures.get(name), False) for name in names)])
    return rows


def growth_rows(records: list[Record]) -> list[list[str]]:
    """R@1 of replies as the list grows."""
    lists = {"10": "ubuntu_irc_1in10.dev", "100": "ubuntu_irc_1in100.dev", "1,000": LONG_NAME}
    rows = [["", *(f"of {count}" for count in lists), "queries with 1,000"], ["---"] * (2 + len(lists))]
    queries = {
        record["contender"]: record["reports"][LONG_NAME]["provenance"]["queries"][LONG_NAME]
        for record in records
        if LONG_NAME in record["reports"]
    }
    found = cells(records)
    for contender in filter(queries.get, CONTENDERS):
        figures = found[contender]
        rows.append([contender, *(_shown(figures[name], True) for name in lists.values()), str(queries[contender])])
    return rows


def ablation_rows(base: list[Record], records: list[Record]) -> list[list[str]]:
    """MixEncoder as compared, then with one thing changed at a time: R@1 of the whole score and of the interaction.

    Args:
        base: records of the comparison.
        records: of the ablations.
    """
    names = [name for name, task in COLUMNS.items() if name.startswith("ubuntu_irc")]
    header = ["", *(COLUMNS[name] for name in names), *(f"{COLUMNS[name]}, interaction alone" for name in names)]
    rows = [header, ["---"] * len(header)]
    ours = [record for record in base if (record["task"], record["contender"]) == (ABLATED, "mixencoder")]
    varied = {"mixencoder": "as compared: k = 1, J = 1, dual term"}
    varied |= {name: contender.varied for name, contender in ABLATIONS.items()}
    full, alone = cells(ours + records), cells(ours + records, "interaction")
    for name in filter(full.get, varied):
        # without a dual term the whole score is the interaction's
        parts = alone.get(name, full[name])
        rows.append(
            [varied[name], *(_shown(figures[column], False) for figures in (full[name], parts) for column in names)]
        )
    return rows


def _shown(cell: Figure | None, interval: bool) -> str:
    if cell is None:
        return ""
    return str(cell) if interval else f"{cell.value:.3f}"
