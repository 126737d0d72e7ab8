"""`evaluate`: measure a model on tasks, with an interval for every figure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mixencoder.base.empty_texts import check_on_empty, report_tokenless
from mixencoder.base.engine import Engine
from mixencoder.errors import DataError, InputError
from mixencoder.evaluation.measures import (
    Figure,
    Measured,
    RankingMeasures,
    choose_measures,
    measure_classes,
    measure_similarity,
    with_intervals,
)
from mixencoder.evaluation.model_scores import Ranking, predict_classes, score_candidates, score_pairs, strict_ranking
from mixencoder.evaluation.tasks import PairTask, RankingTask, Task


class Evaluation(NamedTuple):
    """What `evaluate` found for one task."""

    figures: dict[str, dict[str, Figure]]
    """Part of the score -> measure -> figure. Class logits have no parts; their figures are under "full"."""
    rankings: dict[str, list[Ranking]]
    """Part of the score -> for every query its candidates, best first; empty for pairs."""


def evaluate(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    measures: Sequence[str] = (),
    scores: Sequence[str] = ("full",),
    seed: int = 0,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
    on_empty: str = "special",
) -> dict[str, Evaluation]:
    """Measure a model on tasks; everything is checked before the first text is scored.

    An engine that encodes documents ahead of time encodes every distinct document of a task once. Ties count against
    the model (`mixencoder.evaluation.model_scores`).

    Args:
        engine: an engine of any architecture.
        tasks: tasks with unique names, from `read_tasks`.
        measures: names that ir-measures knows, accuracy, macro-F1, Pearson, Spearman. A kind of task without any of
            these gets its `DEFAULT_MEASURES`.
        scores: parts of the ranking score, from the engine's ``score_terms``; each is measured separately.
        seed: seed of the bootstrap.
        batch_size, show_progress_bar: as in `mixencoder.base.engine.Engine.predict`.
        on_empty: "special" reads a text without a token as the tokenizer's special tokens alone, and warns; "error"
            raises.

    Returns:
        ``{task name: Evaluation}``.

    Raises:
        MissingExtraError: ir-measures, scikit-learn or SciPy is not installed.
        DataError: a measure is unknown or cannot be computed for these tasks, the model lacks what a task needs, or a
            text holds no token and on_empty is "error".
        InputError: batch_size is not positive, or on_empty is unknown.
        NonFiniteError: a score is NaN or infinite.
    """
    check_on_empty(on_empty)
    chosen = choose_measures(measures, {task.kind for task in tasks})
    rankers: dict[str, RankingMeasures] = {}
    for task in tasks:
        _check(engine, task, scores)
        if task.suspects:
            report_tokenless(engine.tokenizer, task.suspects, on_empty=on_empty)
        if isinstance(task, RankingTask):
            rankers[task.name] = RankingMeasures(chosen["ranking"], task.qrels)
            # a trial on unsorted candidates: what ir-measures cannot compute raises before hours of scoring
            unsorted: list[Ranking] = [
                [(name, float(-position)) for position, name in enumerate(ids)] for ids in task.document_ids
            ]
            rankers[task.name](unsorted)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    found = {}
    for task in tasks:
        if isinstance(task, PairTask):
            measured, rankings = _measure_pairs(engine, task, chosen[task.kind], scores, options), {}
        else:
            rankings = _rank(engine, task, scores, options)
            measured = {score: rankers[task.name](ranking) for score, ranking in rankings.items()}
        found[task.name] = Evaluation(with_intervals(measured, len(task), seed), rankings)
    return found


def _check(engine: Engine, task: Task, scores: Sequence[str]) -> None:
    """Raise if the model cannot score a task."""
    if task.kind == "classification" and "full" not in scores:
        raise DataError(
            f"{task.source} holds labelled pairs and scores are {', '.join(scores)}; class logits have no parts, "
            "expected full"
        )
    head = "classification" if task.kind == "classification" else "ranking"
    try:
        for score in scores:
            # of an empty list only the arguments are checked
            engine.predict([], head=head, score=score)
    except InputError as error:
        raise DataError(f"{task.source} cannot be scored by this model: {error}") from error


def _rank(engine: Engine, task: RankingTask, scores: Sequence[str], options: Mapping) -> dict[str, list[Ranking]]:
    return {
        score: [
            strict_ranking(ids, row.tolist(), grades)
            for ids, row, grades in zip(task.document_ids, rows, task.qrels, strict=True)
        ]
        for score, rows in score_candidates(engine, task, scores, options).items()
    }


def _measure_pairs(
    engine: Engine, task: PairTask, names: Sequence[str], scores: Sequence[str], options: Mapping
) -> dict[str, dict[str, Measured]]:
    if task.kind == "classification":
        gold = task.targets.astype(int)
        return {"full": measure_classes(names, gold, predict_classes(engine, task.pairs, gold, options))}
    found = score_pairs(engine, task.pairs, scores, options)
    return {score: measure_similarity(names, values, task.targets) for score, values in found.items()}
