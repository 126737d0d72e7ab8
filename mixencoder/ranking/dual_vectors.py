"""The vectors that the dual term compares, out of an index's rows: for vector indexes, its own and those of others."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import IndexMismatchError
from mixencoder.index import Snapshot
from mixencoder.ranking.record_format import mean_over_contexts

_LEAST_LENGTH = 1e-8
"""As in the dual term (`mixencoder.ranking.interaction`)."""


class DualVectors(NamedTuple):
    """Vectors of some rows of an index.

    Attributes:
        positions: (R,) int64, for every row the position of the document that it belongs to.
        vectors: (R, d) float32, of length 1.
    """

    positions: np.ndarray
    vectors: np.ndarray


def dual_vectors(view: Snapshot, size: int) -> Iterator[DualVectors]:
    """Yield the vectors of all rows, in order, at most `size` at once.

    Raises:
        IndexMismatchError: the rows are not a MixEncoder's.
    """
    for chunk in view.chunks(size):
        yield DualVectors(chunk.positions, pooled(chunk.fields))


def pooled(fields: Mapping[str, Tensor]) -> np.ndarray:
    """Return the means of context embeddings, scaled to length 1, (R, d) float32, out of the fields of R rows.

    Raises:
        IndexMismatchError: the rows are not a MixEncoder's.
    """
    # without context update the layout "projected" stores only the mean
    name = next((name for name in ("hint", "context") if name in fields), None)
    if name is None:
        raise IndexMismatchError(
            f"the index has the fields {', '.join(fields)}; expected context embeddings, as a MixEncoder stores them"
        )
    with torch.no_grad():
        part = fields[name].cpu().to(torch.float32, copy=True)
        if (scale := fields.get(f"{name}_scale")) is not None:
            part.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.cpu().float().unsqueeze(-1))
        mean = mean_over_contexts(part) if name == "context" else part
        return mean.div_(mean.norm(dim=-1, keepdim=True).clamp_min_(_LEAST_LENGTH)).numpy()
