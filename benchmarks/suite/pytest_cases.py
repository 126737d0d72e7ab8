"""Cases under pytest-benchmark: one test per contender, whose table shows the same samples as the record.

A case runs once, all its contenders in turns, at the first of its tests. Every test then shows pytest-benchmark the
contender's samples, by a clock that returns recorded times.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from benchmarks.gpu.attention import Bench, Group
from benchmarks.measuring.peaks import best_peaks
from benchmarks.suite.case import Case, Outcome, run_until_quiet
from benchmarks.suite.gpu import GpuCase, run_gpu_case


class RecordedClock:
    """A timer for pytest-benchmark, which reads it before and after each round: it returns recorded times."""

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Set the seconds of the next rounds."""
        self._times = iter([moment for seconds in samples for moment in (0.0, seconds)])

    def __call__(self) -> float:
        """Return the time."""
        return next(self._times)


CLOCK = RecordedClock()


def cases(found: Iterable[Case]) -> Callable[[Callable], Callable]:
    """Decorate a benchmark function: one test for every contender of every case."""
    parameters = [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=[pytest.mark.long] if case.long else [])
        for case in found
        for name in case.contenders
    ]
    parametrised = pytest.mark.parametrize(("case", "contender"), parameters)
    return lambda function: pytest.mark.benchmark(timer=CLOCK)(parametrised(function))


class CaseRunner:
    """Runs the cases of a session, and adds to `skipped` what does not run here."""

    def __init__(self, skipped: list[dict[str, Any]]) -> None:
        self._skipped = skipped
        self._found: tuple[Case, Outcome | BaseException] | None = None

    def run(self, benchmark: Any, case: Case, contender: str) -> None:
        """Run the case, if it has not run yet, and show the samples of a contender.

        Raises:
            AssertionError: this contender's result was wrong or another's; the case has no ratios then.
        """
        if reason := case.unavailable(contender):
            self._skipped.append(skipped_entry(case, contender, reason))
            pytest.skip(reason)
        if self._found is None or self._found[0] is not case:
            try:
                self._found = case, run_until_quiet(case)
                best_peaks(str(case.dtype).removeprefix("torch."), remeasure=True)
            except Exception as error:
                self._found = case, error
        outcome = self._found[1]
        if isinstance(outcome, BaseException):
            raise outcome
        if reason := outcome.refused.get(contender):
            self._skipped.append(skipped_entry(case, contender, reason) | {"refused": True})
            pytest.skip(reason)
        show_samples(benchmark, f"{case.group}: {case.name}", contender, outcome.samples[contender])
        benchmark.extra_info.update(outcome.records[contender])


class GpuCaseRunner:
    """Runs the cases of operators on a GPU."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._found: tuple[GpuCase, Group] | None = None

    def run(self, benchmark: Any, case: GpuCase, contender: str) -> None:
        """Run the case, if it has not run yet, and show the median of a contender."""
        if self._found is None or self._found[0] is not case:
            self._found = case, run_gpu_case(case, self._bench)
        group = self._found[1]
        record = next((record for record in group.records if record["backend"] == contender), None)
        if record is None:
            pytest.skip(next(entry["reason"] for entry in group.skipped if entry["backend"] == contender))
        show_samples(benchmark, f"gpu: {case.name}", contender, [record["seconds"]])
        benchmark.extra_info.update(record)


def show_samples(benchmark: Any, group: str, name: str, samples: Sequence[float]) -> None:
    """Give samples to pytest-benchmark as if it had taken them."""
    benchmark.group, benchmark.name = group, name
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))


def skipped_entry(case: Case, contender: str, reason: str) -> dict[str, Any]:
    """Entry of a file of results for a contender without a record."""
    return {
        "group": case.group,
        "operator": case.operator,
        "variant": case.variant,
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": contender,
        "reason": reason,
    }
