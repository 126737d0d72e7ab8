"""candidate_attention, each backend that runs here, against the standard formulations, over N, k, m and precision.

A group of the table is one shape and precision. Ratios come from interleaved rounds of all contenders of a group.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from benchmarks.formulations import RIVALS, Inputs, Result, expand, sdpa_on_expanded
from benchmarks.timing import interleaved_medians, peak_bytes
from mixkernels import candidate_attention, not_supported_reasons
from mixkernels.roofline import candidate_attention_cost, measured_cpu_peaks

HEADS, HEAD_DIM = 12, 64
HEADLINE = (1000, 1, 64)
# (N, k, m)
SHAPES = [HEADLINE, (100, 1, 64), (10_000, 1, 64), (1000, 4, 64), (1000, 1, 16), (1000, 1, 256)]
DTYPES = [torch.float32, torch.bfloat16]
OURS = ["torch", "reference", "triton"]
COMPILED = ["two-pass-compiled", "flex-compiled"]
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def ours(inputs: Inputs, backend: str) -> Result:
    result = candidate_attention(
        inputs.context_query,
        inputs.context_key,
        inputs.context_value,
        inputs.state_query,
        inputs.key.unsqueeze(0),
        inputs.value.unsqueeze(0),
        backend=backend,
    )
    return result.context[0], result.state[0]


def unavailable(contender: str, shape: tuple[int, int, int], dtype: torch.dtype) -> str | None:
    """Why a contender does not run for a shape here."""
    if contender == "triton":
        if not torch.cuda.is_available():
            return "triton: " + ", ".join(not_supported_reasons("triton") or ["interpreted kernels are not timed"])
    elif contender in COMPILED and (shape, dtype) != (HEADLINE, torch.float32):
        return f"{contender}: compiled for the headline alone, compiling takes half a minute"
    elif shape[0] > 1000 and contender == "sdpa-expanded" and dtype != torch.float32:
        return "sdpa-expanded: takes seconds a call, in float32 alone"
    elif contender == "sdpa-pre-expanded" and shape[0] > 1000:
        return "sdpa-pre-expanded: expanded keys and values would take gigabytes"
    elif contender == "flashinfer-cascade":
        return "flashinfer: needs a GPU"
    return None


@cache
def contenders(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], Result]]:
    """Everything that runs for a shape, checked against the reference."""
    inputs = Inputs.random(*shape, HEADS, HEAD_DIM, dtype)
    calls = {name: (lambda name=name: ours(inputs, name)) for name in OURS if not unavailable(name, shape, dtype)}
    calls |= {
        name: (lambda run=run: run(inputs)) for name, run in RIVALS.items() if not unavailable(name, shape, dtype)
    }
    if not unavailable("sdpa-pre-expanded", shape, dtype):
        expanded = expand(inputs)
        calls["sdpa-pre-expanded"] = lambda: sdpa_on_expanded(inputs, *expanded)
    want = ours(Inputs(*(t.double() for t in vars(inputs).values())), "reference")
    for name, call in calls.items():
        for got, exact in zip(call(), want, strict=True):
            error = (got.double() - exact).abs().max().item()
            assert error < ALLOWED_ERROR[dtype], f"{name} is off by {error}"
    return calls


@cache
def medians(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    with torch.inference_mode():
        return interleaved_medians(contenders(shape, dtype))


@pytest.mark.parametrize("contender", [*OURS, "sdpa-pre-expanded", *RIVALS, "flashinfer-cascade"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-k{}-m{}".format(*s))
def bench_candidate_attention(benchmark, shape, dtype, contender):
    if reason := unavailable(contender, shape, dtype):
        pytest.skip(reason)
    n, k, m = shape
    benchmark.group = f"candidate_attention N={n} k={k} m={m} H={HEADS} D={HEAD_DIM} {str(dtype)[6:]}"
    call = contenders(shape, dtype)[contender]
    with torch.inference_mode():
        times = medians(shape, dtype)
        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
        peak = peak_bytes(call)
    cost = candidate_attention_cost(n, k, m, HEADS, HEAD_DIM, dtype)
    # a processor without bfloat16 products computes them in float32: that is its limit
    native = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    limit = cost.seconds(measured_cpu_peaks(dtype if native else torch.float32))
    rivals = {name: time for name, time in times.items() if name not in OURS}
    rival = min(rivals, key=rivals.get)
    benchmark.extra_info.update(
        shape={"N": n, "k": k, "m": m, "H": HEADS, "D": HEAD_DIM},
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        backend=contender,
        bytes=cost.bytes,
        flops=cost.flops,
        seconds=times[contender],
        fraction_of_limit=limit / times[contender],
        peak_bytes=peak,
        rival=rival,
        ratio=times[rival] / times[contender],
        ratios={name: time / times[contender] for name, time in rivals.items()},
    )
