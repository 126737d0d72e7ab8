"""Fit the temperature and bias that turn scores into probabilities, on candidate lists."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixencoder.base.engine import Engine
from mixencoder.errors import DataError, MissingExtraError
from mixencoder.evaluation.model_scores import score_candidates
from mixencoder.evaluation.tasks import RankingTask, Task

BINS = 10
"""Bins of equal width for the calibration error."""


class Calibration(NamedTuple):
    """A fitted temperature and bias, and how well they fit the data of the fit."""

    temperature: float
    bias: float
    log_loss: float
    """Mean negative log-likelihood in nats; every task has the same weight."""
    base_log_loss: float
    """The same for a constant probability: the share of right documents."""
    error: float
    """Expected calibration error, over `BINS` bins."""


def fit_calibration(engine: Engine, tasks: Sequence[Task], *, batch_size: int = 32) -> Calibration:
    """Fit ``sigmoid(score / temperature + bias)`` to whether candidates are right (Platt scaling, no regularisation).

    Args:
        engine: the model, of which the full ranking score is used.
        tasks: candidate lists that it was not trained on; each has the same weight, whatever its size.
        batch_size: as in `mixencoder.base.engine.Engine.predict`.

    Raises:
        DataError: there is no task, a task holds pairs, or as `fit_scores`.
        MissingExtraError: scikit-learn is not installed.
    """
    if not tasks:
        raise DataError("no data were given; expected candidate lists")
    scores, right, weights = [], [], []
    for task in tasks:
        if not isinstance(task, RankingTask):
            raise DataError(f"{task.source} holds pairs; expected candidate lists")
        rows = score_candidates(engine, task, ("full",), {"batch_size": batch_size, "show_progress_bar": False})["full"]
        values = np.concatenate([row.double().cpu().numpy() for row in rows])
        scores.append(values)
        grades = zip(task.document_ids, task.qrels, strict=True)
        right.append(np.array([judged.get(name, 0) > 0 for names, judged in grades for name in names]))
        weights.append(np.full(len(values), 1 / len(values)))
    return fit_scores(np.concatenate(scores), np.concatenate(right), np.concatenate(weights))


def fit_scores(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> Calibration:
    """Fit scores (n,) whose documents are right or not (n,) bool, with weights (n,).

    Raises:
        DataError: all documents are right or none is, right documents do not score higher, or all of them score above
            all others, so that the fit has no finite temperature.
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
            "temperature fits best; expected more data, in which the model makes some mistakes"
        )
    # standardised scores and weights of mean 1, as the solver stops by the size of gradients
    weights = weights * (len(weights) / weights.sum())
    center, spread = np.average(scores, weights=weights), scores.std() or 1.0
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
    model.fit(((scores - center) / spread)[:, None], right, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / spread
    if slope <= 0:
        raise DataError("right documents do not score higher than others in these data; there is nothing to calibrate")
    bias = float(model.intercept_[0]) - slope * center
    # 1 / (1 + exp(-x)), without overflow for large x
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
