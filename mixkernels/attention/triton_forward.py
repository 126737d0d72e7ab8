"""The forward pass of `mixkernels.candidate_attention` in Triton: which kernel computes a call, and its launch.

Short queries in 16 bits take the kernel that keeps all keys on the chip (triton_forward_short), everything else the
kernel that reads keys in blocks (triton_forward_streamed). The choice and the tiles depend on m, the form and the
strides, never on N, so that a candidate keeps its bits whatever stands beside it. Only outputs are written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.triton_arguments import (
    constants_of,
    dense,
    num_tiles,
    out_strides_of,
    strides_of,
    written_in_place,
)
from mixkernels.attention.triton_forward_short import candidate_attention_fwd_short_kernel
from mixkernels.attention.triton_forward_streamed import candidate_attention_fwd_streamed_kernel
from mixkernels.attention.triton_launch import (
    SHORT,
    SHORT_KEYS,
    STREAMED,
    Kind,
    LaunchConfig,
    forward_options,
    keeps_short_queries,
    launch_config,
    slots_of,
)
from mixkernels.attention.triton_variants import forward_variants
from mixkernels.triton_common.launching import Launch
from mixkernels.triton_common.occupancy import one_wave, programs_each
from mixkernels.triton_common.runtime import INTERPRET, Memory, device_of
from mixkernels.triton_common.variant import KernelVariant

_INTERPRETED_WAVE = 4
"""Programs that run at the same time in the interpreter, which has no multiprocessors."""
_COPIED_BYTES = 16
"""The memory engine copies rows whose addresses and distances are multiples of this."""


Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Out = tuple[Tensor | None, Tensor | None]
Run = Callable[[tuple[Any, ...], float, Out], Results]
"""Takes the tensors of a `Call`, the scale and `out`."""


def forward_kind(call: Call, *, return_lse: bool, out: Out = (None, None)) -> Kind:
    """Return what the launch configuration of a call depends on; `out` as of `candidate_attention`."""
    key, k, has_state = call.key, call.context_query.shape[-3], call.state_query is not None
    short = key.shape[1] <= SHORT_KEYS and key.element_size() < 4 and keeps_short_queries(key.device)
    kernel = SHORT if short else STREAMED
    return Kind(
        kernel,
        k,
        slots_of(kernel, k, has_state=has_state),
        key.shape[3],
        key.element_size(),
        quantised=call.query_scale is not None,
        lse=return_lse,
        descriptors=short and _tiles_are_copied(call, out),
    )


def _tiles_are_copied(call: Call, out: Out) -> bool:
    """Whether the memory engine can copy tiles: a tile's rows, with all heads, lie one distance apart."""
    k, heads, head_dim = call.context_query.shape[-3:]
    # tiles of the forward kernels have 64 or 32 rows, and products take 16 states at least
    if call.candidate_ids is not None or k not in (1, 2):
        return False
    for tensor in (*call[:4], *out):
        if tensor is None:
            continue
        state = tensor is call.state_query or tensor is out[1]
        rows = tensor.stride()[-3] if state or k > 1 else tensor.stride()[-4]
        size = tensor.element_size()
        distances = [rows, *tensor.stride()[:-3]]
        if (
            tensor.stride(-2) != head_dim
            or rows < heads * head_dim
            or (k > 1 and not state and tensor.stride(-4) != k * rows)
            or tensor.data_ptr() % _COPIED_BYTES
            or any(distance * size % _COPIED_BYTES for distance in distances)
        ):
            return False
    return True


