"""Score tasks with a model of any architecture; ties count against the model."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.engine import Engine
from mixencoder.evaluation.tasks import RankingTask
from mixencoder.modeling import QueryState

Ranking: TypeAlias = list[tuple[str, float]]
"""Document ids and scores, best first; every score is a float32 below the one before it."""


def score_candidates(
    engine: Engine, task: RankingTask, scores: Sequence[str], options: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """Score every query's candidates.

    Args:
        engine: if it encodes ahead of time, every document and query is encoded once; else pairs are scored.
        task: queries and candidates.
        scores: parts of the score.
        options: batch_size and show_progress_bar.

    Returns:
        {part: for every query (number of its candidates,) float32}.

    Raises:
        InputError: a text holds no token.
        NonFiniteError: a score is NaN or infinite.
    """
    if not isinstance(engine, EncodingEngine):
        pairs = [
            (query, task.documents[number])
            for query, numbers in zip(task.queries, task.candidates, strict=True)
            for number in numbers
        ]
        counts = [len(numbers) for numbers in task.candidates]
        return {
            score: list(_predict(engine, pairs, options, head="ranking", score=score).split(counts)) for score in scores
        }
    documents = engine.encode_document(task.documents, **options)
    queries = engine.encode_query(task.queries, **options)

    def score_row(row: int, numbers: list[int], score: str) -> Tensor:
        if not numbers:
            return torch.empty(0)
        query = queries.select(row) if isinstance(queries, QueryState) else queries[row : row + 1]
        return engine.interact(query, documents[torch.tensor(numbers)], score=score)[0].cpu()

    return {score: [score_row(row, numbers, score) for row, numbers in enumerate(task.candidates)] for score in scores}


def strict_ranking(ids: Sequence[str], scores: Sequence[float], grades: Mapping[str, int]) -> Ranking:
    """Rank documents by score; among equal scores the lower grade comes first.

    ir-measures and trec_eval would break ties by rules of their own, so an equal score is lowered to the next float32
    below the score before it.
    """
    order = sorted(range(len(ids)), key=lambda position: (-scores[position], grades.get(ids[position], 0)))
    ranking: Ranking = []
    previous = np.float32(np.inf)
    for position in order:
        score = np.float32(scores[position])
        if score >= previous:
            score = np.nextafter(previous, np.float32(-np.inf))
        ranking.append((ids[position], float(score)))
        previous = score
    return ranking


def score_pairs(
    engine: Engine, pairs: Sequence[tuple[str, str]], scores: Sequence[str], options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Score pairs (n of them) through the ranking head: {part of the score: (n,) float64}."""
    return {score: _predict(engine, pairs, options, head="ranking", score=score).double().numpy() for score in scores}


def predict_classes(
    engine: Engine, pairs: Sequence[tuple[str, str]], gold: np.ndarray, options: Mapping[str, Any]
) -> np.ndarray:
    """Return the class (n,) int with the highest logit; among equal ones a wrong class; gold (n,) int is right."""
    logits = _predict(engine, pairs, options, head="classification").numpy()
    highest = logits == logits.max(axis=1, keepdims=True)
    tied = highest.sum(axis=1) > 1
    highest[tied, gold[tied]] = False
    return highest.argmax(axis=1)


def _predict(
    engine: Engine, pairs: Sequence[tuple[str, str]], options: Mapping[str, Any], *, head: str, score: str = "full"
) -> Tensor:
    return engine.predict(pairs, convert_to_tensor=True, head=head, score=score, **options).cpu()
