"""The losses, one a task: scores or logits in, a scalar out."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ranking_loss(scores: Tensor, targets: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Cross-entropy over candidates: scores (B, N), targets (B,) the right one's column.

    excluded (B, N) marks columns that are right too and therefore no negatives.
    """
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(scores, targets)


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over classes: logits (B, num_labels), targets (B,)."""
    return F.cross_entropy(logits, targets)


def similarity_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """CoSENT: ``log(1 + sum exp(s_j - s_i))`` over all pairs i, j with target_i > target_j; scores, targets (B,).

    Asks for the order of the scores alone, so that similarity and ranking can share a head.
    """
    gaps = scores.unsqueeze(0) - scores.unsqueeze(1)
    ordered = targets.unsqueeze(1) > targets.unsqueeze(0)
    gaps = gaps.masked_fill(~ordered, -torch.inf).flatten()
    return torch.cat([gaps.new_zeros(1), gaps]).logsumexp(dim=0)
