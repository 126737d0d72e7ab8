"""Pairs of texts to score, and the check that scores are finite."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.errors import NonFiniteError


class Pairs(NamedTuple):
    """R pairs to score: the number of each one's query and candidate, (R,) int64."""

    query: Tensor
    candidate: Tensor


def check_finite(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Raise if a score is not finite; otherwise return the scores.

    Args:
        scores: of any shape.
        dtype: of the model, for the message.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite (dtype {dtype}); "
            "float32 or bfloat16 have the range that float16 lacks, and a checkpoint may be damaged"
        )
    return scores


def unique(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], Tensor]:
    """Return the distinct token rows in order of appearance, and for every row its number among them."""
    numbers: dict[tuple[int, ...], int] = {}
    number_of = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), torch.tensor(number_of, dtype=torch.int64)
