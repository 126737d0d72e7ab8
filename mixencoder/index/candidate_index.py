"""CandidateIndex: candidates encoded once, kept on disk or in memory, updated in transactions, read by many.

Knows no model: only rows of named arrays, ids, a fingerprint of what encoded them, and the functions that turn texts
and embeddings into rows. `mixencoder.fast.MixEncoder` makes and opens indexes; docs/candidate-index.md says what is
promised.
"""

import dataclasses
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from torch import Tensor

from mixencoder.base.inputs import positive_integer
from mixencoder.errors import IndexDamagedError, IndexStateError
from mixencoder.index.compaction import compact
from mixencoder.index.current_state import Current
from mixencoder.index.documents import Document, batches, check_distinct, id_list, json_object, read_documents
from mixencoder.index.folder import FolderStore, Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.memory import MemoryStore
from mixencoder.index.schema import Schema
from mixencoder.index.shards import rows_per_shard
from mixencoder.index.verification import Verification, verify
from mixencoder.index.view import Entry, Snapshot
from mixencoder.index.writer import COMMIT_TEXTS, AddResult, Encode, Project, Repair, Writer
from mixencoder.progress import ProgressBar, progress_bar

_ENTRY_BYTES = 96
"""Bytes of SQLite a document beside its text, measured with 32-character ids."""


class Estimate(NamedTuple):
    """Bytes that documents will take: of the array files exactly, of the catalogue roughly."""

    arrays: int
    catalogue: int


class BuildEstimate(NamedTuple):
    """What building an index will take; estimated before any work."""

    documents: int
    array_bytes: int
    """Of the array files: exactly with one row a document; extrapolated from some of the texts where long ones are
    split into several."""
    catalogue_bytes: int
    """Of ids and texts, roughly."""
    seconds: float
    """Extrapolated from encoding some of the texts here and now."""


