"""The rest of the interaction layer once more, with loops over rows in float64; imports nothing of the project."""

import math

import torch
from torch import Tensor


def norm_by_loops(row: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = math.fsum(row.tolist()) / len(row)
    variance = math.fsum((value - mean) ** 2 for value in row.tolist()) / len(row)
    return (row - mean) / math.sqrt(variance + eps) * weight + bias


def over_rows(rows: list[Tensor], one_row) -> Tensor:
    """Apply a function of one row of each tensor (..., d) to all of them."""
    shape = rows[0].shape
    flat = [tensor.double().expand(shape).reshape(-1, shape[-1]) for tensor in rows]
    return torch.stack([one_row(*parts) for parts in zip(*flat, strict=True)]).view(shape)


def residual_norm_by_loops(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return over_rows([x, residual], lambda a, b: norm_by_loops(a + b, weight.double(), bias.double(), eps))


def gate_norm_by_loops(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    def one_row(logits: Tensor, u: Tensor, h: Tensor) -> Tensor:
        z = 1 / (1 + torch.exp(-logits))
        return norm_by_loops(z * u + (1 - z) * h, weight.double(), bias.double(), eps)

    return over_rows([gate, update, torch.zeros_like(update) if state is None else state], one_row)


def scores_by_loops(context: Tensor, context_residual: Tensor, state: Tensor, state_residual: Tensor, *rest) -> Tensor:
    """Scores (B, N) of context (B, N, k, d) and state (B, N, d); rest is weight, bias, eps, additive (B, N) or None."""
    weight, bias, eps, additive = rest
    rows = residual_norm_by_loops(context, context_residual, weight, bias, eps)
    states = residual_norm_by_loops(state, state_residual, weight, bias, eps)
    scores = torch.zeros(state.shape[:-1], dtype=torch.float64)
    for b in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            e = sum(rows[b, n]) / len(rows[b, n])
            scores[b, n] = math.fsum((states[b, n] * e).tolist())
            if additive is not None:
                scores[b, n] += additive[b, n].double()
    return scores
