"""The public operators of the rest of the interaction layer: residual + LayerNorm, gate + LayerNorm, and scoring.

Matrix products are left to the vendor's library; these operators are the steps between them (docs/design.md, section
1). All arguments are checked here, before any work (`mixkernels.layer.checks`); backends check nothing.

Without gradients a call is one PyTorch operator (`mixkernels.layer.registration`). Gradients: reference and torch are
differentiable expressions, Triton has an autograd.Function.
"""

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixkernels.dispatch import select_backend
from mixkernels.errors import BackendError, ShapeError
from mixkernels.layer import reference as reference_layer
from mixkernels.layer import torch_operators as torch_layer
from mixkernels.layer.checks import check_ranking, checked_additive, checked_rows, expanded
from mixkernels.layer.registration import (
    GATE_LAYER_NORM,
    GATE_LAYER_NORM_BACKWARD,
    RESIDUAL_LAYER_NORM,
    RESIDUAL_LAYER_NORM_BACKWARD,
    SCORE_CANDIDATES,
    SCORE_CANDIDATES_BACKWARD,
    SCORE_TOP_K,
)
from mixkernels.tensors import needs_grad

# modules, not `mixkernels.dispatch.implementation`: torch.compile does not trace an import
_DIFFERENTIABLE = {"reference": reference_layer, "torch": torch_layer}


class TopK(NamedTuple):
    """The best candidates of every query: what `score_candidates` returns with top_k, and takes as `running`."""

    scores: Tensor
    """(B, n), best first, float32 (float64 for float64); n is top_k, or all candidates seen if they are fewer."""
    ids: Tensor
    """(B, n) int64, ids of the candidates; equal scores are in ascending order of id."""


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-12, backend: str | None = None
) -> Tensor:
    """Return ``LN(x + residual)``, in one pass over both (docs/design.md, section 1: LN1 and LN2 of a layer).

    Args:
        x: (..., d). float32, float16, bfloat16 or float64 (reference and torch only).
        residual: of x's shape or a shape that expands to it, such as a pool shared by all queries; it is never expanded
            in memory. It has x's dtype (autocast casts both). Leading dimensions may have any strides.
        weight, bias: (d,), in the dtype of x or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.

    Returns:
        (..., d), contiguous, in x's dtype. Sum and statistics are float32 (float64 for float64). Finite inputs give
        finite results unless a square itself overflows float32. Differentiable once in all four tensors.

    Raises:
        ShapeError: sizes that must agree do not.
        DtypeError: a dtype is not supported, or inputs do not share one.
        DeviceError: the inputs are on different devices.
        BackendError: no backend can run this call; the message lists every backend with every reason.
    """
    tensors = checked_rows("x", {"x": x, "residual": residual}, weight, bias)
    x, residual = tensors["x"], expanded("residual", tensors["residual"], "x", tensors["x"])
    name = select_backend(backend, x, residual, weight, bias, operator="residual_layer_norm")
    if needs_grad(x, residual, weight, bias):
        if name == "triton":
            return _ResidualLayerNorm.apply(x, residual, weight, bias, float(eps))
        return _DIFFERENTIABLE[name].residual_layer_norm(x, residual, weight, bias, eps=eps)
    return RESIDUAL_LAYER_NORM(x, residual, weight, bias, float(eps), name)


