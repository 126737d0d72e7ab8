"""The PyTorch operators under `mixkernels.layer.operators`: schemas, fake implementations and FLOP formulas.

Each is an operator of the library ``mixkernels``, so that torch.compile, CUDA graphs and FlopCounterMode support it.
Nothing is checked here; only `mixkernels.layer.operators` calls these.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixkernels.dispatch import implementation
from mixkernels.namespace import NAMESPACE
from mixkernels.tensors import dense_rows

_operators = getattr(torch.ops, NAMESPACE)


def _define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator of the library and return its overload, which saves a look-up at each call."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default")(run)
    torch.library.register_fake(qualified)(fake)
    return getattr(_operators, name).default


def _contiguous_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def run_residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    """Run a checked call on a backend."""
    return implementation("layer", backend, "residual_layer_norm")(
        dense_rows(x), dense_rows(residual), weight.contiguous(), bias.contiguous(), eps=eps
    )


def run_gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    """Run a checked call on a backend."""
    state = None if state is None else dense_rows(state)
    return implementation("layer", backend, "gate_layer_norm")(
        dense_rows(gate), dense_rows(update), state, weight.contiguous(), bias.contiguous(), eps=eps
    )


def _run_gate_layer_norm_backward(
    grad: Tensor, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    state = None if state is None else dense_rows(state)
    dgate, dupdate, dstate, dweight, dbias = implementation("layer", "triton", "gate_layer_norm_backward")(
        dense_rows(grad), dense_rows(gate), dense_rows(update), state, weight.contiguous(), eps=eps
    )
    # an operator must return tensors: an empty one replaces None
    return dgate, dupdate, update.new_empty(0) if dstate is None else dstate, dweight, dbias


def _fake_gate_layer_norm_backward(
    grad: Tensor, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    dstate = update.new_empty(0) if state is None else _contiguous_like(state)
    return _contiguous_like(gate), _contiguous_like(update), dstate, _contiguous_like(weight), _contiguous_like(weight)


def dense_inputs(*rows: Tensor) -> tuple[Tensor, ...]:
    """Return contexts, their residual, states, theirs, weight and bias as backends read them: last dimensions dense."""
    return (*(dense_rows(tensor) for tensor in rows[:4]), *(parameter.contiguous() for parameter in rows[4:]))


def run_score_candidates(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    additive: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """Run a checked call on a backend."""
    rows = dense_inputs(context, context_residual, state, state_residual, weight, bias)
    return implementation("layer", backend, "score_candidates")(*rows, eps=eps, additive=additive)


def run_score_top_k(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    additive: Tensor | None,
    running_scores: Tensor | None,
    running_ids: Tensor | None,
    eps: float,
    top_k: int,
    first_id: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run a checked call on a backend."""
    rows = dense_inputs(context, context_residual, state, state_residual, weight, bias)
    return implementation("layer", backend, "score_top_k")(
        *rows,
        eps=eps,
        additive=additive,
        running_scores=running_scores,
        running_ids=running_ids,
        top_k=top_k,
        first_id=first_id,
    )


def _empty_scores(state: Tensor, *shape: int) -> Tensor:
    return state.new_empty(shape, dtype=torch.promote_types(state.dtype, torch.float32))


def _fake_score_top_k(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    additive: Tensor | None,
    running_scores: Tensor | None,
    running_ids: Tensor | None,
    eps: float,
    top_k: int,
    first_id: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    total = state.shape[1] + (0 if running_scores is None else running_scores.shape[1])
    kept: Any = torch.sym_min(top_k, total)
    return _empty_scores(state, state.shape[0], kept), state.new_empty((state.shape[0], kept), dtype=torch.int64)


_ROWS = "Tensor context, Tensor context_residual, Tensor state, Tensor state_residual, Tensor weight, Tensor bias"

RESIDUAL_LAYER_NORM = _define(
    "residual_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    run_residual_layer_norm,
    lambda x, *_: _contiguous_like(x),
)
RESIDUAL_LAYER_NORM_BACKWARD = _define(
    "residual_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, residual, weight, eps: implementation("layer", "triton", "residual_layer_norm_backward")(
        dense_rows(grad), dense_rows(x), dense_rows(residual), weight.contiguous(), eps=eps
    ),
    lambda grad, x, residual, weight, eps: (_contiguous_like(x), _contiguous_like(weight), _contiguous_like(weight)),
)
GATE_LAYER_NORM = _define(
    "gate_layer_norm",
    "(Tensor gate, Tensor update, Tensor? state, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    run_gate_layer_norm,
    lambda gate, update, *_: _contiguous_like(update),
)
GATE_LAYER_NORM_BACKWARD = _define(
    "gate_layer_norm_backward",
    "(Tensor grad, Tensor gate, Tensor update, Tensor? state, Tensor weight, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_gate_layer_norm_backward,
    _fake_gate_layer_norm_backward,
)
SCORE_CANDIDATES = _define(
    "score_candidates",
    f"({_ROWS}, Tensor? additive, float eps, str backend) -> Tensor",
    run_score_candidates,
    lambda context, context_residual, state, *_: _empty_scores(state, *state.shape[:-1]),
)
SCORE_CANDIDATES_BACKWARD = _define(
    "score_candidates_backward",
    f"(Tensor grad, {_ROWS}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *inputs: implementation("layer", "triton", "score_candidates_backward")(
        grad, *dense_inputs(*inputs[:-1]), eps=inputs[-1]
    ),
    lambda grad, context, context_residual, state, state_residual, weight, bias, eps: (
        _contiguous_like(context),
        _contiguous_like(state),
        _contiguous_like(weight),
        _contiguous_like(weight),
    ),
)
SCORE_TOP_K = _define(
    "score_top_k",
    f"({_ROWS}, Tensor? additive, Tensor? running_scores, Tensor? running_ids, float eps, SymInt top_k,"
    " SymInt first_id, str backend) -> (Tensor, Tensor)",
    run_score_top_k,
    _fake_score_top_k,
)


@register_flop_formula([_operators.score_candidates, _operators.score_top_k])
def _score_flops(context_shape: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Only the dot products: PyTorch's counter counts products, and LayerNorm has none."""
    batch, num_candidates, _k, width = context_shape
    return 2 * batch * num_candidates * width


@register_flop_formula(_operators.score_candidates_backward)
def _score_backward_flops(grad_shape: tuple[int, ...], context_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Gradients of both sides of the dot products, as for a product."""
    return 2 * _score_flops(context_shape)
