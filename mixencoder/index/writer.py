"""What a writer does with documents, under the lock: encode, and commit with `mixencoder.index.transaction`."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import DuplicateIdError, IndexDamagedError, IndexStateError, InputError
from mixencoder.index.catalogue import Catalogue, EntryRecord
from mixencoder.index.documents import Document, batches
from mixencoder.index.folder import Generation
from mixencoder.index.naming import naming
from mixencoder.index.rows import RowMap
from mixencoder.index.transaction import Transaction, transaction
from mixencoder.index.verification import Verification
from mixencoder.index.view import known_heads
from mixencoder.progress import NoProgress, ProgressBar

COMMIT_TEXTS = 1024
"""Texts encoded, and committed where that is piecemeal, at once."""


class Encoded(NamedTuple):
    """What an encode function returns.

    Attributes:
        fields: name -> ``(R, *shape)``, the rows of all texts in order.
        row_counts: rows of each text, at least 1, adding up to R.
        cut: texts that were truncated.
    """

    fields: dict[str, Tensor]
    row_counts: list[int]
    cut: int = 0


class Encode(Protocol):
    """What turns texts into rows."""

    def __call__(self, texts: Sequence[str], *, batch_size: int) -> Encoded:
        """Encode texts, batch_size of them at once."""


class AddResult(NamedTuple):
    """What became of documents: added anew, put in place of others, held already, and texts that were truncated."""

    added: int = 0
    replaced: int = 0
    skipped: int = 0
    cut: int = 0


class Project(Protocol):
    """What turns given embeddings into rows."""

    def __call__(self, embeddings: Tensor, /) -> dict[str, Tensor]:
        """Return the fields (N, *shape) of embeddings (N, ...), one row each."""


class Repair(NamedTuple):
    """What `CandidateIndex.repair` did: documents encoded again, and documents lost, by id."""

    encoded: list[str]
    lost: list[str]


class Writer:
    """Changes a generation; every method is one transaction but for `add`, one a group.

    Args:
        generation: what to change, under the lock.
        encode, project: what makes rows; None refuses texts or embeddings.
        batch_size: texts encoded at once.
        progress: told of every document.
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
        """Add documents that are not held; resuming, given ids that were held before are skipped as well.

        Raises:
            DuplicateIdError: a given id is held, or an id by content holds other content.
        """
        resumed = self._catalogue.committed_rows() if resuming else 0
        added = skipped = cut = 0
        try:
            for group in groups:
                fresh = _unheld(self._catalogue, group, resumed)
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
        """Put documents in place of those of the same ids.

        Raises:
            UnknownIdError: there is no such document.
        """
        row_map = self._catalogue.row_map()
        heads = known_heads(self._catalogue, row_map, [item.id for item in documents])
        if keep_metadata:
            old = self._catalogue.entries(list(heads.values()))
            documents = [item._replace(metadata=old[heads[item.id]].metadata) for item in documents]
        cut = self._replace(documents, _rows_of(row_map, heads.values()))
        return AddResult(replaced=len(documents), cut=cut)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove documents and return how many.

        Raises:
            UnknownIdError: there is no such document.
        """
        row_map = self._catalogue.row_map()
        heads = known_heads(self._catalogue, row_map, ids)
        self._replace([], _rows_of(row_map, heads.values()))
        return len(heads)

    def repair(self, report: Verification) -> Repair:
        """Encode damaged documents again from their texts and remove those without.

        Raises:
            IndexDamagedError: what is damaged is more than documents.
        """
        hopeless = [damage for damage in report.damages if not damage.heads]
        if hopeless:
            raise IndexDamagedError(f"this cannot be repaired: {hopeless[0]}")
        heads = sorted({head for damage in report.damages for head in damage.heads})
        spoiled = {head for damage in report.damages if damage.file == self._catalogue.name for head in damage.heads}
        entries = self._catalogue.entries(heads, check=False)
        good = [entries[head] for head in heads if head not in spoiled and entries[head].text is not None]
        kept = {entry.row for entry in good}
        documents = [
            Document(number, entry.id, True, entry.digest, entry.text, entry.metadata, None)
            for number, entry in enumerate(good)
        ]
        if heads:
            self._arrays.pad(self._catalogue.committed_rows())
            with transaction(self._catalogue, self._arrays, self._manifest.schema) as current:
                current.remove(_rows_of(self._catalogue.row_map(), heads))
                # all documents of a damaged block are among these
                current.renew_last_block()
                for batch in batches(documents, COMMIT_TEXTS):
                    self._append(current, batch)
        return Repair([entry.id for entry in good], [entries[head].id for head in heads if head not in kept])

    def _replace(self, documents: Sequence[Document], removed: np.ndarray | None = None) -> int:
        """Remove rows and add documents in one transaction; returns how many were cut."""
        with transaction(self._catalogue, self._arrays, self._manifest.schema) as current:
            if removed is not None:
                current.remove(removed)
            return sum(self._append(current, batch) for batch in batches(documents, COMMIT_TEXTS))

    def _append(self, current: Transaction, batch: Sequence[Document]) -> int:
        encoded = self._encoded(batch)
        heads = current.append(encoded.fields, encoded.row_counts)
        keep_text = self._manifest.store_text
        current.enter(
            [
                EntryRecord(row, item.id, item.digest, item.metadata, item.text if keep_text else None)
                for row, item in zip(heads, batch, strict=True)
            ]
        )
        self._progress.update(len(batch))
        return encoded.cut

    def _encoded(self, batch: Sequence[Document]) -> Encoded:
        # either all documents of a call come as embeddings, or none
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
                f"{sum(counts)}; expected a positive count a document, adding up to the rows"
            )
        return Encoded(fields, counts, encoded.cut)


def _unheld(catalogue: Catalogue, group: Sequence[Document], resumed: int) -> list[Document]:
    """Return the documents that the index does not hold yet.

    Raises:
        DuplicateIdError: a given id is held, or one by content names another text.
    """
    held = catalogue.live([item.id for item in group])
    fresh: dict[str, Document] = {}
    taken, changed = [], []
    for item in group:
        if item.id not in held:
            # twice in one group is an id by content, as given ones were checked or the group is an iterator's
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
            f"the index holds ids already, or they are given twice: {naming(taken)}; use update() to replace documents"
        )
    if changed:
        raise DuplicateIdError(
            f"the index holds other content under ids {naming(changed)}; give these documents ids of their own, or use "
            "update()"
        )
    return list(fresh.values())


def _rows_of(row_map: RowMap, heads: Iterable[int]) -> np.ndarray:
    """Return all rows of documents by their first rows: (R,) int64."""
    return row_map.spans_of(np.array(list(heads), dtype=np.int64))[0]
