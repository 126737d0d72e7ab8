"""Filling an index with the documents of another, whose rows a function converts."""

from typing import Protocol

import numpy as np
from torch import Tensor

from mixencoder.errors import IndexStateError
from mixencoder.index.folder import Generation
from mixencoder.index.transaction import transaction
from mixencoder.index.view import Listing, Snapshot
from mixencoder.progress import ProgressBar

COMMIT_DOCUMENTS = 1024
"""Documents of one transaction."""


class Convert(Protocol):
    """A function that turns the stored rows of one index into those of another."""

    def __call__(self, fields: dict[str, Tensor], /) -> dict[str, Tensor]:
        """Return the new fields (R, *shape) of rows, given their stored fields."""


def copy_documents(source: Snapshot, target: Generation, convert: Convert, progress: ProgressBar) -> None:
    """Append the documents of a view that an unfinished index lacks, in the same order; only under the lock.

    Args:
        source: the documents; ids, texts, metadata, and which rows belong to which document are copied.
        target: holds the first documents of the source, from an interrupted call, or none.
        convert: makes the rows.
        progress: updated for every document.

    Raises:
        IndexStateError: the target holds other documents.
    """
    catalogue, manifest = target.writer(), target.manifest
    held = Listing(catalogue, catalogue.row_map())
    if (
        held.removed_rows
        or any(id != other for id, other in zip(held, source, strict=False))
        or len(held) > len(source)
    ):
        raise IndexStateError(
            f"{catalogue.name} is unfinished and holds other documents than the first of the index to copy; delete its "
            "folder, or choose another"
        )
    progress.update(len(held))
    for first in range(len(held), len(source), COMMIT_DOCUMENTS):
        positions = np.arange(first, min(first + COMMIT_DOCUMENTS, len(source)))
        chunk, entries = source.gather(positions), source.records(positions)
        fields, _ = manifest.schema.check(convert(chunk.fields))
        with transaction(catalogue, target.arrays, manifest.schema) as current:
            first_rows = current.append(fields, np.bincount(chunk.positions - first).tolist())
            current.add_entries(
                [
                    entry._replace(row=row, text=entry.text if manifest.store_text else None)
                    for row, entry in zip(first_rows, entries, strict=True)
                ]
            )
        progress.update(len(positions))
