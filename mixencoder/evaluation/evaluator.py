"""`evaluate`: from a model and tasks to figures with their intervals."""

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
    """Part of the score -> measure -> figure. Class logits have no parts: theirs stand under "full" alone."""
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
    """Score every task's texts and measure; everything is checked before the first text is scored.

    An engine that encodes documents ahead does so once for every distinct document of a task. Ties count against the
    model (`mixencoder.evaluation.model_scores`).

    Args:
        engine: a front door of any architecture.
        tasks: of `read_tasks`, each of a name of its own.
        measures: names that ir-measures knows, accuracy, macro-F1, Pearson, Spearman. A kind of task for which none is
            named gets its `DEFAULT_MEASURES`.
        scores: parts of the ranking score, each measured by itself, of the engine's ``score_terms``.
        seed: of the bootstrap.
        batch_size, show_progress_bar: as in `mixencoder.base.engine.Engine.predict`.
        on_empty: texts without a token are read as the tokenizer's special tokens alone and counted ("special"), or
            refused ("error").

    Returns:
        ``{task name: Evaluation}``.

    Raises:
        MissingExtraError: ir-measures, scikit-learn or SciPy is not installed.
        DataError: a measure is unknown or cannot be computed for these tasks, the model lacks what a task needs, or a
            text holds no token and is to be refused.
        InputError: the batch size is none, or on_empty is unknown.
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
            # in the order given: what ir-measures cannot compute is found before hours of scoring
            given: list[Ranking] = [
                [(name, float(-place)) for place, name in enumerate(ids)] for ids in task.document_ids
            ]
            rankers[task.name](given)
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
    """Refuse a task that the model cannot do."""
    if task.kind == "classification" and "full" not in scores:
        raise DataError(
            f"{task.source} holds labelled pairs and scores are {', '.join(scores)}; class logits have no parts, "
            "expected full"
        )
    head = "classification" if task.kind == "classification" else "ranking"
    try:
        for score in scores:
            # scores nothing, but checks as if it did
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
