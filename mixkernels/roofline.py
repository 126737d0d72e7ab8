"""What an operator must cost: bytes, FLOPs and exponentials as functions of shape, and what a device can do at best.

Used by benchmarks and tests alike, so that a claim and its limit come from one place. Time is bounded below by the
largest of bytes / bandwidth, FLOPs / product rate and exponentials / exponential rate.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """What a device does at best, per second."""

    flops: float
    bytes: float
    exps: float


class Cost(NamedTuple):
    """What a call must do at least, everything read and written once."""

    flops: int
    bytes: int
    exps: int

    def seconds(self, peaks: Peaks) -> float:
        """Least time on a device: the slowest of its three limits, perfectly overlapped."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bytes, self.exps / peaks.exps)


def candidate_attention_cost(
    num_candidates: int,
    num_context: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    has_state: bool = True,
) -> Cost:
    """Cost of `mixkernels.candidate_attention` for a pool of candidates that all queries meet.

    FLOPs: 4 D for every row and shared key, and for every context row and own key. Bytes: queries, own keys and values
    and shared keys and values read once, outputs written once; log-sum-exps are left out. Exponentials: one a logit.
    """
    rows_context = num_candidates * num_context
    rows = rows_context + (num_candidates if has_state else 0)
    logits = batch * num_heads * (rows * num_keys + rows_context * num_context)
    elements = rows + 2 * rows_context + batch * (2 * num_keys + rows)
    return Cost(flops=4 * head_dim * logits, bytes=elements * num_heads * head_dim * dtype.itemsize, exps=logits)


@cache
def measured_cpu_peaks(dtype: torch.dtype = torch.float32) -> Peaks:
    """Measure this CPU with PyTorch's own operators at the present number of threads: half a second, then remembered.

    A large product for FLOPs, a copy out of cache for bytes (read and written counted), exp in cache for exponentials.
    """
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    source = torch.randn(16 * 2**20)
    target = torch.empty_like(source)
    logits = torch.randn(2**16)
    out = torch.empty_like(logits)
    return Peaks(
        flops=2 * 1024**3 / _best_seconds(lambda: torch.mm(a, b)),
        bytes=2 * source.nbytes / _best_seconds(lambda: target.copy_(source)),
        exps=logits.numel() / _best_seconds(lambda: torch.exp(logits, out=out)),
    )


def _best_seconds(call: Callable[[], object], *, repeats: int = 15) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
