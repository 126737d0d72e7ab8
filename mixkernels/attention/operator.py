"""The public operator `candidate_attention`: checks, choice of a backend, PyTorch registration and autograd.

All arguments are checked here, before any work (`mixkernels.attention.checks`); backends check nothing. The operators
``torch.ops.mixkernels.candidate_attention`` and ``..._backward`` have fake implementations and FLOP formulas, so that
torch.compile, CUDA graphs and FlopCounterMode support them; autograd is added outside, by one
`torch.autograd.Function`. The reference is plain PyTorch and uses neither.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from mixkernels.attention.checks import Call, check_values, checked_call, checked_scale, depends_on_values
from mixkernels.dispatch import implementation, select_backend
from mixkernels.errors import ShapeError
from mixkernels.namespace import NAMESPACE
from mixkernels.outputs import check_apart, check_no_gradients, check_out
from mixkernels.plans import Plans
from mixkernels.tensors import dense_rows, needs_grad


class CandidateAttention(NamedTuple):
    """Result of `candidate_attention`; it always has these four fields."""

    context: Tensor
    """(B, N, k, H, D), or (total, k, H, D) with offsets; dtype of the input."""
    state: Tensor | None
    """(B, N, H, D), or (total, H, D) with offsets; dtype of the input; None without a state query."""
    context_lse: Tensor | None
    """(B, N, k, H) or (total, k, H) float32, natural log; None unless ``return_lse``."""
    state_lse: Tensor | None
    """(B, N, H) or (total, H) float32, natural log; None unless ``return_lse``, or without a state query."""


def candidate_attention(
    context_query: Tensor,
    context_key: Tensor | None,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    candidate_offsets: Tensor | None = None,
    own_logits: Tensor | None = None,
    context_scales: tuple[Tensor, Tensor | None, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> CandidateAttention:
    """Let every candidate's context embeddings and state attend to one query's tokens (docs/design.md, section 1).

    A context row attends to the query's m tokens and to its candidate's own k context embeddings under one softmax; a
    state row attends only to the query's tokens. Shared keys are never expanded over candidates, nor a pool over
    queries, forward or backward. Differentiable once in the first six arguments and in own_logits.

    Candidates come in one of five forms:

    ============== ============================ ========================= =================
    form           candidates                   ids, offsets              result
    ============== ============================ ========================= =================
    pool           (N, k, H, D)                                           (B, N, k, H, D)
    per query      (B, N, k, H, D)                                        (B, N, k, H, D)
    gathered       (N, k, H, D)                 ids (B, n)                (B, n, k, H, D)
    ragged         (total, k, H, D)             offsets (B+1,)            (total, k, H, D)
    ragged gather  (N, k, H, D)                 ids (total,), offsets     (total, k, H, D)
    ============== ============================ ========================= =================

    Args:
        context_query, context_key, context_value: the candidates. float32, float16, bfloat16 or float64 (reference and
            torch only); all floating inputs share one dtype (autocast casts them). Or int8 with context_scales.
            context_key is None if own_logits are given.
        state_query: as the contexts, without k; floating. None leaves out the state.
        key, value: (B, m, H, D), m >= 1. Keys and values of the query's tokens, as the backbone's own layer projected
            them.
        key_lengths: (B,) integers in 0..m. Tokens beyond a query's length are ignored. None: all m are valid.
        candidate_ids: integers, the candidates' numbers in the pool, in any order; repeats are allowed.
        candidate_offsets: (B+1,) integers from 0 to total; the candidates of query b are rows offsets[b] to
            offsets[b+1].
        own_logits: (..., k, k, H) float32: logits of a candidate's context rows with its own keys, already scaled;
            dimensions are row, own key, head. They replace context_key.
        context_scales: (query, key, value), each (..., k, H) float32: int8 numbers times these are the candidates.
            key is None if context_key is. On Triton for inference only; other backends give gradients too.
        scale: factor of the dot products. None: 1 / sqrt(D).
        return_lse: also return the log-sum-exp of every row's logits.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, never the reference.
        out: (context, state) to write the results into, with any strides and without gradients; state None without a
            state query. They may lie row by row between each other, but not between the inputs.

    Lengths, offsets and ids are range-checked on CPU. On a GPU the check waits for the device, so it only runs with
    MIXKERNELS_CHECKS=1.

    Returns:
        CandidateAttention(context, state, context_lse, state_lse), outputs in the input's dtype (that of key for int8
        candidates), the log-sum-exps float32, natural log. A row with no valid key is zero, its log-sum-exp -inf.
        No candidates give empty results. Softmax and accumulation are float32 (float64 for float64).

    Raises:
        ShapeError: sizes that must agree do not, or an index is out of range.
        DtypeError: a dtype is not supported, or inputs do not share one, or an argument is missing.
        DeviceError: the inputs are on different devices.
        BackendError: no backend can run this call; the message lists every backend with every reason.
    """
    tensors = (
        context_query,
        context_key,
        context_value,
        state_query,
        key,
        value,
        key_lengths,
        candidate_ids,
        candidate_offsets,
        own_logits,
    )
    scales = _NOTHING if context_scales is None else context_scales
    into = _NOTHING[:2] if out is None else out
    plan = form = None
    if type(scales) is type(into) is tuple:
        optional = (*scales, *into) if context_scales is not None or out is not None else ()
        plan, form = _PLANS.find((*tensors, *optional), backend, bool(return_lse), len(scales))
    if plan is not None:
        known = (*tensors, *scales)
        scale = plan.scale if scale is None else checked_scale(scale)
        if plan.values:
            check_values(Call(*known))
        if out is not None:
            check_apart(into, known, Call._fields)
        return plan.run(known, scale, into)

    call = given = checked_call(*tensors, context_scales=context_scales)
    default = 1.0 / math.sqrt(key.shape[-1])
    scale = default if scale is None else checked_scale(scale)
    call = Call._make(None if tensor is None else dense_rows(tensor) for tensor in call)
    name = select_backend(backend, *(tensor for tensor in call if tensor is not None))
    if out is not None:
        _check_out(call, into)
    if form is None or name == "reference":
        return _dispatched(call, scale, name, bool(return_lse), into)
    run, same = _runner(call, name, bool(return_lse), into)
    if same and all(before is after for before, after in zip(given, call, strict=True)):
        _PLANS.remember(form, _Plan(default, depends_on_values(call), run))
    return run(call, scale, into)


_NOTHING = (None, None, None)
_PLANS = Plans()
_Out = tuple[Tensor | None, Tensor | None]
_Run = Callable[[tuple[Any, ...], float, _Out], CandidateAttention]
"""Takes the tensors of a `Call`."""


class _Plan(NamedTuple):
    """What is decided about calls of one form; see `mixkernels.plans`."""

    scale: float
    """Where the call gives none."""
    values: bool
    """Whether ranges of indices are checked at every call."""
    run: _Run


def _check_out(call: Call, out: tuple[Any, ...]) -> None:
    """Check `out`.

    Raises:
        ShapeError, DtypeError, DeviceError, BackendError: as the message says.
    """
    if len(out) != 2 or (out[1] is None) != (call.state_query is None):
        expected = "(context, None)" if call.state_query is None else "(context, state)"
        raise ShapeError(f"out holds {['None' if t is None else 'a tensor' for t in out]}; expected {expected}")
    k, heads, head_dim = call.context_query.shape[-3:]
    check_out("out context", out[0], (*call.lead, k, heads, head_dim), call.key.dtype, call.key.device)
    if out[1] is not None:
        check_out("out state", out[1], (*call.lead, heads, head_dim), call.key.dtype, call.key.device)
    check_no_gradients(out, *call, *out)
    if not torch.compiler.is_compiling():
        check_apart(out, call, Call._fields)


def _dispatched(call: Call, scale: float, name: str, return_lse: bool, out: _Out) -> CandidateAttention:
    """Run a checked call, as one operator of PyTorch unless the backend is the reference."""
    if name == "reference":
        results = implementation("attention", name, "candidate_attention")(call, scale=scale)
    elif needs_grad(*call):
        results = _Differentiable.apply(scale, name, return_lse, *_dequantised(call))
    else:
        results = _forward(*call, scale, return_lse, name)
    return _named(results, call.state_query is not None, return_lse, out)


def _named(results: tuple[Any, ...], has_state: bool, return_lse: bool, out: _Out) -> CandidateAttention:
    context, state, context_lse, state_lse = results
    if out[0] is not None:
        context = out[0].copy_(context)
        state = out[1].copy_(state) if out[1] is not None else state
    return CandidateAttention(
        context,
        state if has_state else None,
        context_lse.float() if return_lse else None,
        state_lse.float() if return_lse and has_state else None,
    )


def _runner(call: Call, name: str, return_lse: bool, out: _Out) -> tuple[_Run, bool]:
    """Return what runs calls of the form of a checked one, and whether it takes their tensors as they are."""
    has_state = call.state_query is not None
    if needs_grad(*call):
        return lambda tensors, scale, out: _dispatched(Call(*tensors), scale, name, return_lse, out), True
    if name != "triton":
        function = implementation("attention", name, "candidate_attention")
        return (
            lambda tensors, scale, out: _named(
                function(Call(*tensors), scale=scale, return_lse=return_lse), has_state, return_lse, out
            ),
            True,
        )
    prepared, same = implementation("attention", "triton", "runner")(call, return_lse=return_lse, out=out)
    return lambda tensors, scale, out: CandidateAttention(*prepared(tensors, scale, out)), same


def _dequantised(call: Call) -> Call:
    """Return the call with int8 candidates as floating ones, differentiable in their scales."""
    if call.query_scale is None:
        return call
    scaled: dict[str, Any] = {}
    for name in ("query", "key", "value"):
        numbers, factor = getattr(call, f"context_{name}"), getattr(call, f"{name}_scale")
        scaled[f"context_{name}"] = None if numbers is None else (numbers * factor.unsqueeze(-1)).to(call.key.dtype)
    return call._replace(**scaled, query_scale=None, key_scale=None, value_scale=None)


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_CALL_SCHEMA = (
    "Tensor context_query, Tensor? context_key, Tensor context_value, Tensor? state_query, Tensor key, Tensor value, "
    "Tensor? key_lengths, Tensor? candidate_ids, Tensor? candidate_offsets, Tensor? own_logits, "
    "Tensor? query_scale, Tensor? key_scale, Tensor? value_scale"
)
_LIBRARY.define(
    f"candidate_attention({_CALL_SCHEMA}, float scale, bool return_lse, str backend) "
    "-> (Tensor context, Tensor state, Tensor context_lse, Tensor state_lse)",
    tags=_TAGS,
)
_LIBRARY.define(
    "candidate_attention_backward(Tensor? grad_context, Tensor? grad_state, Tensor? grad_context_lse, "
    "Tensor? grad_state_lse, Tensor context, Tensor state, Tensor context_lse, Tensor state_lse, "
    f"{_CALL_SCHEMA}, float scale, bool for_shared, str backend) -> (Tensor context_query, Tensor context_key, "
    "Tensor context_value, Tensor state_query, Tensor key, Tensor value, Tensor own_logits)",
    tags=_TAGS,
)


def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, scale, return_lse, backend = args
    call = Call(*tensors)
    outputs = implementation("attention", backend, "candidate_attention")(call, scale=scale, return_lse=return_lse)
    return tuple(call.key.new_empty(0) if tensor is None else tensor for tensor in outputs)


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    (*grads_and_results, scale, for_shared, backend) = args
    grads, results, call = grads_and_results[:4], grads_and_results[4:8], Call(*grads_and_results[8:])
    gradients = implementation("attention", backend, "candidate_attention_backward")(
        grads, results, call, scale=scale, for_shared=for_shared
    )
    return tuple(call.key.new_empty(0) if tensor is None else tensor for tensor in gradients)


_LIBRARY.impl("candidate_attention", _run_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("candidate_attention_backward", _run_backward, "CompositeExplicitAutograd")
_operators = getattr(torch.ops, NAMESPACE)
_forward = _operators.candidate_attention.default
_backward = _operators.candidate_attention_backward.default


@torch.library.register_fake(f"{NAMESPACE}::candidate_attention")
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, _scale, return_lse, _backend = args
    call = Call(*tensors)
    key, rows = call.key, (*call.lead, *call.context_query.shape[-3:])
    lse_dtype = torch.promote_types(key.dtype, torch.float32)
    state = (*rows[:-3], *rows[-2:]) if call.state_query is not None else (0,)
    return (
        key.new_empty(rows),
        key.new_empty(state),
        key.new_empty(rows[:-1], dtype=lse_dtype) if return_lse else key.new_empty(0),
        key.new_empty(state[:-1], dtype=lse_dtype) if return_lse and len(state) > 1 else key.new_empty(0),
    )


@torch.library.register_fake(f"{NAMESPACE}::candidate_attention_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call, for_shared = Call(*args[8:-3]), args[-2]

    def like(tensor: Tensor | None) -> Tensor:
        return (
            call.key.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )

    shared = (like(call.key), like(call.value)) if for_shared else (like(None), like(None))
    return (
        like(call.context_query),
        like(call.context_key),
        like(call.context_value),
        like(call.state_query),
        *shared,
        like(call.own_logits),
    )


def _attention_flops(query_shape: Any, has_state: bool, key_shape: Any, ids_shape: Any, offsets_shape: Any) -> int:
    """4 D for each row and shared key, and for each context row and own key: two products, 2 FLOPs per multiply-add."""
    batch, m, heads, dim = key_shape
    k = query_shape[-3]
    if offsets_shape is not None:
        candidates = (ids_shape or query_shape)[0]
    else:
        candidates = batch * (query_shape[-4] if ids_shape is None else ids_shape[1])
    return 4 * dim * heads * candidates * ((k + has_state) * m + k * k)


@register_flop_formula(_operators.candidate_attention)
def _forward_flops(*args: Any, **_: Any) -> int:
    query, _key, _value, state, key, _v, _lengths, ids, offsets = args[:9]
    return _attention_flops(query, state is not None, key, ids, offsets)


@register_flop_formula(_operators.candidate_attention_backward)
def _backward_flops(*args: Any, **_: Any) -> int:
    # five products (P and dP again, then three gradients) where the forward pass has two
    query, _key, _value, state, key, _v, _lengths, ids, offsets = args[8:17]
    return _attention_flops(query, state is not None, key, ids, offsets) * 5 // 2


class _Differentiable(torch.autograd.Function):
    """Autograd of the operator: saves the log-sum-exps, from which the backward pass computes P again."""

    @staticmethod
    def forward(ctx: Any, scale: float, backend: str, return_lse: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results = _forward(*tensors, scale, True, backend)
        ctx.save_for_backward(*results, *tensors)
        ctx.scale, ctx.backend = scale, backend
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        results, call = saved[:4], Call(*saved[4:])
        # of the arguments: scale, backend, return_lse, then the tensors of the call
        wanted = dict(zip(Call._fields, ctx.needs_input_grad[3:], strict=True))
        if call.state_query is None:
            grads = (grads[0], None, grads[2], None)
        gradients = _backward(*grads, *results, *call, ctx.scale, wanted["key"] or wanted["value"], ctx.backend)
        names = ("context_query", "context_key", "context_value", "state_query", "key", "value", "own_logits")
        by_name = dict(zip(names, gradients, strict=True))
        return None, None, None, *(by_name.get(name) if wanted[name] else None for name in Call._fields)
