"""Operators of mixkernels against their standard formulations: forward, backward, training step."""

from benchmarks.cases import operators
from benchmarks.replay import cases


@cases(operators.CASES)
def bench_operators(stage, benchmark, case, contender):
    stage.play(benchmark, case, contender)
