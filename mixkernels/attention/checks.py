"""Argument checks of `candidate_attention`, made before any work; messages say what was found and expected."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mixkernels.dispatch import checks_on_gpu
from mixkernels.errors import DeviceError, DtypeError, ShapeError
from mixkernels.tensors import DTYPES


class Call(NamedTuple):
    """The tensors of a call; the names are those of `candidate_attention`."""

    context_query: Tensor
    context_key: Tensor | None
    context_value: Tensor
    state_query: Tensor | None
    key: Tensor
    value: Tensor
    key_lengths: Tensor | None
    candidate_ids: Tensor | None
    candidate_offsets: Tensor | None
    own_logits: Tensor | None
    query_scale: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading sizes of the results: (B, N), (B, n) with ids, or (total,) with offsets."""
        if self.candidate_offsets is not None:
            return (self.context_query.shape[0] if self.candidate_ids is None else self.candidate_ids.shape[0],)
        count = self.context_query.shape[-4] if self.candidate_ids is None else self.candidate_ids.shape[1]
        return (self.key.shape[0], count)


_REQUIRED = ("context_query", "context_value", "key", "value")
_CONTEXTS = ("context_query", "context_key", "context_value")
_SCALES = ("query_scale", "key_scale", "value_scale")
_INDICES = ("key_lengths", "candidate_ids", "candidate_offsets")


def checked_call(*tensors: Tensor | None, context_scales: Sequence[Tensor | None] | None) -> Call:
    """Check all arguments and return them as a `Call`; under autocast the floating tensors are cast.

    Args:
        tensors: those of the call in the order of `Call`, without the scales.
        context_scales: of query, key and value; None without int8 candidates.

    Raises:
        ShapeError, DtypeError, DeviceError: as the message says.
    """
    scales = (None, None, None) if context_scales is None else tuple(context_scales)
    if len(scales) != 3:
        raise ShapeError(f"context_scales holds {len(scales)} tensors; expected 3: query, key and value")
    call = Call._make((*tensors, *scales))
    check_tensors(call)
    kind = call.key.device.type
    # is_autocast_enabled raises for the device "meta"
    if kind != "meta" and torch.is_autocast_enabled(kind):
        call = _cast(call, torch.get_autocast_dtype(kind))
    check_dtypes(call)
    check_shapes(call)
    return call


def _cast(call: Call, dtype: torch.dtype) -> Call:
    floating = {"context_query", "context_key", "context_value", "state_query", "key", "value"}
    return Call._make(
        tensor.to(dtype)
        if name in floating and tensor is not None and tensor.dtype not in (torch.float64, torch.int8)
        else tensor
        for name, tensor in call._asdict().items()
    )


def check_tensors(call: Call) -> None:
    """Check that arguments are tensors on one device, and that own keys are given either as keys or as logits.

    Raises:
        DtypeError: an argument is not a tensor or is missing, or own keys are given both ways or not at all.
        DeviceError: the tensors are on different devices.
    """
    for name, tensor in call._asdict().items():
        if tensor is None:
            if name in _REQUIRED:
                raise DtypeError(f"{name} is None; only state_query and, with own_logits, context_key may be left out")
        elif not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        elif isinstance(call.key, Tensor) and tensor.device != call.key.device:
            raise DeviceError(f"{name} is on {tensor.device} but key is on {call.key.device}; move them to one device")
    if (call.context_key is None) == (call.own_logits is None):
        found = "both given" if call.own_logits is not None else "both None"
        raise DtypeError(f"context_key and own_logits are {found}; expected one of them")


def check_dtypes(call: Call) -> None:
    """Check that floating inputs share one dtype, and that int8 candidates have their scales.

    Raises:
        DtypeError: as the message says.
    """
    dtype = call.key.dtype
    if dtype not in DTYPES:
        raise DtypeError(f"key has dtype {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    quantised = call.context_query.dtype == torch.int8
    for name in ("value", "state_query", *_CONTEXTS):
        tensor = getattr(call, name)
        expected = torch.int8 if quantised and name in _CONTEXTS else dtype
        if tensor is not None and tensor.dtype != expected:
            other = "context_query" if expected == torch.int8 else "key"
            raise DtypeError(
                f"{name} has dtype {tensor.dtype} but {other} has {expected}; floating inputs share one dtype, and "
                "int8 candidates are int8 in query, key and value"
            )
    scales = [name for name in _SCALES if getattr(call, name) is not None]
    if quantised:
        if (
            call.query_scale is None
            or call.value_scale is None
            or (call.key_scale is None) != (call.context_key is None)
        ):
            raise DtypeError(
                f"int8 candidates were given with {', '.join(scales) or 'no scales'}; expected context_scales=(query, "
                "key, value), with key None if context_key is None"
            )
    elif scales:
        raise DtypeError(
            f"context_scales are only for int8 candidates, but context_query has dtype {call.context_query.dtype}"
        )
    for name in ("own_logits", *_SCALES):
        tensor, wide = getattr(call, name), torch.promote_types(dtype, torch.float32)
        if tensor is not None and tensor.dtype not in (torch.float32, wide):
            raise DtypeError(f"{name} has dtype {tensor.dtype}; expected torch.float32")
    for name in _INDICES:
        tensor = getattr(call, name)
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name} has dtype {tensor.dtype}; expected int64 or int32")


