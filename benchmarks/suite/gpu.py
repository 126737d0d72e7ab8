"""The operators on a GPU: a few important shapes of ``python -m benchmarks.gpu``, which measures all (docs/gpu.md).

Timed by `benchmarks.gpu.attention`, whose records hold medians.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.attention import (
    BF16,
    KEY_SHAPES,
    QUICK,
    TRAINING_SHAPES,
    Bench,
    Group,
    Shape,
    Workload,
    attention_workload,
    measure,
    training_workload,
)
from benchmarks.gpu.formulations import BATCH_RIVALS, eager_rivals
from benchmarks.gpu.layer import LAYER_OPERATORS, LAYER_SIZES, layer_workload

OWN = "triton"


class GpuCase(NamedTuple):
    """One operator at one shape."""

    name: str
    contenders: tuple[str, ...]
    make: Callable[[Bench], Workload]
    gradients: bool = False


def _attention(shape: Shape, dtype: torch.dtype) -> GpuCase:
    def make(bench: Bench) -> Workload:
        return attention_workload(bench, shape, dtype, eager_rivals())

    return GpuCase(f"candidate_attention {shape}", (OWN, *eager_rivals()), make)


def _step(shape: Shape) -> GpuCase:
    make = partial(training_workload, shape=shape, dtype=BF16, forward_too=True, compile_too=False)
    return GpuCase(f"candidate_attention training step {shape}", (OWN, *BATCH_RIVALS), make, gradients=True)


def _layer(operator: str, n: int, d: int) -> GpuCase:
    make = partial(layer_workload, name=operator, n=n, d=d, dtype=BF16, compile_too=False)
    return GpuCase(f"{operator} N={n} d={d}", (OWN, "pytorch"), make)


CASES = (
    *(_attention(shape, dtype) for shape, dtype in KEY_SHAPES[:QUICK]),
    _step(TRAINING_SHAPES[0]),
    *(_layer(operator, *LAYER_SIZES[0]) for operator in LAYER_OPERATORS),
)


def run_gpu_case(case: GpuCase, bench: Bench) -> Group:
    """Time all contenders; the group holds a record of each that ran, and reasons for the others."""
    group = Group("suite", bench)
    with torch.set_grad_enabled(case.gradients):
        measure(group, case.make(bench))
    return group
