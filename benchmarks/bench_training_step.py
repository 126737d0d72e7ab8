"""One step of in-batch training, forward and backward: a pool of N candidates that B queries meet.

The pool form against the same step through SDPA over expanded keys and through a plain einsum that does not expand.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import interleaved_medians, peak_bytes
from mixkernels import candidate_attention, not_supported_reasons
from mixkernels.devices import measured_cpu_peaks
from mixkernels.roofline import candidate_attention_backward_cost, candidate_attention_cost

B, N, K, M, HEADS, HEAD_DIM = 64, 64, 1, 64, 12, 64
OURS = ["torch", "triton"]
Step = Callable[[], tuple[Tensor, ...]]


@cache
def leaves_and_grads() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The six inputs, which want gradients, and the gradients of context and state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, K, HEADS, HEAD_DIM)] * 3 + [(N, HEADS, HEAD_DIM)] + [(B, M, HEADS, HEAD_DIM)] * 2
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grads = tuple(torch.randn(B, N, *tail, generator=generator) for tail in ((K, HEADS, HEAD_DIM), (HEADS, HEAD_DIM)))
    return leaves, grads


def ours(backend: str) -> tuple[Tensor, Tensor]:
    leaves, _ = leaves_and_grads()
    result = candidate_attention(*leaves, backend=backend)
    return result.context, result.state


def einsum_concatenated() -> tuple[Tensor, Tensor]:
    """Shared and own scores by einsum, concatenated under one softmax."""
    (query, own_key, own_value, state, key, value), _ = leaves_and_grads()
    scale = 1 / math.sqrt(HEAD_DIM)
    shared = torch.einsum("nkhd,bmhd->bnhkm", query, key)
    own = torch.einsum("nkhd,nlhd->nhkl", query, own_key).expand(B, -1, -1, -1, -1)
    probs = (torch.cat([shared, own], dim=-1) * scale).softmax(dim=-1)
    context = torch.einsum("bnhkm,bmhd->bnkhd", probs[..., :M], value)
    context = context + torch.einsum("bnhkl,nlhd->bnkhd", probs[..., M:], own_value)
    probs = (torch.einsum("nhd,bmhd->bnhm", state, key) * scale).softmax(dim=-1)
    return context, torch.einsum("bnhm,bmhd->bnhd", probs, value)


def sdpa_expanded() -> tuple[Tensor, Tensor]:
    """Every pair of query and candidate has keys and values of its own: the query's, and the candidate's."""
    (query, own_key, own_value, state, key, value), _ = leaves_and_grads()

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        pairs = [shared.unsqueeze(1).expand(-1, N, -1, -1, -1), own.unsqueeze(0).expand(B, -1, -1, -1, -1)]
        return torch.cat(pairs, dim=2).flatten(0, 1).transpose(1, 2)

    keys, values = joined(key, own_key), joined(value, own_value)
    rows = query.expand(B, -1, -1, -1, -1).flatten(0, 1).transpose(1, 2)
    context = F.scaled_dot_product_attention(rows, keys, values).transpose(1, 2)
    rows = state.expand(B, -1, -1, -1).flatten(0, 1).unsqueeze(2)
    attended = F.scaled_dot_product_attention(rows, keys[:, :, :M], values[:, :, :M]).squeeze(2)
    return context.unflatten(0, (B, N)), attended.unflatten(0, (B, N))


def step(forward: Callable[[], tuple[Tensor, Tensor]]) -> Step:
    leaves, grads = leaves_and_grads()
    return lambda: torch.autograd.grad(forward(), leaves, grads)


FORWARDS = {
    "torch": lambda: ours("torch"),
    "triton": lambda: ours("triton"),
    "sdpa-expanded": sdpa_expanded,
    "einsum-concatenated": einsum_concatenated,
}


def unavailable(contender: str) -> str | None:
    if contender == "triton":
        return "triton: " + ", ".join(not_supported_reasons("triton") or ["see benchmarks/gpu.py for a GPU's figures"])
    return None


@cache
def medians() -> dict[str, float]:
    """Seconds of every contender's step, checked against einsum's gradients."""
    steps = {name: step(forward) for name, forward in FORWARDS.items() if not unavailable(name)}
    want = steps["einsum-concatenated"]()
    for name, call in steps.items():
        for got, exact in zip(call(), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    return interleaved_medians(steps, seconds=2.0, least=3, most=15)


@pytest.mark.parametrize("contender", list(FORWARDS))
def bench_training_step(benchmark, contender):
    if reason := unavailable(contender):
        pytest.skip(reason)
    benchmark.group = f"training step B={B} N={N} k={K} m={M} H={HEADS} D={HEAD_DIM} float32"
    times = medians()
    call = step(FORWARDS[contender])
    benchmark.pedantic(call, rounds=1)
    shape = (N, K, M, HEADS, HEAD_DIM, torch.float32)
    cost = candidate_attention_cost(*shape, batch=B).and_then(candidate_attention_backward_cost(*shape, batch=B))
    rivals = {name: seconds for name, seconds in times.items() if name not in OURS}
    rival = min(rivals, key=rivals.get)
    benchmark.extra_info.update(
        shape={"B": B, "N": N, "k": K, "m": M, "H": HEADS, "D": HEAD_DIM},
        dtype="float32",
        device="cpu",
        backend=contender,
        bytes=cost.bytes,
        flops=cost.flops,
        seconds=times[contender],
        fraction_of_limit=cost.seconds(measured_cpu_peaks()) / times[contender],
        peak_bytes=peak_bytes(call),
        rival=rival,
        ratio=times[rival] / times[contender],
        ratios={name: seconds / times[contender] for name, seconds in rivals.items()},
    )
