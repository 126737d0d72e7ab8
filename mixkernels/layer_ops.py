"""The door to the rest of the interaction layer: residual + LayerNorm, gate + LayerNorm, and the scoring head.

Matrix products stay with the vendor's library; these operators are what stands between them (docs/design.md, section
1). Everything a caller can get wrong is found here, before any work; backends trust what they are given.

Without gradients a call is one PyTorch operator of the library ``mixkernels``, so torch.compile sees through it by its
fake implementation. Gradients: reference and torch are differentiable expressions, Triton has an autograd.Function.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from mixkernels.dispatch import checks_on_gpu, load, select_backend
from mixkernels.errors import BackendError, DeviceError, DtypeError, ShapeError
from mixkernels.ranking import LARGEST_ID
from mixkernels.reference import layer as reference_layer
from mixkernels.torch_backend import layer as torch_layer

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WIDEST_TRITON = 4096
# by name rather than through `load`: torch.compile does not trace an import
_DIFFERENTIABLE = {"reference": reference_layer, "torch": torch_layer}


class TopK(NamedTuple):
    """The best candidates of every query: what `score_candidates` returns with top_k, and takes as `running`."""

    scores: Tensor
    """(B, n), best first, float32 (float64 for float64); n is top_k, or all candidates seen if they are fewer."""
    ids: Tensor
    """(B, n) int64, numbers of the candidates; equal scores stand by rising id."""


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-12, backend: str | None = None
) -> Tensor:
    """Return ``LN(x + residual)``, in one pass over both (docs/design.md, section 1: LN1 and LN2 of a layer).

    Args:
        x: (..., d). float32, float16, bfloat16 or float64 (reference and torch only).
        residual: as x, or what expands to x's shape, such as the pool that all queries meet; it is never expanded in
            memory. It shares x's dtype (autocast casts both). Leading dimensions may have any strides.
        weight, bias: (d,), in the dtype of x or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, the reference excepted.

    Returns:
        (..., d), contiguous, in x's dtype. Sum and statistics are float32 (float64 for float64). Finite inputs give
        finite results unless a square itself overflows float32. Differentiable once in all four tensors.

    Raises:
        ShapeError: sizes that must agree do not.
        DtypeError: a dtype is not supported, or inputs do not share one.
        DeviceError: the inputs lie on different devices.
        BackendError: no backend can run this call; the message lists every backend with every reason.
    """
    tensors = _checked("x", {"x": x, "residual": residual}, weight, bias)
    x, residual = tensors["x"], _expanded("residual", tensors["residual"], "x", tensors["x"])
    name = _select("residual_layer_norm", backend, x, residual, weight, bias)
    if _needs_grad(x, residual, weight, bias):
        if name == "triton":
            return _ResidualLayerNorm.apply(x, residual, weight, bias, float(eps))
        return _DIFFERENTIABLE[name].residual_layer_norm(x, residual, weight, bias, eps=eps)
    return _RESIDUAL_LAYER_NORM(x, residual, weight, bias, float(eps), name)


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
        gate: (..., d). Logits of the gate, ``W_g [g ; u ; h]``, as the matrix products left them.
        update: u, (..., d), of gate's shape.
        state: h, of gate's shape or what expands to it. None is the zero state before the first layer.
        weight, bias: (d,), in the dtype of update or in float32.
        eps: added to the variance.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, the reference excepted.

    Returns:
        (..., d), contiguous, in the dtype that gate, update and state share (autocast casts them). Sigmoid, mix and
        statistics are float32 (float64 for float64). Differentiable once in all five tensors.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as `residual_layer_norm`.
    """
    tensors = _checked("update", {"gate": gate, "update": update, "state": state}, weight, bias)
    gate, update, state = tensors["gate"], tensors["update"], tensors.get("state")
    if gate.shape != update.shape:
        raise ShapeError(f"gate has shape {tuple(gate.shape)}; expected {tuple(update.shape)}, the shape of update")
    if state is not None:
        state = _expanded("state", state, "update", update)
    inputs = (update, gate, weight, bias) if state is None else (update, gate, weight, bias, state)
    name = _select("gate_layer_norm", backend, *inputs)
    if _needs_grad(*inputs):
        if name == "triton":
            return _GateLayerNorm.apply(gate, update, state, weight, bias, float(eps))
        return _DIFFERENTIABLE[name].gate_layer_norm(gate, update, state, weight, bias, eps=eps)
    return _GATE_LAYER_NORM(gate, update, state, weight, bias, float(eps), name)


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
    neither E nor h is written. With top_k not even the scores are, but the best alone, so that candidates stream
    through in chunks and memory stays that of a chunk and of top_k:

        >>> best = None
        >>> for start in range(0, len(pool), chunk):
        ...     best = score_candidates(*layer(pool[start : start + chunk]), weight, bias, top_k=10, running=best,
        ...                             first_id=start)

    Args:
        context: FFN outputs of the context rows, (B, N, k, d), or (N, k, d) for one query; k >= 1. float32, float16,
            bfloat16 or float64 (reference and torch only).
        context_residual: what LN2 adds to them, E', of context's shape or what expands to it.
        state: FFN outputs of the state rows, (B, N, d) or (N, d).
        state_residual: h', of state's shape or what expands to it.
        weight, bias: (d,), of LN2, in the inputs' dtype or in float32.
        eps: added to the variance.
        additive: (B, N), or what expands to it, (N,) for one query: a floating score added to each candidate's.
        top_k: how many to keep. None returns all scores.
        running: the result of the chunks before, merged into this one's. Needs top_k. Ids must not repeat.
        first_id: id of this call's first candidate; the others follow. Ids run from 0 to 2^32 - 1.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, the reference excepted.

    Returns:
        Scores (B, N), or (N,), float32 (float64 for float64); differentiable once in all tensors. With top_k,
        TopK(scores, ids), (B, n) or (n,), best first, ties to the lower id, -0.0 tied with 0.0; n is top_k, or all
        candidates seen so far if they are fewer. A NaN score comes first, ahead of +inf, and stays NaN: it cannot
        pass for a poor candidate. Finite inputs give finite scores unless a square itself overflows float32.

        A candidate's score has the same bits whatever N, its place, chunking and neighbours on the torch backend.

    Raises:
        ShapeError: sizes that must agree do not, or a number or an id is out of range.
        DtypeError: a dtype is not supported, or inputs do not share one.
        DeviceError: the inputs lie on different devices.
        BackendError: no backend can run this call, or top_k was asked for where gradients are recorded.
    """
    named = {
        "context": context,
        "context_residual": context_residual,
        "state": state,
        "state_residual": state_residual,
    }
    named = _checked("state", named, weight, bias)
    context, state = named["context"], named["state"]
    if context.dim() not in (3, 4) or context.shape[-2] < 1:
        raise ShapeError(f"context has shape {tuple(context.shape)}; expected (B, N, k, d) or (N, k, d), k at least 1")
    if state.shape != context.shape[:-2] + context.shape[-1:]:
        raise ShapeError(
            f"state has shape {tuple(state.shape)}; expected {tuple(context.shape[:-2] + context.shape[-1:])}, because "
            f"context has {tuple(context.shape)}"
        )
    context_residual = _expanded("context_residual", named["context_residual"], "context", context)
    state_residual = _expanded("state_residual", named["state_residual"], "state", state)
    additive = _checked_additive(additive, state)
    _check_ranking(top_k, running, first_id, state)
    rows = (context, context_residual, state, state_residual, weight, bias)
    inputs = rows if additive is None else (*rows, additive)
    # the dtype and device of state decide
    name = _select("score_candidates", backend, state, *inputs)

    single = context.dim() == 3
    if single:
        rows = (*(tensor.unsqueeze(0) for tensor in rows[:4]), weight, bias)
        additive = None if additive is None else additive.unsqueeze(0)
    needs_grad = _needs_grad(*inputs)
    if top_k is None:
        if not needs_grad:
            scores = _SCORE_CANDIDATES(*rows, additive, float(eps), name)
        elif name == "triton":
            scores = _ScoreCandidates.apply(*rows, float(eps))
            scores = scores if additive is None else scores + additive.float()
        else:
            scores = _DIFFERENTIABLE[name].score_candidates(*rows, eps=eps, additive=additive)
        return scores.squeeze(0) if single else scores
    if needs_grad:
        raise BackendError(
            "top_k is for inference, but an input requires a gradient; call under torch.no_grad(), or leave top_k out "
            "to differentiate the scores"
        )
    running_scores, running_ids = (None, None) if running is None else running
    if single and running is not None:
        running_scores, running_ids = running_scores.unsqueeze(0), running_ids.unsqueeze(0)
    scores, ids = _SCORE_TOP_K(*rows, additive, running_scores, running_ids, float(eps), top_k, first_id, name)
    return TopK(scores.squeeze(0), ids.squeeze(0)) if single else TopK(scores, ids)


def _checked(leader: str, rows: dict[str, Tensor | None], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the tensors of rows, under autocast cast, after checks of kinds, devices, dtypes and d."""
    if leader == "update":
        # the gate alone may lack a state
        rows = {name: tensor for name, tensor in rows.items() if tensor is not None or name != "state"}
    everything = {**rows, "weight": weight, "bias": bias}
    for name, tensor in everything.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    device = rows[leader].device
    for name, tensor in everything.items():
        if tensor.device != device:
            raise DeviceError(f"{name} is on {tensor.device} but {leader} is on {device}; move them to one device")
    if torch.is_autocast_enabled(device.type):
        target = torch.get_autocast_dtype(device.type)
        rows = {name: t if t.dtype == torch.float64 else t.to(target) for name, t in rows.items()}
    dtype = rows[leader].dtype
    if dtype not in _DTYPES:
        raise DtypeError(f"{leader} has dtype {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    for name, tensor in rows.items():
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype} but {leader} has {dtype}; rows share one dtype")
    if rows[leader].dim() == 0 or rows[leader].shape[-1] < 1:
        raise ShapeError(f"{leader} has shape {tuple(rows[leader].shape)}; expected (..., d) with d at least 1")
    width = rows[leader].shape[-1]
    allowed = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype not in allowed:
            raise DtypeError(
                f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dict.fromkeys(allowed)))}"
            )
        if tensor.shape != (width,):
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({width},), because {leader} has "
                f"{tuple(rows[leader].shape)}"
            )
    return rows


