"""One interaction layer against the same layer over standard attention."""

from benchmarks.cases import layers
from benchmarks.replay import cases


@cases(layers.CASES)
def bench_layers(stage, benchmark, case, contender):
    stage.play(benchmark, case, contender)
