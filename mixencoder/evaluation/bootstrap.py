"""Percentile bootstrap over rows, vectorised: a resample is the number of times that each row was drawn.

A statistic is a function from counts (R, n) of R resamples of n rows to values (R,), NaN where it is undefined.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_NUMBERS_AT_ONCE = 2**22

Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]


def intervals(statistics: Mapping, rows: int, seed: int) -> dict:
    """Return {key: (low, high)} of statistics by key, all on the same resamples; None for an undefined interval.

    Args:
        statistics: statistics by any key.
        rows: number of rows; a single row has no interval.
        seed: seed of the resamples.
    """
    if rows < 2:
        return dict.fromkeys(statistics)
    drawn = {key: [] for key in statistics}
    for counts in _resamples(rows, seed):
        for key, statistic in statistics.items():
            drawn[key].append(statistic(counts))
    return {key: _interval(np.concatenate(values)) for key, values in drawn.items()}


def mean(values: np.ndarray) -> Statistic:
    """Mean of values (n,)."""
    return lambda counts: counts @ values / counts.sum(axis=1)


def macro_f1(gold: np.ndarray, predicted: np.ndarray) -> Statistic:
    """Mean F1 over the classes that occur among gold or predicted class numbers (n,) of a resample."""
    classes = np.union1d(gold, predicted)
    is_gold, is_predicted = ((numbers[:, None] == classes).astype(np.float64) for numbers in (gold, predicted))

    def statistic(counts: np.ndarray) -> np.ndarray:
        right = counts @ (is_gold * is_predicted)
        either = counts @ (is_gold + is_predicted)
        occurs = either > 0
        return (2 * right / np.where(occurs, either, 1)).sum(axis=1) / occurs.sum(axis=1)

    return statistic


def pearson(scores: np.ndarray, targets: np.ndarray) -> Statistic:
    """Correlation of scores and targets (n,): 0 where scores are all the same, NaN where targets are."""
    return lambda counts: _correlation(counts, scores, targets)


def spearman(scores: np.ndarray, targets: np.ndarray) -> Statistic:
    """Correlation of the ranks of scores and targets (n,), ties at their mean rank; undefined as in `pearson`."""
    rank_scores, rank_targets = _ranker(scores), _ranker(targets)
    return lambda counts: _correlation(counts, rank_scores(counts), rank_targets(counts))


def _resamples(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Yield counts (R, rows), `RESAMPLES` in all."""
    generator = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, _NUMBERS_AT_ONCE // rows))
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        numbers = generator.integers(rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(numbers.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _ranker(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from counts (R, n) to the ranks (R, n) of values (n,) in each resample."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))

    def ranks(counts: np.ndarray) -> np.ndarray:
        # (R, number of distinct values): copies of each, which share the mean of their ranks
        copies = np.add.reduceat(counts[:, order], starts, axis=1)
        return (copies.cumsum(axis=1) - (copies - 1) / 2)[:, group]

    return ranks


def _correlation(counts: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    weights = counts / counts.sum(axis=1, keepdims=True)
    score_gaps, score_variance = _centred(weights, scores)
    target_gaps, target_variance = _centred(weights, targets)
    covariance = (weights * score_gaps * target_gaps).sum(axis=1)
    scale = np.sqrt(score_variance * target_variance)
    out = np.where(target_variance > 0, 0.0, np.nan)
    return np.divide(covariance, scale, out=out, where=scale > 0)


def _centred(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values less their weighted mean (R, n), and their variance (R,), exactly 0 where all are the same."""
    gaps = values - (weights * values).sum(axis=1, keepdims=True)
    variance = (weights * gaps**2).sum(axis=1)
    # by rounding, the gaps of a constant are about 1e-16 of its value, not 0
    size = (weights * np.square(values)).sum(axis=1)
    return gaps, np.where(variance > 1e-20 * size, variance, 0.0)
