"""Ranking N candidates, from a query's text to the best ten, against every other architecture."""

from benchmarks.cases import end_to_end
from benchmarks.replay import cases


@cases(end_to_end.CASES)
def bench_end_to_end(stage, benchmark, case, contender):
    stage.play(benchmark, case, contender)
