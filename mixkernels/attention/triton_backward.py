"""The backward pass of `mixkernels.candidate_attention`: formulas and launch of its two kernels.

With P = exp(S - lse) over shared and own keys, dP = dO V^T and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. P is computed again from the saved log-sum-exps.

One kernel sums over the queries of a pool, the other over the candidates, each in registers, so nothing is expanded.
Either sum may be split over programs to fill the GPU; the splits' partial sums are float32 and are added in a second
stage in a fixed order, so gradients are deterministic. With MIXKERNELS_DETERMINISTIC=0 the shared keys' splits add
atomically instead.
"""

import os

import torch
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.triton_arguments import (
    constants_of,
    dense,
    num_tiles,
    strides_of,
)
from mixkernels.attention.triton_backward_candidates import candidate_attention_bwd_candidates_kernel
from mixkernels.attention.triton_backward_shared import candidate_attention_bwd_shared_kernel
from mixkernels.attention.triton_launch import CANDIDATES, SHARED, Kind, LaunchConfig, launch_config
from mixkernels.attention.triton_variants import backward_variants
from mixkernels.triton_common.runtime import INTERPRET, device_of
from mixkernels.triton_common.variant import KernelVariant

_PROGRAMS = 512
"""Sums are split over programs up to this number, which fills a large GPU.

It does not follow from the GPU as the forward pass's does: every split is a partial sum, so another number of splits
gives other bits.
"""


