"""The rest of the interaction layer without Triton: CPU first, any device.

With gradients these are plain differentiable expressions. Without, a CPU works in chunks of candidates that stay in its
cache, and in place where the tensor is this call's own. Called by `mixkernels.layer_ops` only.

A row's bits depend on that row alone, whatever its place, its neighbours and the number of rows: sums and products are
single roundings, LayerNorm and the row sum go row by row, and the sigmoid, whose vector and tail code differ, only ever
runs over whole vectors (see `_sigmoid`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mixkernels.ranking import best_of, pack_keys
from mixkernels.tensors import needs_grad

_NORM_CHUNK = 2**20
"""Elements of a chunk of the LayerNorms: larger ones go through memory, smaller ones through many calls."""

_SCORE_CHUNK = 2**17
"""Elements of a chunk of context rows in scoring, which holds several intermediates of that size."""

_GATE_CHUNK = 32 * 1000
"""Elements of a chunk of the gate: PyTorch runs fewer than 32768 in one thread, so no thread's end is a tail."""

_VECTOR = 32
"""Elements of two vectors of float32 with AVX-512, the step of PyTorch's elementwise kernels."""


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Same contract as `mixkernels.reference.layer.residual_layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if needs_grad(x, residual, weight, bias) or x.device.type != "cpu" or x.numel() <= _NORM_CHUNK:
        return _layer_norm(x.to(wide) + residual.to(wide), weight, bias, eps).to(x.dtype)
    out = x.new_empty(x.shape)
    for one_x, one_residual, one_out in _chunks(_NORM_CHUNK, x.dim() - 1, x, residual, out):
        one_out.copy_(_layer_norm(one_x.to(wide) + one_residual.to(wide), weight, bias, eps))
    return out


def gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """Same contract as `mixkernels.reference.layer.gate_layer_norm`."""
    wide = torch.promote_types(update.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if update.device.type != "cpu" or needs_grad(gate, update, state, weight, bias):
        z, u = gate.to(wide).sigmoid(), update.to(wide)
        mixed = z * u if state is None else z * u + (1 - z) * state.to(wide)
        return _layer_norm(mixed, weight, bias, eps).to(update.dtype)
    out = update.new_empty(update.shape)
    states = () if state is None else (state,)
    chunks = _chunks(_GATE_CHUNK, gate.dim() - 1, gate, update, out, *states)
    for one_gate, one_update, one_out, *one_state in chunks:
        z = _sigmoid(one_gate, wide)
        if one_state:
            h = one_state[0].to(wide)
            # h + z (u - h)
            mixed = torch.sub(one_update.to(wide), h).mul_(z).add_(h)
        else:
            mixed = z.mul_(one_update)
        one_out.copy_(_layer_norm(mixed, weight, bias, eps))
    return out


def score_candidates(
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    additive: Tensor | None,
) -> Tensor:
    """Same contract as `mixkernels.reference.layer.score_candidates`."""
    wide = torch.promote_types(state.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if state.device.type != "cpu" or needs_grad(context, context_residual, state, state_residual, weight, bias):
        e = _layer_norm(context.to(wide) + context_residual.to(wide), weight, bias, eps).mean(dim=-2)
        h = _layer_norm(state.to(wide) + state_residual.to(wide), weight, bias, eps)
        scores = (h * e).sum(dim=-1)
        return scores if additive is None else scores + additive.to(wide)
    scores = state.new_empty(state.shape[:-1], dtype=wide)
    # of n candidates: (n, k, d) twice, (n, d) twice, (n,)
    chunks = _chunks(_SCORE_CHUNK, 2, context, context_residual, state, state_residual, scores)
    for c, c_residual, s, s_residual, out in chunks:
        rows = _layer_norm(c.to(wide) + c_residual.to(wide), weight, bias, eps)
        # one addition after the other: the order of a sum over k would depend on the number of candidates
        e = rows[..., 0, :]
        for i in range(1, rows.shape[-2]):
            e.add_(rows[..., i, :])
        h = _layer_norm(s.to(wide) + s_residual.to(wide), weight, bias, eps)
        torch.sum(h.mul_(e), dim=-1, out=out)
    if context.shape[-2] > 1:
        scores.div_(context.shape[-2])
    return scores if additive is None else scores.add_(additive.to(wide))


def score_top_k(
    *rows: Tensor,
    eps: float,
    additive: Tensor | None,
    running_scores: Tensor | None,
    running_ids: Tensor | None,
    top_k: int,
    first_id: int,
) -> tuple[Tensor, Tensor]:
    """Same contract as `mixkernels.reference.layer.score_top_k`."""
    scores = score_candidates(*rows, eps=eps, additive=additive)
    ids = torch.arange(first_id, first_id + scores.shape[-1], device=scores.device)
    if scores.dtype == torch.float64:
        return _top_k_by_sorting(scores, ids.expand(scores.shape), running_scores, running_ids, top_k)
    keys = pack_keys(scores, ids)
    if running_scores is not None and running_ids is not None:
        keys = torch.cat([pack_keys(running_scores, running_ids), keys], dim=-1)
    return best_of(keys, top_k)


def _top_k_by_sorting(
    scores: Tensor, ids: Tensor, running_scores: Tensor | None, running_ids: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """The best where a score has 64 bits of its own and cannot be packed with an id."""
    if running_scores is not None and running_ids is not None:
        scores, ids = torch.cat([running_scores, scores], dim=-1), torch.cat([running_ids, ids], dim=-1)
    ids, by_id = ids.sort(dim=-1)
    scores, by_score = scores.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k].contiguous(), ids.gather(-1, by_score[:, :top_k])


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _sigmoid(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Sigmoid of a chunk (..., d), bits depending on the value alone.

    PyTorch computes whole vectors and what is left over at the end by different code: rows are padded to whole vectors.
    """
    width = gate.shape[-1]
    if width % _VECTOR == 0:
        return gate.to(dtype).contiguous().sigmoid()
    padded = gate.new_zeros(*gate.shape[:-1], -(-width // _VECTOR) * _VECTOR, dtype=dtype)
    padded[..., :width].copy_(gate)
    return padded.sigmoid_()[..., :width]


def _chunks(elements: int, depth: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors that share their first `depth` dimensions into views, at most `elements` of the first in each."""
    first = tensors[0]
    if first.numel() <= elements or depth == 0:
        yield tensors
        return
    per_index = first.numel() // first.shape[0]
    if per_index > elements and depth > 1:
        for parts in zip(*(tensor.unbind() for tensor in tensors), strict=True):
            yield from _chunks(elements, depth - 1, *parts)
    else:
        rows = max(1, elements // per_index)
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)
