"""The candidate index on disk: build, open, update, rank."""

from benchmarks.cases import index
from benchmarks.replay import cases


@cases(index.CASES)
def bench_index(stage, benchmark, case, contender):
    stage.play(benchmark, case, contender)