def candidate_attention_backward(
    grads: list[Tensor | None], results: list[Tensor], call: Call, *, scale: float, for_shared: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of context_query, context_key, context_value, state_query, key, value and own_logits.

    Args:
        grads: of context, state, context_lse and state_lse; None for an output without a gradient.
        results: context, state, context_lse and state_lse.
        call: the call; its candidates are floating.
        scale: of the forward pass.
        for_shared: whether to compute the gradients of key and value; otherwise they are None.
    """
    call = dense(call)
    key = call.key
    slots = call.context_query.shape[-3] + (call.state_query is not None)
    # log-sum-exps in base 2 and delta of every row, from one kernel to the other: (H, rows, slots)
    saved = [results[2].new_empty(key.shape[2], results[2][..., 0, 0].numel(), slots) for _ in range(2)]
    grads = _filled_grads(grads, results, has_state=call.state_query is not None)
    with device_of(key):
        by_candidate = _candidates_backward(grads, results, saved, call, scale)
        shared = _shared_backward(grads, saved, call, scale) if for_shared else (None, None)
    return (*by_candidate[:4], *shared, by_candidate[4])


def _filled_grads(grads: list[Tensor | None], results: list[Tensor], *, has_state: bool) -> list[Tensor | None]:
    """Contiguous gradients of the outputs, zeros for missing ones; of the log-sum-exps all are given or none is."""
    with_lse = any(grad is not None for grad in grads[2:])
    wanted = [True, has_state, with_lse, with_lse and has_state]

    def filled(grad: Tensor | None, result: Tensor) -> Tensor:
        return torch.zeros_like(result) if grad is None else grad.contiguous()

    every = zip(grads, results, wanted, strict=True)
    return [filled(grad, result) if want else None for grad, result, want in every]


def _pointers(tensors: tuple[Tensor | None, ...], stand_in: Tensor) -> list[Tensor]:
    # absent tensors are never read, so any pointer will do
    return [stand_in if tensor is None or tensor.numel() == 0 else tensor for tensor in tensors]


def _candidates_backward(
    grads: list[Tensor | None], results: list[Tensor], saved: list[Tensor], call: Call, scale: float
) -> list[Tensor | None]:
    """Launch the candidates' kernel: gradients of the three contexts, state_query and own_logits."""
    key, lead, k = call.key, call.lead, call.context_query.shape[-3]
    heads, head_dim = key.shape[2:]
    names = ("context_query", "context_key", "context_value", "state_query", "own_logits")
    inputs = [getattr(call, name) for name in names]
    pool = call.context_query.dim() == 4 and call.candidate_ids is None and call.candidate_offsets is None
    slots = k + (call.state_query is not None)
    outputs: list[Tensor | None] = []

    def launch(config: LaunchConfig) -> None:
        tiles = num_tiles(call, config.block_m // slots)
        splits, rows = 1, lead
        if pool:
            tiles //= key.shape[0]
            splits = max(min(_PROGRAMS // (tiles * heads), key.shape[0]), 1)
            rows = (splits, lead[1])
        # the interpreter truncates where a GPU rounds, so PyTorch rounds there
        wide = splits > 1 or INTERPRET
        outputs[:] = [
            None if t is None else t.new_empty(*rows, *t.shape[-(dims):], dtype=torch.float32 if wide else t.dtype)
            for t, dims in zip(inputs, (3, 3, 3, 2, 3), strict=True)
        ]
        tensors = (*grads, *results, *call[:10], *outputs, *saved)
        candidate_attention_bwd_candidates_kernel[(tiles * heads * (splits if pool else 1),)](
            *_pointers(tensors, key),
            scale,
            lead[-1],
            key.shape[1],
            key.shape[0],
            splits,
            saved[0].shape[1],
            *strides_of(call),
            **constants_of(call),
            HAS_LSE_GRAD=grads[2] is not None,
            POOL=pool,
            STAGES=config.num_stages,
            **config.options(),
        )

    if results[0].numel():
        launch(launch_config(Kind(CANDIDATES, k, slots, head_dim, key.element_size()), key.device, launch))
    else:
        outputs = [None if t is None else torch.zeros_like(t) for t in inputs]
        return outputs
    return [
        None if output is None else _sum_parts(output, tensor, call, pool=pool)
        for output, tensor in zip(outputs, inputs, strict=True)
    ]


def _sum_parts(gradient: Tensor, tensor: Tensor, call: Call, *, pool: bool) -> Tensor:
    """Sum the parts of a gradient: over splits for a pool, over repeats of a candidate for ids."""
    if pool:
        return gradient.sum(dim=0).to(tensor.dtype) if gradient.shape[0] > 1 else gradient[0].to(tensor.dtype)
    if call.candidate_ids is None:
        return gradient.to(tensor.dtype)
    total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    # index_put_ sorts before it adds, so repeats are added in a fixed order; index_add_ would add atomically
    ids = call.candidate_ids.flatten().long()
    total.index_put_((ids,), gradient.flatten(0, call.candidate_ids.dim() - 1).float(), accumulate=True)
    return total.to(tensor.dtype)


def _shared_backward(
    grads: list[Tensor | None], saved: list[Tensor], call: Call, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch the shared keys' kernel: gradients of key and value."""
    key, k = call.key, call.context_query.shape[-3]
    batch, num_keys, heads, head_dim = key.shape
    if saved[0].numel() == 0:
        return torch.zeros_like(key), torch.zeros_like(call.value)
    slots = k + (call.state_query is not None)
    atomic = os.environ.get("MIXKERNELS_DETERMINISTIC", "1") == "0"
    outputs: list[Tensor] = []

    def launch(config: LaunchConfig) -> None:
        blocks = -(-num_keys // config.block_n) * heads * batch
        tiles = -(-call.lead[-1] // (config.block_m // slots))
        splits = max(min(_PROGRAMS // blocks, tiles), 1)
        wide = splits > 1 or INTERPRET
        sizes = key.shape if atomic else (splits, *key.shape)
        make = torch.zeros if atomic else torch.empty
        outputs[:] = [
            make(sizes, dtype=torch.float32 if wide or atomic else key.dtype, device=key.device) for _ in range(2)
        ]
        constants = constants_of(call)
        # own keys do not affect the shared keys' gradients
        del constants["HAS_OWN_LOGITS"]
        strides = strides_of(call)
        candidate_attention_bwd_shared_kernel[(blocks * splits,)](
            *_pointers((*grads[:2], *saved), key),
            *_pointers((call.context_query, call.state_query, *call[4:9]), key),
            *outputs,
            scale,
            call.lead[-1],
            num_keys,
            batch,
            splits,
            saved[0].shape[1],
            # strides of context_query, then of state_query, key and value
            *strides[:4],
            *strides[12:21],
            **constants,
            ATOMIC=atomic,
            STAGES=config.num_stages,
            **config.options(),
        )

    launch(launch_config(Kind(SHARED, k, slots, head_dim, key.element_size()), key.device, launch))
    if atomic:
        return outputs[0].to(key.dtype), outputs[1].to(key.dtype)
    dkey, dvalue = ((t.sum(dim=0) if t.shape[0] > 1 else t[0]).to(key.dtype) for t in outputs)
    return dkey, dvalue


def variants() -> list[KernelVariant]:
    """Return both kernels in every launch configuration that is shipped."""
    return [
        *backward_variants(candidate_attention_bwd_candidates_kernel, CANDIDATES, {"HAS_LSE_GRAD": False}),
        *backward_variants(candidate_attention_bwd_shared_kernel, SHARED, {"ATOMIC": False}),
    ]
