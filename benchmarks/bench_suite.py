"""The suite under pytest-benchmark: one function per group of cases; `benchmarks.suite` defines the cases."""

import pytest

from benchmarks.suite import end_to_end, gpu, index, layers, operators
from benchmarks.suite.pytest_cases import CLOCK, cases


@cases(operators.CASES)
def bench_operators(runner, benchmark, case, contender):
    """Operators of mixkernels against their standard formulations: forward, backward, training step."""
    runner.run(benchmark, case, contender)


@cases(layers.CASES)
def bench_layers(runner, benchmark, case, contender):
    """One interaction layer against the same layer over standard attention."""
    runner.run(benchmark, case, contender)


@cases(end_to_end.CASES)
def bench_end_to_end(runner, benchmark, case, contender):
    """Ranking N candidates, from a query's text to the best ten, against every other architecture."""
    runner.run(benchmark, case, contender)


@cases(index.CASES)
def bench_index(runner, benchmark, case, contender):
    """The candidate index on disk: build, open, update, rank."""
    runner.run(benchmark, case, contender)


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "contender"),
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in gpu.CASES for name in case.contenders],
)
def bench_gpu(gpu_runner, benchmark, case, contender):
    """The operators on a GPU, where there is one; ``python -m benchmarks.gpu`` measures more shapes and rivals."""
    gpu_runner.run(benchmark, case, contender)
