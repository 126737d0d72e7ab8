"""The only door to the kernels: validation, the choice of a backend, and the call.

Everything a caller can get wrong is found here, before any work, with the found and the expected value in the message;
backends trust what they are given.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixkernels.dispatch import load, select_backend
from mixkernels.errors import DeviceError, DtypeError, ShapeError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CandidateAttention(NamedTuple):
    """Result of `candidate_attention`; the same four fields whatever was asked for."""

    context: Tensor
    """(B, N, k, H, D), dtype of the input."""
    state: Tensor | None
    """(B, N, H, D), dtype of the input; None without a state query."""
    context_lse: Tensor | None
    """(B, N, k, H) float32, natural log; None unless ``return_lse``."""
    state_lse: Tensor | None
    """(B, N, H) float32, natural log; None unless ``return_lse``, or without a state query."""


def candidate_attention(
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> CandidateAttention:
    """Let every candidate's context embeddings and state attend to one query's tokens (docs/design.md, section 1).

    A context row attends to the query's m tokens and to its candidate's own k context embeddings under one softmax; a
    state row attends to the query's tokens alone. Shared keys are never expanded over candidates.

    Args:
        context_query, context_key, context_value: (N, k, H, D), one pool that all B queries meet, or (B, N, k, H, D),
            candidates of each query. float32, float16, bfloat16 or float64 (reference and torch only); all floating
            inputs share one dtype (autocast casts them).
        state_query: (N, H, D) or (B, N, H, D), as the contexts are; None leaves out the state.
        key, value: (B, m, H, D), m >= 1. Keys and values of the query's tokens, as the backbone's own layer projected
            them.
        key_lengths: (B,) integers in 0..m. Tokens beyond a query's length are ignored. None: all m are valid. Checked
            against the range on CPU only.
        scale: factor of the dot products. None: 1 / sqrt(D).
        return_lse: also return the log-sum-exp of every row's logits.
        backend: one of `BACKENDS`; None or "auto" takes the first that can run the call, the reference excepted.

    Returns:
        CandidateAttention(context, state, context_lse, state_lse): (B, N, k, H, D) and (B, N, H, D) in the input's
        dtype, for a pool too; the log-sum-exps float32, natural log. A row with no valid key is zero, its log-sum-exp
        -inf. N = 0 gives empty results. Softmax and accumulation are float32 (float64 for float64).

    Raises:
        ShapeError: sizes that must agree do not, or a length is out of range.
        DtypeError: a dtype is not supported, or the inputs do not share one.
        DeviceError: the inputs lie on different devices.
        BackendError: no backend can run this call; the message lists every backend with every reason.
    """
    inputs = {
        "context_query": context_query,
        "context_key": context_key,
        "context_value": context_value,
        "state_query": state_query,
        "key": key,
        "value": value,
    }
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    _check_tensors(inputs, key_lengths)
    if torch.is_autocast_enabled(key.device.type):
        target = torch.get_autocast_dtype(key.device.type)
        inputs = {name: _under_autocast(tensor, target) for name, tensor in inputs.items()}
    _check_dtypes(inputs)
    _check_shapes(inputs, key_lengths)
    scale = 1.0 / math.sqrt(key.shape[-1]) if scale is None else _checked_scale(scale)
    # the last dimension must be dense for every backend; all other strides are free
    inputs = {name: t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for name, t in inputs.items()}

    name = select_backend(backend, *inputs.values())
    context, state, context_lse, state_lse = load(name, "attention").candidate_attention(
        inputs["context_query"],
        inputs["context_key"],
        inputs["context_value"],
        inputs.get("state_query"),
        inputs["key"],
        inputs["value"],
        key_lengths=key_lengths,
        scale=scale,
        return_lse=return_lse,
    )
    # a backend to which they cost nothing may hand them out all the same
    if not return_lse:
        context_lse = state_lse = None
    return CandidateAttention(context, state, context_lse, state_lse)


def _under_autocast(tensor: Tensor, target: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(target)


def _check_tensors(inputs: dict[str, Tensor], key_lengths: Tensor | None) -> None:
    everything = inputs if key_lengths is None else {**inputs, "key_lengths": key_lengths}
    for name, tensor in everything.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    device = inputs["key"].device if "key" in inputs else None
    for name in ("context_query", "context_key", "context_value", "key", "value"):
        if name not in inputs:
            raise DtypeError(f"{name} is None; only state_query may be left out")
    for name, tensor in everything.items():
        if tensor.device != device:
            raise DeviceError(f"{name} is on {tensor.device} but key is on {device}; move them to one device")


def _check_dtypes(inputs: dict[str, Tensor]) -> None:
    dtype = inputs["key"].dtype
    if dtype not in _DTYPES:
        raise DtypeError(f"key has dtype {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    for name, tensor in inputs.items():
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype} but key has {dtype}; floating inputs share one dtype")


def _check_shapes(inputs: dict[str, Tensor], key_lengths: Tensor | None) -> None:
    key, query = inputs["key"], inputs["context_query"]
    if key.dim() != 4:
        raise ShapeError(f"key has shape {tuple(key.shape)}; expected (B, m, H, D)")
    if query.dim() not in (4, 5):
        raise ShapeError(f"context_query has shape {tuple(query.shape)}; expected (N, k, H, D) or (B, N, k, H, D)")
    batch, m, heads, head_dim = key.shape
    if min(m, heads, head_dim) < 1:
        raise ShapeError(f"key has shape {tuple(key.shape)}; m, H and D must be at least 1 (mask with key_lengths)")
    if query.shape[-3] < 1:
        raise ShapeError(f"context_query has shape {tuple(query.shape)}; k must be at least 1")
    if query.shape[-1] != head_dim:
        raise ShapeError(
            f"key has head dimension {head_dim} but context_query has {query.shape[-1]}; both come from the same layer "
            "and must agree"
        )
    if query.shape[-2] != heads:
        raise ShapeError(f"key has {heads} heads but context_query has {query.shape[-2]}; they must agree")
    if query.dim() == 5 and query.shape[0] != batch:
        raise ShapeError(
            f"context_query holds candidates of {query.shape[0]} queries, {tuple(query.shape)}, but key holds {batch}, "
            f"{tuple(key.shape)}; pass a pool (N, k, H, D) if all queries meet the same candidates"
        )
    expected = {
        "value": key.shape,
        "context_key": query.shape,
        "context_value": query.shape,
        "state_query": query.shape[:-3] + query.shape[-2:],
    }
    for name, shape in expected.items():
        if name in inputs and inputs[name].shape != shape:
            other = "key" if name == "value" else "context_query"
            raise ShapeError(
                f"{name} has shape {tuple(inputs[name].shape)}; expected {tuple(shape)}, because {other} has "
                f"{tuple(inputs[other].shape)}"
            )
    if key_lengths is not None:
        _check_lengths(key_lengths, batch, m)


def _check_lengths(key_lengths: Tensor, batch: int, m: int) -> None:
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"key_lengths has dtype {key_lengths.dtype}; expected int64 or int32")
    if key_lengths.shape != (batch,):
        raise ShapeError(f"key_lengths has shape {tuple(key_lengths.shape)}; expected ({batch},), one a query")
    # on a GPU a range check would wait for the device
    if key_lengths.device.type == "cpu" and batch:
        low, high = (int(bound) for bound in key_lengths.aminmax())
        if low < 0 or high > m:
            raise ShapeError(f"key_lengths reaches from {low} to {high}; expected values in 0..{m}, the tokens of key")


def _checked_scale(scale: float) -> float:
    scale = float(scale)
    if not math.isfinite(scale):
        raise ShapeError(f"scale is {scale}; expected a finite number")
    return scale
