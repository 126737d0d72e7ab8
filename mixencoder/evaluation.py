"""Ranking quality on rank files and BEIR-layout folders, measured by ir-measures.

Ties count against the model: among equal scores the wrong candidates come first. Every judged document counts in the
ideal ranking, also one that the first stage did not find.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixencoder.beir import read_beir
from mixencoder.errors import DataError, MissingExtraError
from mixencoder.fast import MixEncoder
from mixencoder.training.data import read_ranking_rows

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "Success@1")


@dataclass(frozen=True)
class RankingTask:
    """Queries, the documents that each is to rank, and what is right."""

    name: str
    queries: list[str]
    documents: list[str]
    """All distinct documents of the task."""
    candidates: list[list[int]]
    """For every query, numbers into documents."""
    qrels: list[dict[str, int]]
    """For every query, document name -> grade; judged documents outside its candidates have names of their own."""


def read_ranking_task(path: Path, *, split: str = "test", limit: int | None = None) -> RankingTask:
    """Read a rank file (query, candidates, labels) or a BEIR-layout folder with a first-stage run.

    Args:
        path: file (.jsonl, .jsonl.gz) or folder.
        split: of a folder.
        limit: use the first so many queries alone.

    Raises:
        DataError: the file or folder cannot be used; the message names file and line.
    """
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    queries, candidates, qrels = [], [], []
    if path.is_dir():
        beir = read_beir(path, split)
        for query, grades in list(beir.qrels.items())[:limit]:
            found = beir.run.get(query, [])
            queries.append(beir.queries[query])
            candidates.append([number(beir.corpus[document]) for document in found])
            names = {document: str(place) for place, document in enumerate(found)}
            qrels.append({names.get(document, f"absent {document}"): grade for document, grade in grades.items()})
        return RankingTask(f"{path.name}.{split}", queries, list(numbers), candidates, qrels)
    for query, texts, labels in list(read_ranking_rows(path))[:limit]:
        queries.append(query)
        candidates.append([number(text) for text in texts])
        qrels.append({str(place): int(label) for place, label in enumerate(labels)})
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return RankingTask(name, queries, list(numbers), candidates, qrels)


def evaluate_ranking(
    model: MixEncoder,
    task: RankingTask,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    scores: Sequence[str] = ("full",),
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> dict[str, dict[str, float]]:
    """Rank every query's candidates and measure.

    Args:
        model: the model.
        task: of `read_ranking_task`.
        measures: names that ir-measures knows.
        scores: which parts of the ranking score to measure, each by itself (`mixencoder.fast.SCORES`).
        batch_size, show_progress_bar: as in `MixEncoder.encode_document`.

    Returns:
        {score: {measure: mean over queries}}.

    Raises:
        MissingExtraError: ir-measures is not installed.
        DataError: a measure is not known.
    """
    calculate = _calculator(measures)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    encoded = model.encode_document(task.documents, **options)
    queries = model.encode_query(task.queries, **options)
    return {
        score: calculate(
            [
                model.interact(queries.select(row), encoded[torch.tensor(numbers)], score=score)[0]
                for row, numbers in enumerate(task.candidates)
            ],
            task.qrels,
        )
        for score in scores
    }


def _calculator(measures: Sequence[str]) -> Callable[[Sequence[Tensor], Sequence[dict[str, int]]], dict[str, float]]:
    try:
        import ir_measures
    except ImportError as error:
        raise MissingExtraError(f"evaluation needs the extra: pip install 'mixencoder[eval]' ({error})") from error
    try:
        parsed = [ir_measures.parse_measure(name) for name in measures]
    except (NameError, SyntaxError, ValueError) as error:
        raise DataError(f"a measure is not known to ir-measures: {error}") from error

    def calculate(scores: Sequence[Tensor], qrels: Sequence[dict[str, int]]) -> dict[str, float]:
        run = {str(query): _untie(values.tolist(), qrels[query]) for query, values in enumerate(scores)}
        judged = {str(query): grades for query, grades in enumerate(qrels)}
        result = ir_measures.calc_aggregate(parsed, judged, run)
        return {str(measure): float(result[measure]) for measure in parsed}

    return calculate


def _untie(values: Sequence[float], grades: dict[str, int]) -> dict[str, float]:
    """Replace scores by ranks, among equal scores the lower grade first: no measure's own tie rule applies."""
    order = sorted(range(len(values)), key=lambda place: (-values[place], grades.get(str(place), 0)))
    return {str(place): float(-rank) for rank, place in enumerate(order)}
