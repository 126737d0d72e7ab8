"""The backward pass of `mixkernels.candidate_attention`: formulas, choice and launch of its kernels.

With P = exp(S - lse) over shared and own keys, dP = dO V^T and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. P is computed again from the saved log-sum-exps.

One kernel sums over the queries of a pool, another over the candidates, each in registers, so nothing is expanded.
Where every candidate is one query's and the query short, one fused kernel does both (`_fuses`). Which of them runs
depends on the form, m, k, D and dtype, and for a pool on whether there is one query; never on N.

Every sum may be split over programs to fill the GPU; the splits' partial sums are float32 and are added in a second
stage in a fixed order, so gradients are deterministic. With MIXKERNELS_DETERMINISTIC=0 the shared keys' splits add
atomically instead.
"""

import os

import torch
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.triton_arguments import (
    STRIDE_NAMES,
    constants_of,
    dense,
    num_tiles,
    strides_of,
)
from mixkernels.attention.triton_backward_candidates import candidate_attention_bwd_candidates_kernel
from mixkernels.attention.triton_backward_fused import candidate_attention_bwd_fused_kernel
from mixkernels.attention.triton_backward_shared import candidate_attention_bwd_shared_kernel
from mixkernels.attention.triton_launch import (
    CANDIDATES,
    SHARED,
    Kind,
    LaunchConfig,
    backward_options,
    fused_kind,
    keeps_short_queries,
    launch_config,
)
from mixkernels.attention.triton_variants import backward_variants, fused_variants
from mixkernels.triton_common.runtime import INTERPRET, device_of, empty_output
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
    if for_shared and (kind := _fuses(grads, results, call)) is not None:
        with device_of(key):
            return _fused_backward(_filled_grads(grads, results, has_state=True), results, call, scale, kind)
    slots = call.context_query.shape[-3] + (call.state_query is not None)
    # log-sum-exps in base 2 and delta of every row, from one kernel to the other: (H, rows, slots)
    saved = [results[2].new_empty(key.shape[2], results[2][..., 0, 0].numel(), slots) for _ in range(2)]
    grads = _filled_grads(grads, results, has_state=call.state_query is not None)
    with device_of(key):
        by_candidate = _candidates_backward(grads, results, saved, call, scale)
        shared = _shared_backward(grads, saved, call, scale) if for_shared else (None, None)
    return (*by_candidate[:4], *shared, by_candidate[4])


def _fuses(grads: list[Tensor | None], results: list[Tensor], call: Call) -> Kind | None:
    """Return the kind of the fused kernel if it computes a call's gradients; None: the two kernels do.

    Gradients of a pool's candidates sum over queries, those of gathered ones over repeats, and ragged rows or gradients
    of the log-sum-exps would spill registers.
    """
    key, queries = call.key, call.context_query
    if (
        call.candidate_ids is not None
        or call.candidate_offsets is not None
        or (queries.dim() == 4 and key.shape[0] > 1)
        or any(grad is not None for grad in grads[2:])
        or results[0].numel() == 0
        or not keeps_short_queries(key.device)
    ):
        return None
    has_state = call.state_query is not None
    return fused_kind(queries.shape[-3], key.shape[1], key.shape[3], key.element_size(), has_state=has_state)


def _fused_backward(
    grads: list[Tensor | None], results: list[Tensor], call: Call, scale: float, kind: Kind
) -> tuple[Tensor | None, ...]:
    """Launch the fused kernel: all gradients, in the order of `candidate_attention_backward`."""
    key = call.key
    batch, num_keys, heads, _ = key.shape
    num_candidates = call.lead[-1]
    inputs = (call.context_query, call.context_key, call.context_value, call.state_query, call.own_logits)
    outputs = [None if t is None else empty_output(t, *t.shape) for t in inputs]
    shared: list[Tensor] = []

    def launch(config: LaunchConfig) -> None:
        tiles = -(-num_candidates // config.block_m)
        splits = max(min(_PROGRAMS // (batch * heads), tiles), 1)
        shared[:] = _shared_outputs(call, splits)
        strides = dict(zip(STRIDE_NAMES, strides_of(call), strict=True))
        constants = constants_of(call)
        candidate_attention_bwd_fused_kernel[(splits * batch * heads,)](
            *_pointers((*grads[:2], *results, *call[:7], call.own_logits, *outputs, *shared), key),
            scale,
            num_candidates,
            num_keys,
            batch,
            splits,
            # a candidate has one context and one own key
            *(stride for name, stride in strides.items() if not name.endswith(("_c", "_r"))),
            **{name: constants[name] for name in ("H", "D", "HAS_LENGTHS", "HAS_OWN_LOGITS", "INTERPRET")},
            ATOMIC=_atomic(),
            **backward_options(kind, config, num_keys),
        )

    launch(launch_config(kind, key.device, launch))
    # the interpreter truncates where a GPU rounds, so PyTorch rounds there
    own = [None if t is None or like is None else t.to(like.dtype) for t, like in zip(outputs, inputs, strict=True)]
    return (*own[:4], *_sum_splits(shared, key), own[4])


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
    kind = Kind(CANDIDATES, k, slots, head_dim, key.element_size())

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
            **backward_options(kind, config, key.shape[1]),
        )

    if results[0].numel():
        launch(launch_config(kind, key.device, launch))
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
    outputs: list[Tensor] = []
    kind = Kind(SHARED, k, slots, head_dim, key.element_size())

    def launch(config: LaunchConfig) -> None:
        blocks = -(-num_keys // config.block_n) * heads * batch
        tiles = -(-call.lead[-1] // (config.block_m // slots))
        splits = max(min(_PROGRAMS // blocks, tiles), 1)
        outputs[:] = _shared_outputs(call, splits)
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
            ATOMIC=_atomic(),
            **backward_options(kind, config, num_keys),
        )

    launch(launch_config(kind, key.device, launch))
    return _sum_splits(outputs, key)


def _atomic() -> bool:
    return os.environ.get("MIXKERNELS_DETERMINISTIC", "1") == "0"


def _shared_outputs(call: Call, splits: int) -> list[Tensor]:
    """Memory for the gradients of key and value: one part for each split, or zeros to which all splits add."""
    key = call.key
    if _atomic():
        return [torch.zeros(key.shape, dtype=torch.float32, device=key.device) for _ in range(2)]
    dtype = torch.float32 if splits > 1 or INTERPRET else key.dtype
    return [key.new_empty(splits, *key.shape, dtype=dtype) for _ in range(2)]


def _sum_splits(outputs: list[Tensor], key: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the parts of `_shared_outputs`."""
    dkey, dvalue = ((t if t.dim() == 4 else t.sum(dim=0) if t.shape[0] > 1 else t[0]).to(key.dtype) for t in outputs)
    return dkey, dvalue


def variants() -> list[KernelVariant]:
    """Return all kernels in every launch configuration that is shipped."""
    return [
        *fused_variants(candidate_attention_bwd_fused_kernel),
        *backward_variants(candidate_attention_bwd_candidates_kernel, CANDIDATES, {"HAS_LSE_GRAD": False}),
        *backward_variants(candidate_attention_bwd_shared_kernel, SHARED, {"ATOMIC": False}),
    ]