def _expanded(name: str, tensor: Tensor, other: str, like: Tensor) -> Tensor:
    """Return a view of the tensor in the shape of `like`: the pool that all queries meet has stride 0 over them."""
    if tensor.shape == like.shape:
        return tensor
    fits = 1 <= tensor.dim() <= like.dim() and tensor.shape[-1] == like.shape[-1]
    pairs = zip(reversed(tensor.shape), reversed(like.shape), strict=False)
    if not fits or any(size not in (1, target) for size, target in pairs):
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}, the shape of {other}, or what "
            "expands to it"
        )
    return tensor.expand(like.shape)


def _checked_additive(additive: Tensor | None, state: Tensor) -> Tensor | None:
    if additive is None:
        return None
    if not isinstance(additive, Tensor) or not additive.is_floating_point():
        found = additive.dtype if isinstance(additive, Tensor) else type(additive).__name__
        raise DtypeError(f"additive is {found}; expected a floating torch.Tensor")
    if additive.device != state.device:
        raise DeviceError(f"additive is on {additive.device} but state is on {state.device}; move them to one device")
    expected = state.shape[:-1]
    pairs = zip(reversed(additive.shape), reversed(expected), strict=False)
    if additive.dim() > len(expected) or any(size not in (1, target) for size, target in pairs):
        raise ShapeError(
            f"additive has shape {tuple(additive.shape)}; expected {tuple(expected)}, a score a candidate, or what "
            "expands to it"
        )
    return additive.expand(expected)


