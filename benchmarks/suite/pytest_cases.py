"""Cases under pytest-benchmark: one test a contender, whose table shows the very samples that the record is made of.

A case runs once, all its contenders in turns, when the first of its tests asks for it; each test then replays what was
measured, through a clock that tells it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from benchmarks.gpu.attention import Bench, Group
from benchmarks.measuring.peaks import best_peaks
from benchmarks.suite.case import Case, Outcome, run_quietly
from benchmarks.suite.gpu import GpuCase, run_gpu_case


class ReplayClock:
    """A timer for pytest-benchmark: asked before and after each round, it tells a time that was measured before."""

    def __init__(self) -> None:
        self._times: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Take the seconds of the rounds to come."""
        self._times = iter([moment for seconds in samples for moment in (0.0, seconds)])

    def __call__(self) -> float:
        """Tell the time."""
        return next(self._times)


CLOCK = ReplayClock()


def cases(found: Iterable[Case]) -> Callable[[Callable], Callable]:
    """Make a benchmark function a test for every contender of every case."""
    parameters = [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=[pytest.mark.long] if case.long else [])
        for case in found
        for name in case.contenders
    ]
    parametrised = pytest.mark.parametrize(("case", "contender"), parameters)
    return lambda function: pytest.mark.benchmark(timer=CLOCK)(parametrised(function))


class Stage:
    """Runs cases for a session, and notes in `skipped` what does not run here."""

    def __init__(self, skipped: list[dict[str, Any]]) -> None:
        self._skipped = skipped
        self._found: tuple[Case, Outcome | BaseException] | None = None

    def play(self, benchmark: Any, case: Case, contender: str) -> None:
        """Run the case, or take what was found, and replay a contender's part.

        Raises:
            AssertionError: a result was wrong, this contender's or another's: a case has no ratios then.
        """
        if reason := case.unavailable(contender):
            self._skipped.append(skipped_entry(case, contender, reason))
            pytest.skip(reason)
        if self._found is None or self._found[0] is not case:
            try:
                self._found = case, run_quietly(case)
                best_peaks(str(case.dtype).removeprefix("torch."), look_again=True)
            except Exception as error:
                self._found = case, error
        outcome = self._found[1]
        if isinstance(outcome, BaseException):
            raise outcome
        if reason := outcome.refused.get(contender):
            self._skipped.append(skipped_entry(case, contender, reason) | {"refused": True})
            pytest.skip(reason)
        replay(benchmark, f"{case.group}: {case.name}", contender, outcome.samples[contender])
        benchmark.extra_info.update(outcome.records[contender])


class GpuStage:
    """The same for the operators on a GPU."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._found: tuple[GpuCase, Group] | None = None

    def play(self, benchmark: Any, case: GpuCase, contender: str) -> None:
        """Run the case, or take what was found, and replay a contender's median."""
        if self._found is None or self._found[0] is not case:
            self._found = case, run_gpu_case(case, self._bench)
        group = self._found[1]
        record = next((record for record in group.records if record["backend"] == contender), None)
        if record is None:
            pytest.skip(next(entry["reason"] for entry in group.skipped if entry["backend"] == contender))
        replay(benchmark, f"gpu: {case.name}", contender, [record["seconds"]])
        benchmark.extra_info.update(record)


def replay(benchmark: Any, group: str, name: str, samples: Sequence[float]) -> None:
    """Give pytest-benchmark samples as if it had taken them."""
    benchmark.group, benchmark.name = group, name
    CLOCK.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))


def skipped_entry(case: Case, contender: str, reason: str) -> dict[str, Any]:
    """What a file of results says of a contender without a record."""
    return {
        "group": case.group,
        "operator": case.operator,
        "variant": case.variant,
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "backend": contender,
        "reason": reason,
    }
