"""The GPU benchmark's groups besides attention: the rest of the layer, and the host time of calls."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.attention import (
    BF16,
    COMPILED_SECONDS,
    Bench,
    Group,
    Shape,
    Workload,
    free,
    measure,
    relative_error,
)
from benchmarks.gpu.formulations import Batch, Call
from benchmarks.gpu.records import group_records
from benchmarks.measuring.gpu_timing import Timing, captured, host_seconds_of, reason
from benchmarks.measuring.provenance import Record
from mixkernels import candidate_attention, gate_layer_norm, residual_layer_norm, score_candidates
from mixkernels.roofline import (
    Cost,
    candidate_attention_cost,
    gate_layer_norm_cost,
    residual_layer_norm_cost,
    score_candidates_cost,
)

_EPS = 1e-12
_CHECKED = 64

# -- the rest of the layer ---------------------------------------------------------------------------------------------

LAYER_SIZES = ((100_000, 768), (1_000_000, 384), (100_000, 384), (1000, 768))
TOP_K = 10


def plain_residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LN(x + residual) in plain PyTorch."""
    return F.layer_norm(x + residual, weight.shape, weight, bias, _EPS)


def plain_gate_layer_norm(gate: Tensor, update: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LN of a gated mix in plain PyTorch."""
    return F.layer_norm(torch.lerp(state, update, gate.sigmoid()), weight.shape, weight, bias, _EPS)


def plain_score_candidates(
    context: Tensor, context_residual: Tensor, state: Tensor, state_residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of candidates in plain PyTorch, and the best of them."""
    pooled = plain_residual_layer_norm(context, context_residual, weight, bias).mean(-2)
    hidden = plain_residual_layer_norm(state, state_residual, weight, bias)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scores, ids = (hidden * pooled).sum(-1, dtype=wide).topk(TOP_K)
    return scores, ids


class LayerOperator(NamedTuple):
    """One operator of the rest of the layer, and its plain PyTorch form."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    """Shapes of the inputs before weight and bias, for N candidates (k = 1) of width d."""
    cost: Callable[[int, int, torch.dtype], Cost]


def _score(*tensors: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    return tuple(score_candidates(*tensors, top_k=TOP_K, backend=backend))


LAYER_OPERATORS: Mapping[str, LayerOperator] = {
    "residual_layer_norm": LayerOperator(
        residual_layer_norm,
        plain_residual_layer_norm,
        # context rows and state row of every candidate
        lambda n, d: [(2 * n, d)] * 2,
        lambda n, d, dtype: residual_layer_norm_cost(2 * n, d, dtype),
    ),
    "gate_layer_norm": LayerOperator(
        gate_layer_norm, plain_gate_layer_norm, lambda n, d: [(n, d)] * 3, gate_layer_norm_cost
    ),
    "score_candidates": LayerOperator(
        _score,
        plain_score_candidates,
        lambda n, d: [(n, 1, d)] * 2 + [(n, d)] * 2,
        lambda n, d, dtype: score_candidates_cost(n, 1, d, dtype, top_k=TOP_K),
    ),
}


def layer_workload(bench: Bench, name: str, n: int, d: int, dtype: torch.dtype, *, compile_too: bool) -> Workload:
    """One operator of the layer against plain PyTorch, eager and compiled."""
    operator = LAYER_OPERATORS[name]
    cost = operator.cost(n, d, dtype)
    shapes = [*operator.shapes(n, d), (d,), (d,)]

    def draw() -> tuple[Tensor, ...]:
        generator = torch.Generator(str(bench.device)).manual_seed(0)
        return tuple(torch.randn(shape, generator=generator, device=bench.device).to(dtype) for shape in shapes)

    functions = {bench.backend: partial(operator.ours, backend=bench.backend), "pytorch": operator.plain}
    if compile_too:
        functions["pytorch-compiled"] = torch.compile(operator.plain, dynamic=False, fullgraph=True)
    contenders = {label: partial(_applied, function) for label, function in functions.items()}
    inputs = [draw() for _ in range(bench.sets(cost.bytes))]
    return Workload(name, {"N": n, "d": d}, dtype, cost, contenders, inputs, partial(layer_error, name))


def _applied(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Call:
    return partial(function, *tensors)


def layer_error(name: str, result: Any, tensors: tuple[Tensor, ...]) -> float:
    """Distance of a result's first and last rows, or of the best scores, from plain PyTorch in float64."""
    *rows, weight, bias = tensors
    if name == "score_candidates":
        # where scores nearly tie, other candidates may be chosen, but with nearly the same scores
        ids = result[1]
        picked = [row[ids].double() for row in rows]
        pooled = plain_residual_layer_norm(*picked[:2], weight.double(), bias.double()).mean(-2)
        hidden = plain_residual_layer_norm(*picked[2:], weight.double(), bias.double())
        return relative_error([result[0]], [(pooled * hidden).sum(-1)])
    ends = torch.cat([result[:_CHECKED], result[-_CHECKED:]])
    exact = [torch.cat([row[:_CHECKED], row[-_CHECKED:]]).double() for row in rows]
    return relative_error([ends], [LAYER_OPERATORS[name].plain(*exact, weight.double(), bias.double())])


def layer(
    bench: Bench,
    sizes: Sequence[tuple[int, int]] = LAYER_SIZES,
    dtype: torch.dtype = BF16,
    *,
    compile_too: bool = True,
) -> list[Record]:
    """Time the rest of the layer."""
    group = Group("layer", bench)
    for (n, d), name in product(sizes[:1] if bench.quick else sizes, LAYER_OPERATORS):
        if not group.has_time(COMPILED_SECONDS / 2, name, {"N": n, "d": d}, dtype):
            continue
        torch.compiler.reset()
        with torch.no_grad():
            try:
                work = layer_workload(bench, name, n, d, dtype, compile_too=compile_too)
            except torch.OutOfMemoryError as error:
                group.skip(name, {"N": n, "d": d}, dtype, "all", f"inputs: {reason(error)}")
                free()
                continue
            measure(group, work)
            del work
    group.save(complete=True)
    return group.records


# -- the host ----------------------------------------------------------------------------------------------------------

HOST_SHAPE = Shape(64, 1, 16, 64)


def host_calls(bench: Bench, shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """Calls on tiny inputs, by what they measure: this library's and PyTorch's own operator."""
    batch = Batch.random(1, shape.n, shape.k, shape.m, shape.h, shape.d, dtype, str(bench.device))
    leaves = batch.tensors()
    plain = tuple(t.detach() for t in leaves)
    query, key, value = (t.transpose(1, 2) for t in (plain[3].unsqueeze(0), *plain[4:]))
    width = shape.h * shape.d
    rows, weight, bias = plain[3].reshape(-1, width), *torch.ones(2, width, dtype=dtype, device=bench.device)
    # tensors of their own, as in a layer
    others, states = rows.clone(), rows.clone()
    contexts, own = plain[0].reshape(-1, shape.k, width), bench.backend
    other_contexts = contexts.clone()
    return {
        "candidate_attention": {
            own: lambda: candidate_attention(*plain),
            "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        },
        "candidate_attention with gradients": {own: lambda: candidate_attention(*leaves)},
        "residual_layer_norm": {
            own: lambda: residual_layer_norm(rows, others, weight, bias),
            "pytorch": lambda: plain_residual_layer_norm(rows, others, weight, bias),
        },
        "gate_layer_norm": {
            own: lambda: gate_layer_norm(rows, others, states, weight, bias),
            "pytorch": lambda: plain_gate_layer_norm(rows, others, states, weight, bias),
        },
        "score_candidates": {
            own: lambda: _score(contexts, other_contexts, rows, others, weight, bias),
            "pytorch": lambda: plain_score_candidates(contexts, other_contexts, rows, others, weight, bias),
        },
    }


def host(bench: Bench, shape: Shape = HOST_SHAPE, dtype: torch.dtype = BF16, *, calls: int = 200) -> list[Record]:
    """Measure the host time of calls, and of replaying a CUDA graph of one call."""
    group = Group("host", bench)
    cost = candidate_attention_cost(*shape[:3], shape.h, shape.d, dtype)
    measured = host_calls(bench, shape, dtype)
    if bench.device.type == "cuda":
        with torch.no_grad():
            graph = captured(measured["candidate_attention"][bench.backend])
        measured["replayed graph"] = {bench.backend: graph.replay}
    for name, contenders in measured.items():
        # grad mode costs host time: it is off unless it is measured
        with torch.set_grad_enabled(name.endswith("gradients")):
            taken = {label: host_seconds_of(call, bench.device, calls=calls) for label, call in contenders.items()}
        timings = {label: Timing(seconds, 0.0, seconds, calls) for label, seconds in taken.items()}
        found = group_records(
            bench.machine,
            timings,
            operator=f"host: {name}",
            own=bench.backend,
            shape=shape.names(),
            dtype=dtype,
            cost=cost,
            peaks_of={},
            output_bytes=0,
            errors={},
        )
        group.records += found
        print(", ".join(f"host: {name} {label} {seconds * 1e6:.1f} us" for label, seconds in taken.items()), flush=True)
        group.save(complete=False)
    group.save(complete=True)
    return group.records