def check_shapes(call: Call) -> None:
    """Check that sizes agree and indices are in range (on a GPU, ranges only with MIXKERNELS_CHECKS=1).

    Raises:
        ShapeError: as the message says.
    """
    key, query = call.key, call.context_query
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
    lead, k = query.shape[:-3], query.shape[-3]
    if len(lead) == 2 and call.candidate_offsets is None and call.candidate_ids is None and lead[0] != batch:
        raise ShapeError(
            f"context_query holds candidates of {lead[0]} queries, {tuple(query.shape)}, but key holds {batch}, "
            f"{tuple(key.shape)}; pass a pool (N, k, H, D) if all queries share the same candidates"
        )
    expected = {
        "value": key.shape,
        "context_key": query.shape,
        "context_value": query.shape,
        "state_query": (*lead, heads, head_dim),
        "own_logits": (*lead, k, k, heads),
        **dict.fromkeys(_SCALES, (*lead, k, heads)),
    }
    for name, shape in expected.items():
        tensor = getattr(call, name)
        if tensor is not None and tensor.shape != shape:
            other = "key" if name == "value" else "context_query"
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, because {other} has "
                f"{tuple(getattr(call, other).shape)}"
            )
    if call.key_lengths is not None:
        if call.key_lengths.shape != (batch,):
            raise ShapeError(
                f"key_lengths has shape {tuple(call.key_lengths.shape)}; expected ({batch},), one per query"
            )
        _check_range("key_lengths", call.key_lengths, 0, m, "the tokens of key")
    _check_form(call)


def depends_on_values(call: Call) -> bool:
    """Whether a checked call has indices whose range is checked at every call."""
    return any(tensor is not None and _ranges_are_checked(tensor) for tensor in call[6:9])


def check_values(call: Call) -> None:
    """Check the ranges of a call whose form is checked; see `check_shapes`."""
    if call.key_lengths is not None:
        _check_range("key_lengths", call.key_lengths, 0, call.key.shape[1], "the tokens of key")
    _check_form(call)


def _check_form(call: Call) -> None:
    """Check ids and offsets against each other, the candidates and the queries."""
    ids, offsets, query, batch = call.candidate_ids, call.candidate_offsets, call.context_query, call.key.shape[0]
    for name in ("candidate_ids", "candidate_offsets"):
        if getattr(call, name) is not None and query.dim() != 4:
            raise ShapeError(
                f"{name} was given with per-query candidates, context_query {tuple(query.shape)}; expected candidates "
                "(N, k, H, D)"
            )
    if ids is not None:
        if offsets is None and (ids.dim() != 2 or ids.shape[0] != batch):
            raise ShapeError(
                f"candidate_ids has shape {tuple(ids.shape)}; expected ({batch}, n), one row per query, or (total,) "
                "together with candidate_offsets"
            )
        if offsets is not None and ids.dim() != 1:
            raise ShapeError(f"candidate_ids has shape {tuple(ids.shape)}; expected (total,) with candidate_offsets")
        _check_range("candidate_ids", ids, 0, query.shape[0] - 1, "the candidates of the pool")
    if offsets is None:
        return
    if offsets.shape != (batch + 1,):
        raise ShapeError(f"candidate_offsets has shape {tuple(offsets.shape)}; expected ({batch + 1},), B + 1")
    total, rows = (len(ids), "candidate_ids") if ids is not None else (query.shape[0], "context_query")
    if _ranges_are_checked(offsets):
        found = offsets.tolist()
        if found[0] != 0 or found[-1] != total or any(a > b for a, b in pairwise(found)):
            shown = found if len(found) <= 8 else [*found[:4], "...", *found[-3:]]
            raise ShapeError(
                f"candidate_offsets is {shown}; expected to start at 0, never to decrease, and to end at {total}, "
                f"the rows of {rows}"
            )


def _ranges_are_checked(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and checks_on_gpu())


def _check_range(name: str, tensor: Tensor, low: int, high: int, what: str) -> None:
    # on a GPU a range check waits for the device
    if tensor.numel() and _ranges_are_checked(tensor):
        least, most = (int(bound) for bound in tensor.aminmax())
        if least < low or most > high:
            raise ShapeError(f"{name} reaches from {least} to {most}; expected values in {low}..{high}, {what}")


def checked_scale(scale: float) -> float:
    """Return scale as a float.

    Raises:
        ShapeError: it is not finite.
    """
    scale = float(scale)
    if not math.isfinite(scale):
        raise ShapeError(f"scale is {scale}; expected a finite number")
    return scale
