"""The rest of the interaction layer without Triton: tuned for CPU, runs on any device.

With gradients these are plain differentiable expressions. Without, a CPU works in chunks of candidates that stay in its
cache, and in place on its own intermediates. Called by `mixkernels.layer.operators` only.

The bits of a result row depend only on that row's inputs, not on its position, its neighbours or the number of rows:
sums and products round once, LayerNorm and the row sum go row by row, and the sigmoid, which PyTorch computes by
different code for whole vectors and for a remainder, runs over whole vectors only (see `_sigmoid`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mixkernels.packed_keys import best_of, pack_keys
from mixkernels.tensors import needs_grad

_CHUNK = 2**19
"""Elements of a chunk of LayerNorm and gate: larger chunks leave the cache, smaller ones take too many calls."""

_SCORE_CHUNK = 2**17
"""Elements of a chunk of context rows in scoring, which holds several intermediates of that size."""

_VECTOR = 32
"""Elements of two vectors of float32 with AVX-512, the step of PyTorch's elementwise kernels."""

_GRAIN = 2**15
"""Fewest elements that PyTorch gives to a thread of an elementwise kernel."""


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Same contract as `mixkernels.layer.reference.residual_layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if needs_grad(x, residual, weight, bias) or x.device.type != "cpu" or x.numel() <= _CHUNK:
        return _layer_norm(x.to(wide) + residual.to(wide), weight, bias, eps).to(x.dtype)
    out = x.new_empty(x.shape)
    for one_x, one_residual, one_out in _chunks(_CHUNK, x.dim() - 1, x, residual, out):
        # with equal dtypes the sum is computed in the output: new pages of memory would cost more than the sum
        total = one_out if out.dtype == wide else None
        one_out.copy_(_layer_norm(torch.add(one_x.to(wide), one_residual.to(wide), out=total), weight, bias, eps))
    return out


def gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """Same contract as `mixkernels.layer.reference.gate_layer_norm`."""
    wide = torch.promote_types(update.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if update.device.type != "cpu" or needs_grad(gate, update, state, weight, bias):
        z, u = gate.to(wide).sigmoid(), update.to(wide)
        mixed = z * u if state is None else z * u + (1 - z) * state.to(wide)
        return _layer_norm(mixed, weight, bias, eps).to(update.dtype)
    out = update.new_empty(update.shape)
    d = update.shape[-1]
    tensors = [tensor.reshape(-1, d) for tensor in (gate, update, *(() if state is None else (state,)))]
    rows = out.view(-1, d)
    for start, stop in _whole_vector_parts(*rows.shape):
        one_gate, one_update, *one_state = (tensor[start:stop] for tensor in tensors)
        one_out, u = rows[start:stop], one_update.to(wide)
        z = _sigmoid(one_gate, wide, one_out if out.dtype == wide else None)
        mixed = torch.lerp(one_state[0].to(wide), u, z, out=z) if one_state else z.mul_(u)
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
    """Same contract as `mixkernels.layer.reference.score_candidates`."""
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
        # row by row: the order of torch.sum over k would depend on the number of candidates
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
    """Same contract as `mixkernels.layer.reference.score_top_k`."""
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
    """Return the top-k of float64 scores, which cannot be packed with an id into 64 bits."""
    if running_scores is not None and running_ids is not None:
        scores, ids = torch.cat([running_scores, scores], dim=-1), torch.cat([running_ids, ids], dim=-1)
    ids, by_id = ids.sort(dim=-1)
    scores, by_score = scores.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k].contiguous(), ids.gather(-1, by_score[:, :top_k])


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _sigmoid(gate: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Sigmoid of rows (n, d) of `_whole_vector_parts`: in `out` if d is whole vectors, else of rows padded to those."""
    width = gate.shape[-1]
    if width % _VECTOR == 0:
        return torch.sigmoid(gate.to(dtype).contiguous(), out=out)
    padded = gate.new_zeros(len(gate), _padded(width), dtype=dtype)
    padded[:, :width].copy_(gate)
    return padded.sigmoid_()[:, :width]


def _padded(width: int) -> int:
    return -(-width // _VECTOR) * _VECTOR


def _whole_vector_parts(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut rows into parts (start, stop) in which each thread of an elementwise kernel has only whole vectors.

    PyTorch computes whole vectors and a remainder by different code, so a value's bits would depend on where a thread's
    share ends. Threads get equal shares, but one thread takes everything below two grains. So a part has an equal
    number of rows for each thread, padded to whole vectors, or is small enough for one thread.
    """
    threads, width = torch.get_num_threads(), _padded(width)
    start, small = 0, max(1, (_GRAIN - 1) // width)
    # with fewer rows some threads would have no share
    least = max(threads, -(-threads * _GRAIN // width // threads) * threads)
    large = max(least, _CHUNK // width // threads * threads)
    while start < rows:
        left = rows - start
        size = min(large, left // threads * threads) if left >= least else min(small, left)
        yield start, start + size
        start += size


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
