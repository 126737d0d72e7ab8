"""`FirstStage`: the protocol of objects that choose the documents to score fully; and a check of what they return."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import InputError


class FirstStage(Protocol):
    """Chooses documents of an index for queries, by the vectors that the dual term compares.

    A document's vector is the mean of its context embeddings, scaled to length 1 (`MixEncoder.dual_vectors`). Documents
    with larger inner products with the query's vector are better.
    """

    def search(self, vectors: np.ndarray, count: int) -> Sequence[Any] | np.ndarray:
        """Return the positions of the best documents of each query.

        Args:
            vectors: (Q, d) float32, one query a row, of length 1.
            count: documents wanted for each query.

        Returns:
            Q rows of integers, in any order, such as an array (Q, count). A row may be shorter; negative numbers and
            repeated ones are ignored.
        """


def chosen_positions(first_stage: FirstStage, vectors: Tensor, count: int, documents: int) -> list[Tensor]:
    """Search a first stage, and return the distinct positions for each query, ascending: (n,) int64 each.

    Args:
        first_stage: searched.
        vectors: (Q, d) float32, on the CPU.
        count: documents wanted for each query.
        documents: of the index.

    Raises:
        InputError: the result is not one row of integers per query, or a position is not one of the index.
    """
    found = first_stage.search(vectors.numpy(), count)
    name = f"first_stage ({type(first_stage).__name__})"
    if len(found) != len(vectors):
        raise InputError(f"{name} returned {len(found)} rows for {len(vectors)} queries; expected one row per query")
    chosen = []
    for row in found:
        positions = np.asarray(row)
        if positions.size == 0:
            positions = np.empty(0, dtype=np.int64)
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise InputError(
                f"{name} returned positions of shape {positions.shape} and dtype {positions.dtype} for a query; "
                "expected a row of integers"
            )
        positions = np.unique(positions[positions >= 0])
        if len(positions) and positions[-1] >= documents:
            raise InputError(
                f"{name} returned the position {positions[-1]}; expected positions below {documents}, the number of "
                "documents. Fill it again with the documents of this index"
            )
        chosen.append(torch.from_numpy(positions.astype(np.int64)))
    return chosen
