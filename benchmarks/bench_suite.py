"""The suite under pytest-benchmark: a function for each group of cases; `benchmarks.suite` says what they are."""

import pytest

from benchmarks.suite import end_to_end, gpu, index, layers, operators
from benchmarks.suite.pytest_cases import CLOCK, cases


@cases(operators.CASES)
def bench_operators(stage, benchmark, case, contender):
    """Operators of mixkernels against their standard formulations: forward, backward, training step."""
    stage.play(benchmark, case, contender)


@cases(layers.CASES)
def bench_layers(stage, benchmark, case, contender):
    """One interaction layer against the same layer over standard attention."""
    stage.play(benchmark, case, contender)


@cases(end_to_end.CASES)
def bench_end_to_end(stage, benchmark, case, contender):
    """Ranking N candidates, from a query's text to the best ten, against every other architecture."""
    stage.play(benchmark, case, contender)


@cases(index.CASES)
def bench_index(stage, benchmark, case, contender):
    """The candidate index on disk: build, open, update, rank."""
    stage.play(benchmark, case, contender)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in gpu.CASES for name in case.contenders],
)
def bench_gpu(gpu_stage, benchmark, case, contender):
    """The operators on a GPU, where there is one; ``python -m benchmarks.gpu`` measures more shapes and rivals."""
    gpu_stage.play(benchmark, case, contender)
