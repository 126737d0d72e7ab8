"""The forward pass of `mixkernels.candidate_attention` in Triton: which kernel computes a call, and its launch.

Short queries in 16 bits take the kernel that keeps all keys on the chip (triton_forward_short), everything else the
kernel that reads keys in blocks (triton_forward_streamed). The choice and the tiles depend on m, the form and the
strides, never on N, so that a candidate keeps its bits whatever stands beside it. Only outputs are written.
"""

import torch
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.triton_arguments import (
    constants_of,
    dense,
    num_tiles,
    strides_of,
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
from mixkernels.triton_common.occupancy import one_wave, programs_each
from mixkernels.triton_common.runtime import INTERPRET, device_of, empty_output, with_workspace
from mixkernels.triton_common.variant import KernelVariant

_INTERPRETED_WAVE = 4
"""Programs that run at the same time in the interpreter, which has no multiprocessors."""
_COPIED_BYTES = 16
"""The memory engine copies rows whose addresses and distances are multiples of this."""


def forward_kind(call: Call, *, return_lse: bool) -> Kind:
    """Return what the launch configuration of a call depends on."""
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
        descriptors=short and _tiles_are_copied(call),
    )


def _tiles_are_copied(call: Call) -> bool:
    """Whether the memory engine can copy tiles: a tile's rows, with all heads, lie one distance apart."""
    k, heads, head_dim = call.context_query.shape[-3:]
    # tiles of the forward kernels have 64 or 32 rows, and products take 16 states at least
    if call.candidate_ids is not None or k not in (1, 2):
        return False
    for tensor in call[:4]:
        if tensor is None:
            continue
        rows = tensor.stride()[-3] if tensor is call.state_query or k > 1 else tensor.stride()[-4]
        size = tensor.element_size()
        distances = [rows, *tensor.stride()[:-3]]
        if (
            tensor.stride(-2) != head_dim
            or rows < heads * head_dim
            or (k > 1 and tensor is not call.state_query and tensor.stride(-4) != k * rows)
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


def candidate_attention(
    call: Call, *, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Same contract as the reference's; one launch, no workspace."""
    call = dense(call)
    key, lead = call.key, call.lead
    heads, head_dim = key.shape[2:]
    k, has_state = call.context_query.shape[-3], call.state_query is not None
    context = empty_output(key, *lead, k, heads, head_dim)
    state = empty_output(key, *lead, heads, head_dim) if has_state else None
    context_lse = key.new_empty(context.shape[:-1], dtype=torch.float32) if return_lse else None
    state_lse = key.new_empty(state.shape[:-1], dtype=torch.float32) if return_lse and state is not None else None
    outputs = (context, state, context_lse, state_lse)
    if context.numel():
        # absent tensors are never read, so any pointer will do
        pointers = [context if tensor is None else tensor for tensor in (*call, *outputs)]
        constants = constants_of(call) | {
            "QUANTISED": call.query_scale is not None,
            # which rows of the scales are a candidate's
            "PER_QUERY": call.query_scale is not None and call.context_query.dim() == 5,
            "HAS_LSE": return_lse,
        }
        kind = forward_kind(call, return_lse=return_lse)

        def launch(config: LaunchConfig) -> None:
            arguments = [*pointers, scale, lead[-1], key.shape[1], key.shape[0]]
            strides = strides_of(call)
            options = constants | forward_options(kind, config, key.shape[1])
            if kind.kernel == STREAMED:
                programs = num_tiles(call, config.block_m // kind.slots) * heads
                candidate_attention_fwd_streamed_kernel[(programs,)](*arguments, *strides, **options)
                return
            kernel, wave = candidate_attention_fwd_short_kernel, _INTERPRETED_WAVE
            if not INTERPRET:
                wave = one_wave(kernel, (*arguments, 0, *strides), options, key.device)
            programs, tiles_each = _grid(call, kind, config, wave)
            with with_workspace(kind.descriptors):
                kernel[(programs,)](*arguments, tiles_each, *strides, **options)

        with device_of(key):
            launch(launch_config(kind, key.device, launch))
    state = None if state is None else state.to(key.dtype)
    return context.to(key.dtype), state, context_lse, state_lse


def variants() -> list[KernelVariant]:
    """Return both kernels in every launch configuration that is shipped, and in every form of their candidates."""
    return [
        *forward_variants(candidate_attention_fwd_short_kernel, SHORT),
        *forward_variants(candidate_attention_fwd_streamed_kernel, STREAMED),
    ]
