"""The formulas of the rest of the interaction layer in plain PyTorch; every other backend is tested against them.

Runs on any device, is differentiable, and computes in float64 when given float64 (in float32 otherwise). Read it with
docs/design.md, "Interaction layer" and "Heads". Called by `mixkernels.layer.operators` only, which has checked the
inputs.
"""

import torch
from torch import Tensor


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """``LN(x + residual)``, in the dtype of x."""
    return _layer_norm(_wide(x) + _wide(residual), weight, bias, eps).to(x.dtype).contiguous()


def gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """``LN(z*u + (1-z)*h)`` with ``z = sigmoid(gate)``; no state is the zero state."""
    z, u = _wide(gate).sigmoid(), _wide(update)
    mixed = z * u if state is None else z * u + (1 - z) * _wide(state)
    return _layer_norm(mixed, weight, bias, eps).to(update.dtype).contiguous()


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
    """Scores (B, N) of context rows (B, N, k, d) and state rows (B, N, d)."""
    e = _layer_norm(_wide(context) + _wide(context_residual), weight, bias, eps).mean(dim=-2)
    h = _layer_norm(_wide(state) + _wide(state_residual), weight, bias, eps)
    scores = (h * e).sum(dim=-1)
    return (scores if additive is None else scores + additive.to(scores.dtype)).contiguous()


def score_top_k(
    *rows: Tensor,
    eps: float,
    additive: Tensor | None,
    running_scores: Tensor | None,
    running_ids: Tensor | None,
    top_k: int,
    first_id: int,
) -> tuple[Tensor, Tensor]:
    """Scores and ids (B, at most top_k) of the best of the running ones and those of `score_candidates`."""
    scores = score_candidates(*rows, eps=eps, additive=additive)
    ids = torch.arange(first_id, first_id + scores.shape[-1], device=scores.device).expand(scores.shape)
    if running_scores is not None and running_ids is not None:
        scores, ids = torch.cat([running_scores, scores], dim=-1), torch.cat([running_ids, ids], dim=-1)
    # by id, then by score without moving equals: best first, ties to the lower id; NaN counts as the largest
    by_id = ids.argsort(dim=-1)
    by_score = scores.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    order = by_id.gather(-1, by_score)[:, :top_k]
    return scores.gather(-1, order), ids.gather(-1, order)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * (variance + eps).rsqrt() * weight.to(x.dtype) + bias.to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