class CandidateIndex:
    """Documents and the rows encoded from them; made by `create`, opened by `open`.

    Every method sees the newest commit, of this or any other process; for several reads of one state take a
    `snapshot`. Documents iterate in the order in which they were added; an update moves a document to the end. Safe to
    use from several threads: one may write while others read. Not across a fork: open it in each process, which a child
    is told. Neither copied nor pickled.

    Attributes:
        path: the folder, or None in memory.
        read_only: whether writing is refused.
    """

    def __init__(
        self,
        store: FolderStore | MemoryStore,
        *,
        encode: Encode | None = None,
        project: Project | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = store.path if isinstance(store, FolderStore) else None
        self.read_only = read_only
        self._encode, self._project = encode, project
        self._current = Current(store)

    @classmethod
    def create(
        cls,
        path: str | Path | None,
        schema: Schema,
        fingerprint: Mapping[str, str],
        *,
        encode: Encode | None = None,
        project: Project | None = None,
        settings: Mapping[str, Any] | None = None,
        store_text: bool = True,
    ) -> Self:
        """Make an index that `build` fills, or go on with one whose building was interrupted.

        Args:
            path: a new or empty folder, or one that holds an unfinished index; None stays in memory.
            schema: the fields of a row.
            fingerprint: what encodes the documents, by part; "name" is for people and never compared.
            encode: turns texts into rows.
            project: turns embeddings (N, ...) into fields, one row each.
            settings: JSON-able, kept for whoever opens the index.
            store_text: keep texts.

        Raises:
            IndexStateError: a complete index or something else is there.
            IndexMismatchError: an unfinished index is there that something else began.
            IndexLockedError, IndexStorageError: somebody is building it, or the folder cannot be written.
        """
        # as JSON gives it back, since an unfinished index must have the same
        kept = json.loads(json_object(dict(settings or {}), "settings"))
        manifest = Manifest(schema, dict(fingerprint), kept, store_text, rows_per_shard(schema), False)
        store = MemoryStore() if path is None else FolderStore(path)
        index = cls(store, encode=encode, project=project)
        if store.prepare():
            index._check_resumable(manifest)
        with store.lock():
            if store.prepare():
                index._check_resumable(manifest)
            else:
                store.publish(store.new_generation(manifest))
        return index

    @classmethod
    def open(
        cls,
        path: str | Path,
        fingerprint: Mapping[str, str] | None,
        *,
        encode: Encode | None = None,
        project: Project | None = None,
        read_only: bool = False,
        check_sizes: bool = True,
        verify: bool = False,
    ) -> Self:
        """Open an index; nothing is written, so the folder may be read-only, and any number may have it open.

        Args:
            path: the folder; a leading ``~`` is the home folder.
            fingerprint: as in `create`; None opens whatever made it, to look at, verify, remove or compact.
            encode, project: as in `create`.
            read_only: refuse writing.
            check_sizes: refuse an index whose array files are too short; False for `verify` and `repair`.
            verify: read everything and refuse an index that is damaged anywhere; otherwise a flipped bit of an array
                is not seen when opening, nor when ranking.

        Raises:
            InputError: the path cannot be one.
            IndexStateError: there is no index, it is unfinished, or its format is newer.
            IndexMismatchError: something else made it; the message names both and the parts that differ.
            IndexDamagedError: files are missing, cut short or unreadable; with verify, anything is damaged.
            IndexStorageError: the system refuses to read it.
        """
        index = cls(FolderStore(path), encode=encode, project=project, read_only=read_only)
        manifest = index._current.generation().manifest
        if fingerprint is not None:
            manifest.check_fingerprint(str(path), fingerprint)
        if not manifest.complete:
            raise IndexStateError(
                f"{path} is unfinished: building it was interrupted after {len(index):,} documents; build it again "
                "with the same documents, those committed are not encoded again"
            )
        if verify and not (report := index.verify()).ok:
            more = f" (and {len(report.damages) - 1} more: see verify())" if len(report.damages) > 1 else ""
            index.close()
            raise IndexDamagedError(f"{path} is damaged: {report.damages[0]}{more}")
        if check_sizes:
            index.snapshot()
        return index

    @staticmethod
    def estimate(schema: Schema, count: int, *, text_bytes: int = 0) -> Estimate:
        """Return the bytes that count rows will take, each with a text of text_bytes in UTF-8."""
        return Estimate(count * schema.row_bytes, count * (_ENTRY_BYTES + text_bytes))

    def build(
        self,
        documents: Iterable[str] | None = None,
        ids: Iterable[str] | None = None,
        *,
        metadata: Iterable[Mapping[str, Any] | None] | None = None,
        embeddings: Tensor | np.ndarray | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> AddResult:
        """Fill a new index, committing every 1,024 texts, and mark it complete.

        Interrupted, it is called again on what `create` returns for the same folder, with the same documents: those
        committed are skipped.

        Args, Raises: as `add`, and IndexStateError: the index is complete already.
        """
        with self._writing(building=True) as generation:
            source = read_documents(documents, ids, metadata, embeddings)
            with _progress(source, show_progress_bar) as progress:
                result = self._writer(generation, batch_size, progress).add(
                    batches(source, COMMIT_TEXTS), resuming=True
                )
            generation.writer().complete()
            generation.manifest = dataclasses.replace(generation.manifest, complete=True)
        return result

    def add(
        self,
        documents: Iterable[str] | None = None,
        ids: Iterable[str] | None = None,
        *,
        metadata: Iterable[Mapping[str, Any] | None] | None = None,
        embeddings: Tensor | np.ndarray | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> AddResult:
        """Add documents at the end: a list in one transaction, an iterator in one every 1,024.

        Args:
            documents: texts; None where embeddings are given without.
            ids: a name of each. None: a hash of the text, or of the embedding without one, so that what is held
                already is skipped.
            metadata: a JSON object of each, or None.
            embeddings: (N, ...), taken instead of encoding texts.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if the logger "mixencoder" is at INFO or below.

        Raises:
            InputError: a text, id or metadata object cannot be used, or their numbers differ.
            DuplicateIdError: an id is given twice or held already.
            IndexStateError: closed, read-only, unfinished, or opened without what encodes.
            IndexLockedError: another writer is at work.
            IndexStorageError: the disk refused; what was committed before is intact.
        """
        with self._writing() as generation:
            source = read_documents(documents, ids, metadata, embeddings)
            groups = [source] if isinstance(source, list) else batches(source, COMMIT_TEXTS)
            with _progress(source, show_progress_bar) as progress:
                return self._writer(generation, batch_size, progress).add(groups)

    def update(
        self,
        documents: Sequence[str] | str | None = None,
        ids: Sequence[str] | str = (),
        *,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        embeddings: Tensor | np.ndarray | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> AddResult:
        """Put new texts (or embeddings) in place of documents, which move to the end, in one transaction.

        Args:
            documents, embeddings, batch_size, show_progress_bar: as in `add`.
            ids: which documents, one for each text.
            metadata: None keeps what each has.

        Raises:
            UnknownIdError: the index holds no such document.
            DuplicateIdError: an id is given twice.
            InputError, IndexStateError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._writing() as generation:
            source = list(read_documents(documents, ids, metadata, embeddings))
            check_distinct(source)
            with _progress(source, show_progress_bar) as progress:
                writer = self._writer(generation, batch_size, progress)
                return writer.update(source, keep_metadata=metadata is None)

    def remove(self, ids: Sequence[str] | str) -> int:
        """Remove documents in one transaction and return how many.

        They are no longer ranked, found or counted; their bytes stay on disk until `compact`.

        Raises:
            UnknownIdError: the index holds no such document; nothing is removed.
            IndexStateError, IndexLockedError, IndexStorageError: as `add`.
        """
        names = id_list(ids)
        with self._writing() as generation:
            return self._writer(generation).remove(names)

    def compact(self) -> int:
        """Write the index anew without what was removed, swap it in at once, and return the bytes freed.

        Needs room for a second copy. Everything is checked against its checksums first. Snapshots and other processes
        keep reading the old files, whose room is freed when the last of them is done.

        Raises:
            IndexDamagedError: a checksum disagrees; nothing was changed.
            IndexStateError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._writing() as generation:
            return compact(self._current.store(), generation)

    def verify(self) -> Verification:
        """Compare everything with its checksums; says what is damaged, which documents that touches and what to do."""
        while True:
            generation = self._current.generation()
            report = verify(generation.catalogue, generation.arrays, generation.manifest.schema)
            # of files that compaction swept away meanwhile nothing can be said
            if report.ok or self._current.generation() is generation:
                return report

    def repair(self, *, batch_size: int = 32) -> Repair:
        """Encode documents that damage touches again from their stored texts, remove those without, and compact.

        Raises:
            IndexDamagedError: the catalogue itself is damaged.
            IndexStateError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._writing() as generation:
            report = verify(generation.writer(), generation.arrays, generation.manifest.schema)
            result = self._writer(generation, batch_size).repair(report)
            compact(self._current.store(), generation)
        return result

    def snapshot(self) -> Snapshot:
        """Return an immutable view of the newest commit; the same object as long as nothing is committed.

        Raises:
            IndexStateError: the index is closed.
            IndexDamagedError: an array file is missing or too short.
        """
        return self._current.snapshot()

    def get(self, id: str, *, with_fields: bool = False) -> Entry:
        """Return a document by id, on request with its rows.

        Raises:
            UnknownIdError: the index holds no such document.
        """
        if not with_fields:
            return self._current.listing()[1].get(id)
        view = self.snapshot()
        return view.get(id)._replace(fields=view.gather(view.positions([id])).fields)

    def entries(self) -> Iterator[Entry]:
        """Iterate over the documents of the newest commit in order, without their rows."""
        return self._current.listing()[1].entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._current.listing()[1])

    def __len__(self) -> int:
        return len(self._current.listing()[1])

    def __contains__(self, id: object) -> bool:
        return id in self._current.listing()[1]

    @property
    def schema(self) -> Schema:
        """The fields of a row."""
        return self._current.generation().manifest.schema

    @property
    def fingerprint(self) -> dict[str, str]:
        """What encoded the documents."""
        return dict(self._current.generation().manifest.fingerprint)

    @property
    def settings(self) -> dict[str, Any]:
        """What `create` was given."""
        return dict(self._current.generation().manifest.settings)

    @property
    def store_text(self) -> bool:
        """Whether texts are kept."""
        return self._current.generation().manifest.store_text

    @property
    def complete(self) -> bool:
        """Whether `build` is done."""
        return self._current.generation().manifest.complete

    def info(self) -> dict[str, Any]:
        """Return what the index is and holds, JSON-able; removed rows and array bytes count until `compact`."""
        generation, listing = self._current.listing()
        manifest = generation.manifest
        return {
            "path": None if self.path is None else str(self.path),
            "format": generation.format,
            "complete": manifest.complete,
            "documents": len(listing),
            "rows": listing.rows,
            "removed_rows": listing.removed_rows,
            "fingerprint": manifest.fingerprint,
            "settings": manifest.settings,
            "store_text": manifest.store_text,
            "fields": manifest.schema.to_json(),
            "row_bytes": manifest.schema.row_bytes,
            "array_bytes": generation.arrays.size(),
            "catalogue_bytes": generation.catalogue.size(),
        }

    def close(self) -> None:
        """Let go of the files; snapshots taken before stay usable."""
        self._current.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        where = "build it again where it is needed" if self.path is None else f"open it again by its path, {self.path}"
        raise IndexStateError(f"a CandidateIndex cannot be copied or pickled; {where}")

    @contextmanager
    def _writing(self, *, building: bool = False) -> Generator[Generation]:
        """Hold the right to write to the generation that counts."""
        self._current.generation()
        store = self._current.store()
        if self.read_only:
            raise IndexStateError(f"{store.name} was opened read-only; open it for writing")
        with store.lock():
            # refuses what is damaged, before anything is written
            generation = self._current.listing()[0]
            if store.upgrade(generation):
                generation = self._current.generation()
            if not generation.manifest.complete:
                generation.manifest = generation.writer().manifest()
            if generation.manifest.complete == building:
                found, way_out = ("complete", "add()") if building else ("unfinished", "build()")
                raise IndexStateError(f"{store.name} is {found}; expected {way_out}")
            store.tidy()
            yield generation

    def _writer(self, generation: Generation, batch_size: int = 32, progress: ProgressBar | None = None) -> Writer:
        size = positive_integer(batch_size, "batch_size")
        return Writer(generation, self._encode, self._project, size, progress)

    def _check_resumable(self, manifest: Manifest) -> None:
        found, name = self._current.generation().manifest, self._current.store().name
        if found.complete:
            raise IndexStateError(
                f"{name} holds a complete index of {len(self):,} documents; open it to add to it, or "
                "choose another folder"
            )
        found.check_fingerprint(name, manifest.fingerprint)
        found.check_settings(f"{name} is an unfinished index", manifest, "Go on with the same, or delete the folder")


def _progress(documents: Iterable[Document], show: bool | None) -> ProgressBar:
    return progress_bar(len(documents) if isinstance(documents, list) else None, "Index", "text", show)
