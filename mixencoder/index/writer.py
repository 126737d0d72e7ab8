"""Adding, replacing, removing and repairing documents, under the lock, in the transactions of `transaction`."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import DuplicateIdError, IndexDamagedError, IndexStateError, InputError
from mixencoder.index.catalogue import Catalogue, EntryRecord
from mixencoder.index.documents import Document, batches
from mixencoder.index.folder import Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.messages import quoted_ids
from mixencoder.index.rows import RowMap
from mixencoder.index.transaction import Transaction, transaction
from mixencoder.index.verification import Verification
from mixencoder.index.view import known_first_rows
from mixencoder.progress import NoProgress, ProgressBar

COMMIT_TEXTS = 1024
"""Texts encoded at once; also the documents of one transaction when adding from an iterator."""


class Encoded(NamedTuple):
    """The result of an encode function.

    Attributes:
        fields: name -> ``(R, *shape)``, the rows of all texts in order.
        row_counts: rows of each text, at least 1, adding up to R.
        cut: number of texts that were truncated.
    """

    fields: dict[str, Tensor]
    row_counts: list[int]
    cut: int = 0


class Encode(Protocol):
    """A function that turns texts into rows."""

    def __call__(self, texts: Sequence[str], *, batch_size: int) -> Encoded:
        """Encode texts, batch_size at once."""


class AddResult(NamedTuple):
    """Numbers of documents that were added, replaced, or skipped because the index holds them, and of texts cut."""

    added: int = 0
    replaced: int = 0
    skipped: int = 0
    cut: int = 0


class Project(Protocol):
    """A function that turns embeddings into rows."""

    def __call__(self, embeddings: Tensor, /) -> dict[str, Tensor]:
        """Return the fields (N, *shape) of embeddings (N, ...), one row each."""


class CheckAdding(Protocol):
    """A function that decides whether what encode and project make belongs in an index."""

    def __call__(self, what: str, manifest: Manifest, /) -> None:
        """Raise IndexMismatchError if it does not; `what` names the index, for the message."""


class Repair(NamedTuple):
    """The result of `CandidateIndex.repair`: ids of documents that were encoded again, and of documents removed."""

    encoded: list[str]
    lost: list[str]


class Writer:
    """Changes a generation; every method is one transaction, but `add` is one per group.

    Args:
        generation: the generation to change, under the lock.
        encode, project: make rows; with None, texts or embeddings raise.
        batch_size: texts encoded at once.
        progress: updated for every document.
    """

    def __init__(
        self,
        generation: Generation,
        encode: Encode | None,
        project: Project | None,
        batch_size: int = 32,
        progress: ProgressBar | None = None,
    ) -> None:
        self._catalogue, self._arrays, self._manifest = generation.writer(), generation.arrays, generation.manifest
        self._encode, self._project, self._batch_size = encode, project, batch_size
        self._progress = NoProgress() if progress is None else progress

    def add(self, groups: Iterable[list[Document]], *, resuming: bool = False) -> AddResult:
        """Add the documents that the index does not hold.

        Args:
            groups: documents, one transaction per group.
            resuming: also skip given ids that earlier calls committed.

        Raises:
            DuplicateIdError: the index holds a given id, or holds other content under an id.
        """
        resumed = self._catalogue.committed_rows() if resuming else 0
        added = skipped = cut = 0
        try:
            for group in groups:
                fresh = _not_in_index(self._catalogue, group, resumed)
                self._progress.update(len(group) - len(fresh))
                if fresh:
                    cut += self._replace(fresh)
                added, skipped = added + len(fresh), skipped + len(group) - len(fresh)
        except Exception as error:
            if added > 0:
                error.add_note(f"{added:,} documents had been committed before and stay in the index")
            raise
        return AddResult(added=added, skipped=skipped, cut=cut)

    def update(self, documents: Sequence[Document], *, keep_metadata: bool) -> AddResult:
        """Replace the documents with the same ids.

        Raises:
            UnknownIdError: there is no such document.
        """
        row_map = self._catalogue.row_map()
        first_rows = known_first_rows(self._catalogue, row_map, [item.id for item in documents])
        if keep_metadata:
            old = self._catalogue.entries(list(first_rows.values()))
            documents = [item._replace(metadata=old[first_rows[item.id]].metadata) for item in documents]
        cut = self._replace(documents, _rows_of(row_map, first_rows.values()))
        return AddResult(replaced=len(documents), cut=cut)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove documents and return how many.

        Raises:
            UnknownIdError: there is no such document.
        """
        row_map = self._catalogue.row_map()
        first_rows = known_first_rows(self._catalogue, row_map, ids)
        self._replace([], _rows_of(row_map, first_rows.values()))
        return len(first_rows)

    def repair(self, report: Verification) -> Repair:
        """Encode damaged documents again from their texts and remove those without a text.

        Raises:
            IndexDamagedError: damage is not limited to documents.
        """
        beyond_repair = [damage for damage in report.damages if not damage.heads]
        if beyond_repair:
            raise IndexDamagedError(f"this cannot be repaired: {beyond_repair[0]}")
        rows = sorted({row for damage in report.damages for row in damage.heads})
        bad_entries = {row for damage in report.damages if damage.file == self._catalogue.name for row in damage.heads}
        entries = self._catalogue.entries(rows, check=False)
        kept = [entries[row] for row in rows if row not in bad_entries and entries[row].text is not None]
        kept_rows = {entry.row for entry in kept}
        documents = [
            Document(number, entry.id, True, entry.digest, entry.text, entry.metadata, None)
            for number, entry in enumerate(kept)
        ]
        if rows:
            self._arrays.pad(self._catalogue.committed_rows())
            with transaction(self._catalogue, self._arrays, self._manifest.schema) as current:
                current.remove(_rows_of(self._catalogue.row_map(), rows))
                # if the last block is damaged, all its documents are removed here, so no row of it stays live
                current.recompute_last_checksums()
                for batch in batches(documents, COMMIT_TEXTS):
                    self._append(current, batch)
        return Repair([entry.id for entry in kept], [entries[row].id for row in rows if row not in kept_rows])

    def _replace(self, documents: Sequence[Document], removed: np.ndarray | None = None) -> int:
        """Remove rows and add documents in one transaction; return the number of texts cut."""
        with transaction(self._catalogue, self._arrays, self._manifest.schema) as current:
            if removed is not None:
                current.remove(removed)
            return sum(self._append(current, batch) for batch in batches(documents, COMMIT_TEXTS))

    def _append(self, current: Transaction, batch: Sequence[Document]) -> int:
        encoded = self._encoded(batch)
        first_rows = current.append(encoded.fields, encoded.row_counts)
        keep_text = self._manifest.store_text
        current.add_entries(
            [
                EntryRecord(row, item.id, item.digest, item.metadata, item.text if keep_text else None)
                for row, item in zip(first_rows, batch, strict=True)
            ]
        )
        self._progress.update(len(batch))
        return encoded.cut

    def _encoded(self, batch: Sequence[Document]) -> Encoded:
        # all documents of a call have embeddings, or none has
        embeddings = [item.embedding for item in batch if item.embedding is not None]
        if embeddings and self._project is not None:
            encoded = Encoded(self._project(torch.stack(embeddings)), [1] * len(batch))
        elif not embeddings and self._encode is not None:
            texts = [item.text for item in batch if item.text is not None]
            encoded = self._encode(texts, batch_size=self._batch_size)
        else:
            what = "embeddings" if embeddings else "texts"
            raise IndexStateError(f"the index was opened without a model, so it cannot take {what}; open it with one")
        fields, rows = self._manifest.schema.check(encoded.fields)
        counts = encoded.row_counts
        if len(counts) != len(batch) or min(counts) < 1 or sum(counts) != rows:
            raise InputError(
                f"encoding {len(batch)} documents gave {rows} rows and {len(counts)} row counts that add up to "
                f"{sum(counts)}; expected a positive count per document, adding up to the rows"
            )
        return Encoded(fields, counts, encoded.cut)


