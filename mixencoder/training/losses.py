"""The losses: scores or logits in, a scalar out."""

import torch
from torch import Tensor
from torch.nn import functional as F


def ranking_loss(scores: Tensor, targets: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Cross-entropy over candidates: scores (B, N), targets (B,) the right candidate's column.

    excluded (B, N) marks columns that are not negatives of a row: other right documents, and padding.
    """
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(scores, targets)


def graded_loss(scores: Tensor, grades: Tensor, excluded: Tensor) -> Tensor:
    """ListNet (Cao et al. 2007): cross-entropy of the softmax of scores against that of grades, both (B, c).

    excluded (B, c) marks columns that hold no candidate.
    """
    wanted = grades.masked_fill(excluded, -torch.inf).softmax(dim=-1)
    # the log of an excluded column is -inf, and 0 times -inf would be NaN
    found = scores.masked_fill(excluded, -torch.inf).log_softmax(dim=-1).masked_fill(excluded, 0.0)
    return -(wanted * found).sum(dim=-1).mean()


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over classes: logits (B, num_labels), targets (B,)."""
    return F.cross_entropy(logits, targets)


def similarity_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """CoSENT: ``log(1 + sum exp(s_j - s_i))`` over all pairs i, j with target_i > target_j; scores, targets (B,).

    It only asks for an order of the scores, so similarity and ranking can share a head.
    """
    gaps = scores.unsqueeze(0) - scores.unsqueeze(1)
    ordered = targets.unsqueeze(1) > targets.unsqueeze(0)
    gaps = gaps.masked_fill(~ordered, -torch.inf).flatten()
    return torch.cat([gaps.new_zeros(1), gaps]).logsumexp(dim=0)


def margin_mse(scores: Tensor, teacher: Tensor, excluded: Tensor) -> Tensor:
    """Squared error of the margins of column 0 over the others (Hofstätter et al. 2020, arXiv 2010.02666).

    scores and teacher (B, c); excluded (B, c) marks columns that hold no candidate. 0 if no row has two candidates.
    """
    gaps = (scores[:, :1] - scores) - (teacher[:, :1] - teacher)
    counted = ~excluded
    counted[:, 0] = False
    return gaps.masked_fill(~counted, 0.0).square().sum() / counted.sum().clamp_min(1)


def listwise_kl(scores: Tensor, teacher: Tensor, excluded: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(scores / T))`` (Hinton et al. 2015), mean over rows.

    scores and teacher (B, c), of candidates or of classes; excluded (B, c) marks columns that hold none.
    """
    found = (scores / temperature).masked_fill(excluded, -torch.inf).log_softmax(dim=-1).masked_fill(excluded, 0.0)
    wanted = (teacher / temperature).masked_fill(excluded, -torch.inf).log_softmax(dim=-1).masked_fill(excluded, 0.0)
    shares = wanted.exp().masked_fill(excluded, 0.0)
    return temperature**2 * (shares * (wanted - found)).sum(dim=-1).mean()
