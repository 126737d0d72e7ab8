"""Measure models of any architecture on data that they were not trained on: rankings, labelled and scored pairs.

`tasks` reads the data, `model_scores` scores them, `measures` and `bootstrap` compute figures and their intervals, and
`evaluator` combines these; `files` and `provenance` write results.
"""

from mixencoder.evaluation.evaluator import Evaluation, evaluate
from mixencoder.evaluation.measures import DEFAULT_MEASURES, Figure
from mixencoder.evaluation.tasks import PairTask, RankingTask, read_task, read_tasks

__all__ = [
    "DEFAULT_MEASURES",
    "Evaluation",
    "Figure",
    "PairTask",
    "RankingTask",
    "evaluate",
    "read_task",
    "read_tasks",
]