def _check_ranking(top_k: int | None, running: TopK | None, first_id: int, state: Tensor) -> None:
    if top_k is None:
        if running is not None:
            raise ShapeError("running was given without top_k; expected the number of candidates to keep")
        return
    if not isinstance(top_k, int | torch.SymInt) or isinstance(top_k, bool) or top_k < 1:
        raise ShapeError(f"top_k is {top_k!r}; expected a positive integer or None")
    last_id = first_id + state.shape[-2] - 1
    if first_id < 0 or last_id > LARGEST_ID:
        raise ShapeError(f"ids reach from {first_id} to {last_id}; expected values in 0..{LARGEST_ID}")
    if running is None:
        return
    wide = torch.promote_types(state.dtype, torch.float32)
    for name, tensor, dtype in zip(("scores", "ids"), running, (wide, torch.int64), strict=True):
        if tensor.device != state.device:
            raise DeviceError(
                f"running {name} are on {tensor.device} but state is on {state.device}; move them to one device"
            )
        if tensor.dtype != dtype:
            raise DtypeError(f"running {name} have dtype {tensor.dtype}; expected {dtype}")
        if tensor.shape[:-1] != state.shape[:-2] or tensor.shape != running[0].shape:
            raise ShapeError(
                f"running {name} have shape {tuple(tensor.shape)}; expected {(*state.shape[:-2], 'n')}, scores and ids "
                f"alike, because state has {tuple(state.shape)}"
            )
    # on a GPU a range check would wait for the device
    readable = state.device.type == "cpu" or checks_on_gpu()
    if readable and not torch.compiler.is_compiling() and running[1].numel():
        low, high = (int(bound) for bound in running[1].aminmax())
        if low < 0 or high > LARGEST_ID:
            raise ShapeError(f"running ids reach from {low} to {high}; expected values in 0..{LARGEST_ID}")


