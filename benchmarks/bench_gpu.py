"""The operators on a GPU, where there is one; ``python -m benchmarks.gpu`` measures more shapes and rivals."""

import pytest

from benchmarks.cases.gpu import CASES
from benchmarks.replay import CLOCK

PARAMETERS = [
    pytest.param(case, name, id=f"{case.name}-{name}", marks=pytest.mark.gpu)
    for case in CASES
    for name in case.contenders
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "contender"), PARAMETERS)
def bench_gpu(gpu_stage, benchmark, case, contender):
    gpu_stage.play(benchmark, case, contender)
