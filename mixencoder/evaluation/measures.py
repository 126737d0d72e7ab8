"""Compute figures: ranking measures by ir-measures, accuracy and macro-F1 by scikit-learn, correlations by SciPy.

Each has a 95% percentile bootstrap interval over queries or pairs (`mixencoder.evaluation.bootstrap`).
"""

import importlib
import math
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixencoder.errors import DataError, MissingExtraError
from mixencoder.evaluation import bootstrap
from mixencoder.evaluation.model_scores import Ranking

DEFAULT_MEASURES = {
    "ranking": ("nDCG@10", "RR@10", "R@1", "R@10", "Success@1"),
    "classification": ("accuracy", "macro-F1"),
    "similarity": ("Pearson", "Spearman"),
}
"""Kind of task -> measures. For pairs there are no others."""
_COMPUTED_BY = {"ranking": "ir_measures", "classification": "sklearn.metrics", "similarity": "scipy.stats"}


class Figure(NamedTuple):
    """A measure's value and its 95% interval."""

    value: float
    interval: tuple[float, float] | None
    """None for a single row, and for measures that are not a mean over queries."""

    def __str__(self) -> str:
        """Return for example 0.643 [0.598, 0.687]."""
        text = f"{self.value:.3f}"
        return text if self.interval is None else f"{text} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


class Measured(NamedTuple):
    """A measure's value, and how to compute it for resamples."""

    value: float
    statistic: bootstrap.Statistic | None


def choose_measures(names: Sequence[str], kinds: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the measures of each kind of task: those named, or else its `DEFAULT_MEASURES`.

    Raises:
        MissingExtraError: a package that computes them is not installed.
        DataError: a measure fits none of these kinds.
    """
    for kind in kinds:
        _import(_COMPUTED_BY[kind])
    kind_of = {name: kind for kind in ("classification", "similarity") for name in DEFAULT_MEASURES[kind]}
    for name in names:
        if kind_of.get(name, "ranking") not in kinds:
            known = "; ".join(f"{kind}: {', '.join(DEFAULT_MEASURES[kind])}" for kind in sorted(kinds))
            raise DataError(f"measure {name!r} does not fit the data; expected measures of {known}")
    return {
        kind: tuple(name for name in names if kind_of.get(name, "ranking") == kind) or DEFAULT_MEASURES[kind]
        for kind in kinds
    }


def with_intervals(
    measured: Mapping[str, Mapping[str, Measured]], rows: int, seed: int
) -> dict[str, dict[str, Figure]]:
    """Turn {score: {measure: Measured}} into figures with intervals, all from the same resamples of rows.

    Raises:
        DataError: a value is NaN or infinite.
    """
    for by_name in measured.values():
        for name, found in by_name.items():
            if not math.isfinite(found.value):
                raise DataError(f"{name} is {found.value} for these data; expected a measure that is defined for them")
    statistics = {
        (score, name): found.statistic
        for score, by_name in measured.items()
        for name, found in by_name.items()
        if found.statistic is not None
    }
    found_intervals = bootstrap.intervals(statistics, rows, seed)
    return {
        score: {name: Figure(found.value, found_intervals.get((score, name))) for name, found in by_name.items()}
        for score, by_name in measured.items()
    }


class RankingMeasures:
    """Measures rankings against judgements; every judged document counts in the ideal ranking, ranked or not.

    Args:
        names: measures that ir-measures knows.
        qrels: for every query, document id -> grade.

    Raises:
        MissingExtraError: ir-measures is not installed.
        DataError: a measure is not known, or ir-measures cannot compute it here.
    """

    def __init__(self, names: Sequence[str], qrels: Sequence[Mapping[str, int]]) -> None:
        ir_measures = _import("ir_measures")
        try:
            self._measures = [ir_measures.parse_measure(name) for name in names]
            for measure in self._measures:
                # raises if a parameter is missing or of another type
                str(measure)
                # trec_eval would end the process
                if measure.params.get("cutoff", 1) < 1:
                    raise ValueError(f"{measure} has a cutoff below 1")
            judged = {str(query): dict(grades) for query, grades in enumerate(qrels)}
            self._evaluator = ir_measures.evaluator(self._measures, judged)
        except (NameError, SyntaxError, ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise DataError(
                f"a measure of {', '.join(names)} is not known to ir-measures: {error}; expected names such as "
                "nDCG@10, RR@10, P@5 or AP, in exactly this spelling"
            ) from error
        self._count = len(qrels)

    def __call__(self, rankings: Sequence[Ranking]) -> dict[str, Measured]:
        """Measure every query's ranking.

        Raises:
            DataError: a measure is undefined for these data.
        """
        run = {str(query): dict(ranking) for query, ranking in enumerate(rankings)}
        try:
            result = self._evaluator.calc(run)
        except (ArithmeticError, ValueError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            names = ", ".join(map(str, self._measures))
            raise DataError(f"ir-measures cannot compute one of {names} for these data: {error}") from error
        rows = {measure: np.full(self._count, np.nan) for measure in self._measures}
        for metric in result.per_query:
            rows[metric.measure][int(metric.query_id)] = metric.value
        mean = _import("ir_measures.measures").MeanAgg
        return {
            str(measure): Measured(
                float(result.aggregated[measure]),
                bootstrap.mean(rows[measure]) if isinstance(measure.aggregator(), mean) else None,
            )
            for measure in self._measures
        }


def measure_classes(names: Sequence[str], gold: np.ndarray, predicted: np.ndarray) -> dict[str, Measured]:
    """Measure predicted class numbers (n,) against the right ones (n,).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = _import("sklearn.metrics")
    found = {
        "accuracy": Measured(
            float(metrics.accuracy_score(gold, predicted)), bootstrap.mean((gold == predicted).astype(np.float64))
        ),
        "macro-F1": Measured(
            float(metrics.f1_score(gold, predicted, average="macro")), bootstrap.macro_f1(gold, predicted)
        ),
    }
    return {name: found[name] for name in names}


def measure_similarity(names: Sequence[str], scores: np.ndarray, targets: np.ndarray) -> dict[str, Measured]:
    """Measure the correlation of scores (n,) and targets (n,); it is 0 where all scores are the same.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    stats = _import("scipy.stats")

    def correlate(function: Callable[..., Any]) -> float:
        return float(function(scores, targets).statistic) if np.ptp(scores) > 0 else 0.0

    found = {
        "Pearson": Measured(correlate(stats.pearsonr), bootstrap.pearson(scores, targets)),
        "Spearman": Measured(correlate(stats.spearmanr), bootstrap.spearman(scores, targets)),
    }
    return {name: found[name] for name in names}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"evaluation needs the extra: pip install 'mixencoder[eval]' ({error})") from error
