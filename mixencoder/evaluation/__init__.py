"""How good a model is on data that it has not seen: rankings, labelled pairs and scored pairs, any architecture.

`tasks` reads what is measured, `scoring` asks the model, `measures` and `bootstrap` compute figures and their
intervals, `evaluator` puts them together; `files` and `provenance` serve those who write results down.
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
