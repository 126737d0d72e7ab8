"""Time what a call of every operator costs the host: ``python -m benchmarks.measuring.host_cost``.

Kernels are replaced by ones whose launch does nothing, so neither a GPU nor the interpreter is needed, and what is left
is this library's own Python and the memory of the results. PyTorch's own attention on the same tiny tensors is timed in
turns with them, as a measure of the machine. TRITON_INTERPRET must not be set.
"""

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

_CALLS = 200
_ROUNDS = 41


class _Compiled:
    """A compiled kernel whose launch does nothing."""

    function, packed_metadata, n_regs = 0, (), 128

    def __init__(self) -> None:
        self.launches = 0

    def run(self, *arguments: Any) -> None:
        self.launches += 1


class _Kernel:
    """A kernel in place of a compiled one; its first launch goes by way of Triton's launcher, as everywhere."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names, self.compiled, self.bound = kernel.arg_names, _Compiled(), 0

    def __getitem__(self, grid: Any) -> Callable[..., _Compiled]:
        def launch(*arguments: Any, **options: Any) -> _Compiled:
            self.bound += 1
            return self.compiled

        return launch


def stubbed(stack: Any) -> list[_Kernel]:
    """Replace what touches a GPU while `stack` (an ExitStack) is open; tensors on the CPU then pass for a GPU's."""
    from mixkernels.attention import triton_forward
    from mixkernels.layer import triton_layer_norm, triton_scoring
    from mixkernels.triton_common import launching, support

    kernels = []
    for module, name in (
        (triton_forward, "candidate_attention_fwd_short_kernel"),
        (triton_forward, "candidate_attention_fwd_streamed_kernel"),
        (triton_layer_norm, "residual_layer_norm_fwd_kernel"),
        (triton_layer_norm, "gate_layer_norm_fwd_kernel"),
        (triton_scoring, "score_candidates_fwd_kernel"),
    ):
        kernels.append(_Kernel(getattr(module, name)))
        stack.enter_context(mock.patch.object(module, name, kernels[-1]))
    stack.enter_context(mock.patch.object(triton_forward, "one_wave", return_value=264))
    stack.enter_context(mock.patch.object(support, "interpreting", return_value=True))
    # as cheap as the calls that they replace, which a Mock is not
    stack.enter_context(mock.patch.object(launching, "_is_current", _always))
    stack.enter_context(mock.patch.object(launching, "_stream", _no_stream))
    return kernels


def _always(device: torch.device) -> bool:
    return True


def _no_stream(device: torch.device) -> int:
    return 0


def calls() -> dict[str, Callable[[], object]]:
    """Return a call of every operator on tiny tensors, and of PyTorch's attention as "sdpa"."""
    from mixkernels import candidate_attention, gate_layer_norm, residual_layer_norm, score_candidates

    half, heads, dim, m = torch.bfloat16, 2, 16, 8
    context = [torch.randn(8, 1, heads, dim, dtype=half) for _ in range(3)]
    state = torch.randn(8, heads, dim, dtype=half)
    key, value = (torch.randn(1, m, heads, dim, dtype=half) for _ in range(2))
    rows, others, states = (torch.randn(8, 32, dtype=half) for _ in range(3))
    wide, wide_others = (torch.randn(8, 1, 32, dtype=half) for _ in range(2))
    weight, bias = torch.ones(32), torch.zeros(32)
    # (1, H, rows, D)
    query = context[0].view(1, 8, heads, dim).transpose(1, 2)
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    return {
        "candidate_attention": lambda: candidate_attention(*context, state, key, value, backend="triton"),
        "residual_layer_norm": lambda: residual_layer_norm(rows, others, weight, bias, backend="triton"),
        "gate_layer_norm": lambda: gate_layer_norm(rows, others, states, weight, bias, backend="triton"),
        "score_candidates": lambda: score_candidates(wide, wide_others, rows, others, weight, bias, backend="triton"),
        "sdpa": lambda: F.scaled_dot_product_attention(query, keys, values),
    }


def host_costs() -> dict[str, float]:
    """Return the seconds of a call by operator: medians over rounds in which all take turns."""
    from contextlib import ExitStack

    with ExitStack() as stack, torch.no_grad():
        kernels = stubbed(stack)
        every = calls()
        for call in every.values():
            for _ in range(3):
                call()
        times: dict[str, list[float]] = {name: [] for name in every}
        for _ in range(_ROUNDS):
            for name, call in every.items():
                begin = time.perf_counter()
                for _ in range(_CALLS):
                    call()
                times[name].append((time.perf_counter() - begin) / _CALLS)
        # the calls timed launched a kernel directly
        assert sum(kernel.bound for kernel in kernels) == len(every) - 1
    return {name: median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    print(json.dumps(host_costs()))
