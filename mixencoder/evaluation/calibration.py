"""From scores to probabilities: a temperature and a bias, fitted on candidate lists."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixencoder.base.engine import Engine
from mixencoder.errors import DataError, MissingExtraError
from mixencoder.evaluation.model_scores import score_candidates
from mixencoder.evaluation.tasks import RankingTask, Task

BINS = 10
"""Of equal width, for the calibration error."""


class Calibration(NamedTuple):
    """What was fitted, and how well it fits the data that it was fitted on."""

    temperature: float
    bias: float
    log_loss: float
    """Mean negative log-likelihood in nats; tasks count alike."""
    base_log_loss: float
    """The same of a constant, the share of right documents."""
    error: float
    """Expected calibration error, over `BINS` bins."""


def fit_calibration(engine: Engine, tasks: Sequence[Task], *, batch_size: int = 32) -> Calibration:
    """Fit ``sigmoid(score / temperature + bias)`` to whether candidates are right (Platt scaling, no regularisation).

    Args:
        engine: scored with its full ranking score.
        tasks: candidate lists of data that it was not trained on; each counts alike, whatever its size.
        batch_size: as in `mixencoder.base.engine.Engine.predict`.

    Raises:
        DataError: a task is no candidate list, there is none, or as `fit_scores`.
        MissingExtraError: scikit-learn is not installed.
    """
    if not tasks:
        raise DataError("no data was named; expected candidate lists")
    scores, right, weights = [], [], []
    for task in tasks:
        if not isinstance(task, RankingTask):
            raise DataError(f"{task.source} holds pairs; expected candidate lists, of which a probability is fitted")
        rows = score_candidates(engine, task, ("full",), {"batch_size": batch_size, "show_progress_bar": False})["full"]
        values = np.concatenate([row.double().cpu().numpy() for row in rows])
        scores.append(values)
        grades = zip(task.document_ids, task.qrels, strict=True)
        right.append(np.array([judged.get(name, 0) > 0 for names, judged in grades for name in names]))
        weights.append(np.full(len(values), 1 / len(values)))
    return fit_scores(np.concatenate(scores), np.concatenate(right), np.concatenate(weights))


def fit_scores(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> Calibration:
    """Fit scores (n,) whose documents are right or not (n,) bool, each weighed by weights (n,).

    Raises:
        DataError: all are right, or none is, higher scores do not mean right documents, or scores tell all right
            documents from all others: then the steepest line is best, which promises what nothing holds.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(f"calibration needs the extra: pip install 'mixencoder[eval]' ({error})") from error
    if right.all() or not right.any():
        raise DataError(f"{int(right.sum())} of {len(right)} candidates are right; expected some right and some wrong")
    if scores[right].min() > scores[~right].max():
        raise DataError(
            f"all {int(right.sum())} right documents score above all {int((~right).sum())} others, so that no "
            "temperature is the best; expected more data, with some mistakes in them"
        )
    # the solver stops by the size of gradients, which are those of standardised scores and weights of mean 1
    weights = weights * (len(weights) / weights.sum())
    center, spread = np.average(scores, weights=weights), scores.std() or 1.0
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(((scores - center) / spread)[:, None], right, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:
        raise DataError("higher scores do not mean right documents in these data; there is nothing to calibrate")
    bias = float(model.intercept_[0]) - slope * center
    # the same as 1 / (1 + exp(-x)), which overflows far out
    probabilities = (1 + np.tanh((slope * scores + bias) / 2)) / 2
    base = np.average(right, weights=weights)
    return Calibration(
        1 / slope,
        bias,
        _log_loss(probabilities, right, weights),
        _log_loss(np.full(len(scores), base), right, weights),
        _calibration_error(probabilities, right, weights),
    )


def _log_loss(probabilities: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    given = np.clip(np.where(right, probabilities, 1 - probabilities), 1e-15, None)
    return float(np.average(-np.log(given), weights=weights))


def _calibration_error(probabilities: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean over bins of |share that is right - mean probability|."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights * (right - probabilities), minlength=BINS)
    return float(np.abs(gaps).sum() / weights.sum())