def gate_layer_norm(
    gate: Tensor,
    update: Tensor,
    state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    """Return ``LN(z*u + (1-z)*h)`` with ``z = sigmoid(gate)``, in one pass (docs/design.md, section 1: h').

    Args:
        gate: (..., d). Logits of the gate, ``W_g [g ; u ; h]``, before the sigmoid.
        update: u, (..., d), of gate's shape.
        state: h, of gate's shape or a shape that expands to it. None is the zero state before the first layer.
        weight, bias: (d,), in the dtype of update or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.

    Returns:
        (..., d), contiguous, in the dtype that gate, update and state share (autocast casts them). Sigmoid, mix and
        statistics are float32 (float64 for float64). Differentiable once in all five tensors.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as `residual_layer_norm`.
    """
    given = {"gate": gate, "update": update} if state is None else {"gate": gate, "update": update, "state": state}
    tensors = checked_rows("update", given, weight, bias)
    gate, update, state = tensors["gate"], tensors["update"], tensors.get("state")
    if gate.shape != update.shape:
        raise ShapeError(f"gate has shape {tuple(gate.shape)}; expected {tuple(update.shape)}, the shape of update")
    if state is not None:
        state = expanded("state", state, "update", update)
    inputs = (update, gate, weight, bias) if state is None else (update, gate, weight, bias, state)
    name = select_backend(backend, *inputs, operator="gate_layer_norm")
    if needs_grad(*inputs):
        if name == "triton":
            return _GateLayerNorm.apply(gate, update, state, weight, bias, float(eps))
        return _DIFFERENTIABLE[name].gate_layer_norm(gate, update, state, weight, bias, eps=eps)
    return GATE_LAYER_NORM(gate, update, state, weight, bias, float(eps), name)


@overload
def score_candidates(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = ...,
    additive: Tensor | None = ...,
    top_k: None = ...,
    running: None = ...,
    first_id: int = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def score_candidates(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = ...,
    additive: Tensor | None = ...,
    top_k: int,
    running: TopK | None = ...,
    first_id: int = ...,
    backend: str | None = ...,
) -> TopK: ...


def score_candidates(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    additive: Tensor | None = None,
    top_k: int | None = None,
    running: TopK | None = None,
    first_id: int = 0,
    backend: str | None = None,
) -> Tensor | TopK:
    """Score candidates from the last layer's FFN: ``h . mean over k of E``, with E and h after their LN2.

    ``E = LN2(context + context_residual)``, ``h = LN2(state + state_residual)``, score = row sum of h * e, in one pass:
    neither E nor h is written. With top_k only the best scores are written, so that candidates can be scored in chunks,
    in the memory of one chunk and of top_k results:

        >>> best = None
        >>> for start in range(0, len(pool), chunk):
        ...     best = score_candidates(*layer(pool[start : start + chunk]), weight, bias, top_k=10, running=best,
        ...                             first_id=start)

    Args:
        context: FFN outputs of the context rows, (B, N, k, d), or (N, k, d) for one query; k >= 1. float32, float16,
            bfloat16 or float64 (reference and torch only).
        context_residual: what LN2 adds to them, E', of context's shape or a shape that expands to it.
        state: FFN outputs of the state rows, (B, N, d) or (N, d).
        state_residual: h', of state's shape or a shape that expands to it.
        weight, bias: (d,), of LN2, in the inputs' dtype or in float32.
        eps: added to the variance.
        additive: (B, N) or a shape that expands to it, (N,) for one query: floating numbers added to the scores.
        top_k: how many candidates to keep. None returns all scores.
        running: the result for the chunks before, merged with this one's. Needs top_k. Ids must not repeat.
        first_id: id of this call's first candidate; the others follow. Ids run from 0 to 2^32 - 1.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.

    Returns:
        Scores (B, N), or (N,), float32 (float64 for float64); differentiable once in all tensors. With top_k,
        TopK(scores, ids), (B, n) or (n,), best first, ties to the lower id, -0.0 tied with 0.0; n is top_k, or all
        candidates seen so far if they are fewer. A NaN score comes first, ahead of +inf, and stays NaN: it cannot
        pass for a poor candidate. Finite inputs give finite scores unless a square itself overflows float32.

        On the torch backend a candidate's score has the same bits for every N, position, chunking and neighbours.

    Raises:
        ShapeError: sizes that must agree do not, or a number or an id is out of range.
        DtypeError: a dtype is not supported, or inputs do not share one.
        DeviceError: the inputs are on different devices.
        BackendError: no backend can run this call, or top_k was given while gradients are recorded.
    """
    named = {
        "context": context,
        "context_residual": context_residual,
        "state": state,
        "state_residual": state_residual,
    }
    named = checked_rows("state", named, weight, bias)
    context, state = named["context"], named["state"]
    if context.dim() not in (3, 4) or context.shape[-2] < 1:
        raise ShapeError(f"context has shape {tuple(context.shape)}; expected (B, N, k, d) or (N, k, d), k at least 1")
    if state.shape != context.shape[:-2] + context.shape[-1:]:
        raise ShapeError(
            f"state has shape {tuple(state.shape)}; expected {tuple(context.shape[:-2] + context.shape[-1:])}, because "
            f"context has {tuple(context.shape)}"
        )
    context_residual = expanded("context_residual", named["context_residual"], "context", context)
    state_residual = expanded("state_residual", named["state_residual"], "state", state)
    additive = checked_additive(additive, state)
    check_ranking(top_k, running, first_id, state)
    rows = (context, context_residual, state, state_residual, weight, bias)
    inputs = rows if additive is None else (*rows, additive)
    # the dtype and device of state decide
    name = select_backend(backend, state, *inputs, operator="score_candidates")

    single = context.dim() == 3
    if single:
        rows = (*(tensor.unsqueeze(0) for tensor in rows[:4]), weight, bias)
        additive = None if additive is None else additive.unsqueeze(0)
    recorded = needs_grad(*inputs)
    if top_k is None:
        if not recorded:
            scores = SCORE_CANDIDATES(*rows, additive, float(eps), name)
        elif name == "triton":
            scores = _ScoreCandidates.apply(*rows, float(eps))
            scores = scores if additive is None else scores + additive.float()
        else:
            scores = _DIFFERENTIABLE[name].score_candidates(*rows, eps=eps, additive=additive)
        return scores.squeeze(0) if single else scores
    if recorded:
        raise BackendError(
            "top_k is for inference, but an input requires a gradient; call under torch.no_grad(), or leave top_k out "
            "to differentiate the scores"
        )
    running_scores, running_ids = None, None
    if running is not None:
        running_scores, running_ids = (tensor.unsqueeze(0) for tensor in running) if single else running
    scores, ids = SCORE_TOP_K(*rows, additive, running_scores, running_ids, float(eps), top_k, first_id, name)
    return TopK(scores.squeeze(0), ids.squeeze(0)) if single else TopK(scores, ids)


class _ResidualLayerNorm(torch.autograd.Function):
    """Triton's backward: one gradient serves x and residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, residual, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return RESIDUAL_LAYER_NORM(x, residual, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = RESIDUAL_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, dbias.to(ctx.bias_dtype), None


class _GateLayerNorm(torch.autograd.Function):
    """Triton's backward of `gate_layer_norm`."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(gate, update, state, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return GATE_LAYER_NORM(gate, update, state, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        has_state = ctx.saved_tensors[2] is not None
        dgate, dupdate, dstate, dweight, dbias = GATE_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dgate, dupdate, dstate if has_state else None, dweight, dbias.to(ctx.bias_dtype), None


class _ScoreCandidates(torch.autograd.Function):
    """Triton's backward of `score_candidates` without top_k; the additive score is added outside."""

    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        context_residual: Tensor,
        state: Tensor,
        state_residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        rows = (context, context_residual, state, state_residual, weight, bias)
        ctx.save_for_backward(*rows)
        ctx.eps = eps
        return SCORE_CANDIDATES(*rows, None, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dcontext, dstate, dweight, dbias = SCORE_CANDIDATES_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dcontext, dcontext, dstate, dstate, dweight, dbias.to(ctx.saved_tensors[5].dtype), None
