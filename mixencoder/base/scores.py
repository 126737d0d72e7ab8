"""Pairs of texts to score, and what is asked of every score."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.errors import NonFiniteError


class Pairs(NamedTuple):
    """Rows to score: query number and candidate number of each, (R,) int64, sorted by query."""

    query: Tensor
    candidate: Tensor


def check_finite(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scores as they are; dtype is that of the model, for the message.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite (dtype {dtype}); "
            "float32 or bfloat16 have the range that float16 lacks, and a checkpoint may be damaged"
        )
    return scores


def unique(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], Tensor]:
    """Return distinct token rows in order of appearance, and for every row its number among them."""
    numbers: dict[tuple[int, ...], int] = {}
    place = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), torch.tensor(place, dtype=torch.int64)