def _select(operator: str, backend: str | None, *tensors: Tensor) -> str:
    """Choose the backend; a row of the Triton kernels must fit into one tile."""
    name, width = select_backend(backend, *tensors, operator=operator), tensors[0].shape[-1]
    if name != "triton" or width <= _WIDEST_TRITON:
        return name
    if backend != "triton" and os.environ.get("MIXKERNELS_BACKEND") != "triton":
        return "torch"
    raise BackendError(
        f'backend "triton" cannot run this call: hidden size {width} is more than {_WIDEST_TRITON}. All backends: '
        f'"triton": hidden size {width} is more than {_WIDEST_TRITON}; "torch": can run it; "reference": can run it'
    )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _ResidualLayerNorm(torch.autograd.Function):
    """Triton's backward: one gradient serves x and residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, residual, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return _RESIDUAL_LAYER_NORM(x, residual, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = _RESIDUAL_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, dbias.to(ctx.bias_dtype), None


class _GateLayerNorm(torch.autograd.Function):
    """Triton's backward of `gate_layer_norm`."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(gate, update, state, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return _GATE_LAYER_NORM(gate, update, state, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        has_state = ctx.saved_tensors[2] is not None
        dgate, dupdate, dstate, dweight, dbias = _GATE_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
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
        return _SCORE_CANDIDATES(*rows, None, eps, "triton")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dcontext, dstate, dweight, dbias = _SCORE_CANDIDATES_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dcontext, dcontext, dstate, dstate, dweight, dbias.to(ctx.saved_tensors[5].dtype), None