def _grid(call: Call, kind: Kind, config: LaunchConfig, wave: int) -> tuple[int, int]:
    """Return the number of programs of the kernel for short queries, and the most tiles that one of them computes."""
    batch, _, heads, _ = call.key.shape
    candidates = config.block_m // kind.slots
    tiles = num_tiles(call, candidates)
    if call.candidate_offsets is None:
        return batch * heads * programs_each(batch * heads, tiles // batch, wave), 0
    # ragged: programs of equally many tiles, of which every query has one that is not full
    each = -(-tiles // programs_each(heads, tiles, wave))
    return num_tiles(call, each * candidates) * heads, each


class Prepared(NamedTuple):
    """The forward pass of all calls of one form; holds no tensors."""

    launch: Launch | None
    """None: there are no candidates."""
    context: Memory
    state: Memory | None
    context_lse: Memory | None
    state_lse: Memory | None
    dtype: torch.dtype
    """Of context and state."""

    def __call__(self, tensors: tuple[Tensor | None, ...], scale: float, out: Out) -> Results:
        """Run a call of the form, given the tensors of `Call`; `out` is (None, None) or to be written."""
        context, state = out
        if context is None:
            context = self.context()
            state = None if self.state is None else self.state()
        context_lse = None if self.context_lse is None else self.context_lse()
        state_lse = None if self.state_lse is None else self.state_lse()
        if self.launch is not None:
            self.launch((*tensors, context, state, context_lse, state_lse), context, scale)
        if INTERPRET:
            # the interpreter truncates where a GPU rounds, so PyTorch rounds there
            context = context.to(self.dtype)
            state = None if state is None else state.to(self.dtype)
        return context, state, context_lse, state_lse


def prepare(call: Call, *, return_lse: bool, out: Out = (None, None)) -> Prepared:
    """Decide how calls of the form of `call`, which has dense index tensors, are computed."""
    key, lead = call.key, call.lead
    heads, head_dim = key.shape[2:]
    k, has_state = call.context_query.shape[-3], call.state_query is not None
    dtype = torch.float32 if INTERPRET else key.dtype
    contexts, states = (*lead, k, heads, head_dim), (*lead, heads, head_dim)
    prepared = Prepared(
        None,
        Memory(contexts, dtype, key.device),
        Memory(states, dtype, key.device) if has_state else None,
        Memory(contexts[:-1], torch.float32, key.device) if return_lse else None,
        Memory(states[:-1], torch.float32, key.device) if return_lse and has_state else None,
        key.dtype,
    )
    if 0 in contexts:
        return prepared
    constants = constants_of(call) | {
        "QUANTISED": call.query_scale is not None,
        # which rows of the scales are a candidate's
        "PER_QUERY": call.query_scale is not None and call.context_query.dim() == 5,
        "HAS_LSE": return_lse,
    }
    constants |= dict(zip(("CO_N", "CO_C", "SO_N"), out_strides_of(call, out), strict=True))
    kind = forward_kind(call, return_lse=return_lse, out=out)

    def launch(config: LaunchConfig) -> Launch:
        numbers = (lead[-1], key.shape[1], key.shape[0])
        strides = strides_of(call)
        options = constants | forward_options(kind, config, key.shape[1])
        if kind.kernel == STREAMED:
            programs = num_tiles(call, config.block_m // kind.slots) * heads
            return Launch(candidate_attention_fwd_streamed_kernel, programs, (*numbers, *strides), options, key.device)
        kernel, wave = candidate_attention_fwd_short_kernel, _INTERPRETED_WAVE
        if not INTERPRET:
            # of the outputs, dtype and alignment matter
            written, lse = (key.new_empty(1, dtype=kind) for kind in (dtype, torch.float32))
            outputs = (written, written if has_state else None, *((lse if return_lse else None,) * 2))
            tensors = [written if tensor is None else tensor for tensor in (*call, *outputs)]
            with device_of(key):
                wave = one_wave(kernel, (*tensors, 1.0, *numbers, 0, *strides), options, key.device)
        programs, tiles_each = _grid(call, kind, config, wave)
        numbers = (*numbers, tiles_each, *strides)
        return Launch(kernel, programs, numbers, options, key.device, workspace=kind.descriptors)

    def time(config: LaunchConfig) -> None:
        prepared._replace(launch=launch(config))(call, 1.0, out)

    with device_of(key):
        return prepared._replace(launch=launch(launch_config(kind, key.device, time)))


def candidate_attention(call: Call, *, scale: float, return_lse: bool) -> Results:
    """Same contract as the reference's; one launch, no workspace."""
    return runner(call, return_lse=return_lse, out=(None, None))[0](call, scale, (None, None))


def runner(call: Call, *, return_lse: bool, out: Out) -> tuple[Run, bool]:
    """Return what runs calls of a form, given scale and out, and whether it may be kept: it takes tensors as they are.

    Args:
        call: a call of the form.
        return_lse: as of the operator.
        out: where context and state are written, or (None, None).
    """
    given, call = call, dense(call)
    if not all(before is after for before, after in zip(given, call, strict=True)):
        prepared = prepare(call, return_lse=return_lse)
        return lambda tensors, scale, out: _copied(prepared(dense(Call(*tensors)), scale, _NOWHERE), out), False
    if out[0] is None or (written_in_place(out) and not (INTERPRET and out[0].dtype != torch.float32)):
        return prepare(call, return_lse=return_lse, out=out), True
    prepared = prepare(call, return_lse=return_lse)
    return lambda tensors, scale, out: _copied(prepared(tensors, scale, _NOWHERE), out), True


_NOWHERE: Out = (None, None)


def _copied(results: Results, out: Out) -> Results:
    context, state, context_lse, state_lse = results
    if out[0] is None:
        return results
    state = state if out[1] is None or state is None else out[1].copy_(state)
    return out[0].copy_(context), state, context_lse, state_lse


def variants() -> list[KernelVariant]:
    """Return both kernels in every launch configuration that is shipped, and in every form of their candidates."""
    return [
        *forward_variants(candidate_attention_fwd_short_kernel, SHORT),
        *forward_variants(candidate_attention_fwd_streamed_kernel, STREAMED),
    ]
