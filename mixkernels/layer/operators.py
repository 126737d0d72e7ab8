"""The public operators of the rest of the interaction layer: residual + LayerNorm, gate + LayerNorm, and scoring.

Matrix products are left to the vendor's library; these operators are the steps between them (docs/design.md, section
1). All arguments are checked here, before any work (`mixkernels.layer.checks`); backends check nothing.

Without gradients a call is one PyTorch operator (`mixkernels.layer.registration`). Gradients: reference and torch are
differentiable expressions, Triton has an autograd.Function.
"""

from typing import Any, NamedTuple, overload

from torch import Tensor

from mixkernels.layer.checks import check_ranking
from mixkernels.layer.planning import (
    GATE_NAMES,
    GATE_PLANS,
    RESIDUAL_NAMES,
    RESIDUAL_PLANS,
    SCORE_PLANS,
    plan_gate,
    plan_residual,
    plan_scores,
)
from mixkernels.outputs import check_apart


class TopK(NamedTuple):
    """The best candidates of every query: what `score_candidates` returns with top_k, and takes as `running`."""

    scores: Tensor
    """(B, n), best first, float32 (float64 for float64); n is top_k, or all candidates seen if they are fewer."""
    ids: Tensor
    """(B, n) int64, ids of the candidates; equal scores are in ascending order of id."""


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``LN(x + residual)``, in one pass over both (docs/design.md, section 1: LN1 and LN2 of a layer).

    Args:
        x: (..., d). float32, float16, bfloat16 or float64 (reference and torch only).
        residual: of x's shape or a shape that expands to it, such as a pool shared by all queries; it is never expanded
            in memory. It has x's dtype (autocast casts both). Leading dimensions may have any strides.
        weight, bias: (d,), in the dtype of x or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.
        out: where to write the result, of its shape and dtype, with any strides and without gradients; it shares no
            memory with the inputs.

    Returns:
        (..., d), contiguous unless it is `out`, in x's dtype. Sum and statistics are float32 (float64 for float64).
        Finite inputs give finite results unless a square itself overflows float32. Differentiable once in all four
        tensors.

    Raises:
        ShapeError: sizes that must agree do not.
        DtypeError: a dtype is not supported, or inputs do not share one.
        DeviceError: the inputs are on different devices.
        BackendError: no backend can run this call; the message lists every backend with every reason.
    """
    given = (x, residual, weight, bias)
    run, form = RESIDUAL_PLANS.find((*given, out), backend)
    if run is None:
        run = plan_residual(form, given, backend, out)
    elif out is not None:
        check_apart((out,), given, RESIDUAL_NAMES)
    return run(given, float(eps), out)


def gate_layer_norm(
    gate: Tensor,
    update: Tensor,
    state: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``LN(z*u + (1-z)*h)`` with ``z = sigmoid(gate)``, in one pass (docs/design.md, section 1: h').

    Args:
        gate: (..., d). Logits of the gate, ``W_g [g ; u ; h]``, before the sigmoid.
        update: u, (..., d), of gate's shape.
        state: h, of gate's shape or a shape that expands to it. None is the zero state before the first layer.
        weight, bias: (d,), in the dtype of update or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.
        out: as for `residual_layer_norm`.

    Returns:
        (..., d), contiguous unless it is `out`, in the dtype that gate, update and state share (autocast casts them).
        Sigmoid, mix and statistics are float32 (float64 for float64). Differentiable once in all five tensors.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as `residual_layer_norm`.
    """
    given = (gate, update, state, weight, bias)
    run, form = GATE_PLANS.find((*given, out), backend)
    if run is None:
        run = plan_gate(form, given, backend, out)
    elif out is not None:
        check_apart((out,), given, GATE_NAMES)
    return run(given, float(eps), out)


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
    out: Tensor | None = ...,
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
    out: TopK | None = ...,
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
    out: Tensor | TopK | None = None,
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
        out: where to write the scores, or with top_k the scores and ids: of the result's shapes and dtypes, with any
            strides and without gradients, sharing no memory with the inputs.

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
    given = (context, context_residual, state, state_residual, weight, bias, additive)
    into: tuple[Any, ...] = (out,) if top_k is None or out is None else tuple(out)
    before = () if running is None else tuple(running)
    run = form = None
    if (top_k is None or type(top_k) is int) and type(first_id) is int:
        # a kernel takes ids in 32 or 64 bits
        run, form = SCORE_PLANS.find((*given, *into, *before), backend, top_k, first_id >= 2**31, len(into))
    if run is None:
        run = plan_scores(form, given, backend, top_k, running, first_id, out)
    else:
        check_ranking(top_k, running, first_id, state)
        if out is not None:
            check_apart(into, (*given, *before))
    result = run(given, before, float(eps), first_id, out)
    return result if top_k is None else TopK(*result)