def _define(name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator of the library and return its overload, which costs less to call than a look-up each time."""
    qualified = f"mixkernels::{name}"
    torch.library.define(qualified, signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default")(run)
    torch.library.register_fake(qualified)(fake)
    return getattr(torch.ops.mixkernels, name).default


def _contiguous_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _dense(tensor: Tensor) -> Tensor:
    """Every backend reads dense rows, whatever the strides between them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _run_residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    return load(backend, "layer").residual_layer_norm(
        _dense(x), _dense(residual), weight.contiguous(), bias.contiguous(), eps=eps
    )


def _run_gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> Tensor:
    state = None if state is None else _dense(state)
    return load(backend, "layer").gate_layer_norm(
        _dense(gate), _dense(update), state, weight.contiguous(), bias.contiguous(), eps=eps
    )


def _run_gate_layer_norm_backward(
    grad: Tensor, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    state = None if state is None else _dense(state)
    dgate, dupdate, dstate, dweight, dbias = load("triton", "layer").gate_layer_norm_backward(
        _dense(grad), _dense(gate), _dense(update), state, weight.contiguous(), eps=eps
    )
    # an operator's outputs are tensors
    return dgate, dupdate, update.new_empty(0) if dstate is None else dstate, dweight, dbias


def _fake_gate_layer_norm_backward(
    grad: Tensor, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    dstate = update.new_empty(0) if state is None else _contiguous_like(state)
    return _contiguous_like(gate), _contiguous_like(update), dstate, _contiguous_like(weight), _contiguous_like(weight)


def _dense_rows(*rows: Tensor) -> tuple[Tensor, ...]:
    return (*(_dense(tensor) for tensor in rows[:4]), *(parameter.contiguous() for parameter in rows[4:]))


def _run_score_candidates(
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
    rows = _dense_rows(context, context_residual, state, state_residual, weight, bias)
    return load(backend, "layer").score_candidates(*rows, eps=eps, additive=additive)


def _run_score_top_k(
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
    rows = _dense_rows(context, context_residual, state, state_residual, weight, bias)
    return load(backend, "layer").score_top_k(
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
    shape = (state.shape[0], torch.sym_min(top_k, total))
    return _empty_scores(state, *shape), state.new_empty(shape, dtype=torch.int64)


_ROWS = "Tensor context, Tensor context_residual, Tensor state, Tensor state_residual, Tensor weight, Tensor bias"

_RESIDUAL_LAYER_NORM = _define(
    "residual_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    _run_residual_layer_norm,
    lambda x, *_: _contiguous_like(x),
)
_RESIDUAL_LAYER_NORM_BACKWARD = _define(
    "residual_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, residual, weight, eps: load("triton", "layer").residual_layer_norm_backward(
        _dense(grad), _dense(x), _dense(residual), weight.contiguous(), eps=eps
    ),
    lambda grad, x, residual, weight, eps: (_contiguous_like(x), _contiguous_like(weight), _contiguous_like(weight)),
)
_GATE_LAYER_NORM = _define(
    "gate_layer_norm",
    "(Tensor gate, Tensor update, Tensor? state, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    _run_gate_layer_norm,
    lambda gate, update, *_: _contiguous_like(update),
)
_GATE_LAYER_NORM_BACKWARD = _define(
    "gate_layer_norm_backward",
    "(Tensor grad, Tensor gate, Tensor update, Tensor? state, Tensor weight, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_gate_layer_norm_backward,
    _fake_gate_layer_norm_backward,
)
_SCORE_CANDIDATES = _define(
    "score_candidates",
    f"({_ROWS}, Tensor? additive, float eps, str backend) -> Tensor",
    _run_score_candidates,
    lambda context, context_residual, state, *_: _empty_scores(state, *state.shape[:-1]),
)
_SCORE_CANDIDATES_BACKWARD = _define(
    "score_candidates_backward",
    f"(Tensor grad, {_ROWS}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *inputs: load("triton", "layer").score_candidates_backward(
        grad, *_dense_rows(*inputs[:-1]), eps=inputs[-1]
    ),
    lambda grad, context, context_residual, state, state_residual, weight, bias, eps: (
        _contiguous_like(context),
        _contiguous_like(state),
        _contiguous_like(weight),
        _contiguous_like(weight),
    ),
)
_SCORE_TOP_K = _define(
    "score_top_k",
    f"({_ROWS}, Tensor? additive, Tensor? running_scores, Tensor? running_ids, float eps, SymInt top_k,"
    " SymInt first_id, str backend) -> (Tensor, Tensor)",
    _run_score_top_k,
    _fake_score_top_k,
)


@register_flop_formula([torch.ops.mixkernels.score_candidates, torch.ops.mixkernels.score_top_k])
def _score_flops(context_shape: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Dot products alone: PyTorch's counter counts products, of which the LayerNorms have none."""
    batch, num_candidates, _k, width = context_shape
    return 2 * batch * num_candidates * width


@register_flop_formula(torch.ops.mixkernels.score_candidates_backward)
def _score_backward_flops(grad_shape: tuple[int, ...], context_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Gradients of both sides of the dot products, as for a product."""
    return 2 * _score_flops(context_shape)