def _not_in_index(catalogue: Catalogue, group: Sequence[Document], resumed: int) -> list[Document]:
    """Return the documents that the index does not hold; given ids below row number `resumed` are skipped too.

    Raises:
        DuplicateIdError: the index holds a given id, or holds other content under an id.
    """
    held = catalogue.live([item.id for item in group])
    fresh: dict[str, Document] = {}
    taken, changed = [], []
    for item in group:
        if item.id not in held:
            # given ids can repeat only in an iterator, as lists were checked; ids by content may repeat
            if item.given and item.id in fresh:
                taken.append(item.id)
            fresh.setdefault(item.id, item)
            continue
        row, digest = held[item.id]
        if item.given and row >= resumed:
            taken.append(item.id)
        elif digest != item.digest:
            changed.append(item.id)
    if taken:
        raise DuplicateIdError(
            f"the index already holds these ids, or they are given twice: {quoted_ids(taken)}; expected new ids. Use "
            "update() to replace documents"
        )
    if changed:
        raise DuplicateIdError(
            f"the index holds other content under ids {quoted_ids(changed)}; give these documents new ids, or use "
            "update()"
        )
    return list(fresh.values())


def _rows_of(row_map: RowMap, first_rows: Iterable[int]) -> np.ndarray:
    """Return all rows of documents, given their first rows: (R,) int64."""
    return row_map.all_rows_of(np.array(list(first_rows), dtype=np.int64))[0]
