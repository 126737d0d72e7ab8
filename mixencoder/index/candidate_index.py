"""CandidateIndex: documents encoded once, kept on disk or in memory, changed in transactions, read by many.

It knows no model: only rows of named arrays, ids, a fingerprint of what encoded them, and functions that turn texts
and embeddings into rows. `mixencoder.fast.MixEncoder` makes and opens indexes; docs/candidate-index.md lists the
guarantees.
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
from mixencoder.index.copying import Convert, copy_documents
from mixencoder.index.documents import Document, batches, check_distinct, id_list, json_object, read_documents
from mixencoder.index.folder import FolderStore, Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.memory import MemoryStore
from mixencoder.index.newest_commit import NewestCommit
from mixencoder.index.schema import Schema
from mixencoder.index.shards import rows_per_shard
from mixencoder.index.verification import Verification, verify
from mixencoder.index.view import Entry, Listing, Snapshot
from mixencoder.index.writer import COMMIT_TEXTS, AddResult, CheckAdding, Encode, Project, Repair, Writer
from mixencoder.progress import ProgressBar, progress_bar

_ENTRY_BYTES = 96
"""Catalogue bytes per document besides its text, measured with 32-character ids."""


class Estimate(NamedTuple):
    """Bytes that documents will take: exact for the array files, approximate for the catalogue."""

    arrays: int
    catalogue: int


class BuildEstimate(NamedTuple):
    """Size and time of building an index, estimated beforehand."""

    documents: int
    array_bytes: int
    """Of the array files: exact with one row per document; extrapolated from some of the texts where long texts are
    split into several rows."""
    catalogue_bytes: int
    """Of ids and texts, approximate."""
    seconds: float
    """Extrapolated from encoding some of the texts."""


class CandidateIndex:
    """Documents and the rows encoded from them; made by `create`, opened by `open`.

    Every method sees the newest commit, by this or any other process; for several reads of one state take a
    `snapshot`. Documents iterate in the order in which they were added; an update moves a document to the end. Safe to
    use from several threads: one may write while others read. In a forked child every use raises: open the index again
    there. It cannot be copied or pickled.

    Attributes:
        path: the folder, or None in memory.
        read_only: whether writing raises.
    """

    def __init__(
        self,
        store: FolderStore | MemoryStore,
        *,
        encode: Encode | None = None,
        project: Project | None = None,
        check_adding: CheckAdding | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = store.path if isinstance(store, FolderStore) else None
        self.read_only = read_only
        self._encode, self._project, self._check_adding = encode, project, check_adding
        self._newest = NewestCommit(store)

    @classmethod
    def create(
        cls,
        path: str | Path | None,
        schema: Schema,
        fingerprint: Mapping[str, str],
        *,
        encode: Encode | None = None,
        project: Project | None = None,
        check_adding: CheckAdding | None = None,
        settings: Mapping[str, Any] | None = None,
        store_text: bool = True,
    ) -> Self:
        """Make an empty index for `build` to fill, or resume one whose building was interrupted.

        Args:
            path: a new or empty folder, or one that holds an unfinished index; None keeps the index in memory.
            schema: the fields of a row.
            fingerprint: identifies what encodes the documents, part by part; "name" is shown and never compared.
            encode: turns texts into rows.
            project: turns embeddings (N, ...) into fields, one row each.
            check_adding: decides whether rows may be added, to this or an unfinished index; None compares fingerprints
                when building is resumed.
            settings: a JSON object stored with the index and returned as `settings`.
            store_text: whether to keep the texts.

        Raises:
            IndexStateError: the folder holds a complete index, or something else.
            IndexMismatchError: the folder holds an unfinished index with another fingerprint, schema or settings.
            IndexLockedError: another process is building the index.
            IndexStorageError: the folder cannot be written.
        """
        # read back from JSON, so that it equals the settings of an unfinished index
        kept = json.loads(json_object(dict(settings or {}), "settings"))
        manifest = Manifest(schema, dict(fingerprint), kept, store_text, rows_per_shard(schema), False)
        store = MemoryStore() if path is None else FolderStore(path)
        index = cls(store, encode=encode, project=project, check_adding=check_adding)
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
        check_adding: CheckAdding | None = None,
        read_only: bool = False,
        check_sizes: bool = True,
        verify: bool = False,
    ) -> Self:
        """Open an index without writing anything: the folder may be read-only, and many processes may have it open.

        Args:
            path: the folder; a leading ``~`` is the home folder.
            fingerprint: as in `create`; None opens the index of any model, to read, verify, remove or compact.
            encode, project, check_adding: as in `create`.
            read_only: whether writing raises.
            check_sizes: raise if array files are too short; False for `verify` and `repair`.
            verify: read everything and raise if anything is damaged; otherwise neither opening nor ranking notices a
                flipped bit in an array.

        Raises:
            InputError: path cannot be the path of a folder.
            IndexStateError: there is no index, it is unfinished, or its format is newer.
            IndexMismatchError: the fingerprints differ; the message names both models and the parts that differ.
            IndexDamagedError: files are missing, cut short or unreadable; with verify, anything is damaged.
            IndexStorageError: the system cannot read it.
        """
        index = cls(FolderStore(path), read_only=read_only, encode=encode, project=project, check_adding=check_adding)
        manifest = index._newest.generation().manifest
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

    @classmethod
    def read_manifest(cls, path: str | Path) -> Manifest:
        """Return the manifest of an index, complete or not.

        Raises:
            InputError, IndexStateError, IndexDamagedError, IndexStorageError: as `open`.
        """
        with cls(FolderStore(path)) as index:
            return index._newest.generation().manifest

    @staticmethod
    def estimate(schema: Schema, count: int, *, text_bytes: int = 0) -> Estimate:
        """Return the bytes of `count` documents of one row each, with texts of `text_bytes` UTF-8 bytes each."""
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

        To resume after an interruption, call `create` with the same folder, then `build` with the same documents:
        committed ones are skipped.

        Args, Raises: as `add`, and IndexStateError: the index is complete already.
        """
        with self._building() as generation:
            source = read_documents(documents, ids, metadata, embeddings)
            with _progress(source, show_progress_bar) as progress:
                writer = self._writer(generation, batch_size, progress)
                return writer.add(batches(source, COMMIT_TEXTS), resuming=True)

    def build_from(self, source: Snapshot, convert: Convert, *, show_progress_bar: bool | None = None) -> None:
        """Fill a new index with the documents of another, committing every 1,024, and mark it complete; as `build`.

        Args:
            source: the documents; their ids, texts, metadata and numbers of rows stay.
            convert: turns their stored rows into rows of this index.
            show_progress_bar: as in `add`.

        Raises:
            IndexStateError: the index is complete already, or holds other documents.
            IndexLockedError, IndexStorageError: as `add`.
        """
        bar = progress_bar(len(source), "Index", "document", show_progress_bar)
        with self._building() as generation, bar as progress:
            copy_documents(source, generation, convert, progress)

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
        """Add documents at the end: a list in one transaction, an iterator in one transaction per 1,024 documents.

        Args:
            documents: texts; None if only embeddings are given.
            ids: one per document. None: a hash of the text, or of the embedding if there is no text, so that documents
                that the index already holds are skipped.
            metadata: a JSON object or None per document.
            embeddings: (N, ...), used instead of encoding the texts.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if the logger "mixencoder" is at INFO or below.

        Raises:
            InputError: a text, id, metadata object or embedding cannot be used, or their numbers differ.
            DuplicateIdError: an id is given twice, or the index holds it already.
            IndexStateError: the index is closed, read-only, unfinished, or opened without a model.
            IndexMismatchError: the model that encodes is not the one whose rows the index holds.
            IndexLockedError: another writer is at work.
            IndexStorageError: the disk is full, read-only or failing; what was committed before is intact.
        """
        with self._adding() as generation:
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
        """Replace the texts (or embeddings) of documents in one transaction; the documents move to the end.

        Args:
            documents, embeddings, batch_size, show_progress_bar: as in `add`.
            ids: the documents to replace, one per text.
            metadata: as in `add`, but None in place of the list keeps the old metadata.

        Raises:
            UnknownIdError: the index holds no such document.
            DuplicateIdError: an id is given twice.
            InputError, IndexStateError, IndexMismatchError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._adding() as generation:
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
        """Replace the index by a copy without removed documents, all at once, and return the bytes freed.

        Needs disk space for a second copy. All checksums are checked first. Snapshots and other processes keep reading
        the old files; their space is freed when the last reader is done.

        Raises:
            IndexDamagedError: a checksum differs; nothing was changed.
            IndexStateError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._writing() as generation:
            return compact(self._newest.store(), generation)

    def verify(self) -> Verification:
        """Check all checksums and return what is damaged, which documents are affected and what to do."""
        while True:
            generation = self._newest.generation()
            report = verify(generation.catalogue, generation.arrays, generation.manifest.schema)
            # damage found in files that a compaction deleted meanwhile says nothing about the index
            if report.ok or self._newest.generation() is generation:
                return report

    def repair(self, *, batch_size: int = 32) -> Repair:
        """Encode damaged documents again from their stored texts, remove those without a text, and compact.

        Raises:
            IndexDamagedError: the catalogue itself is damaged.
            IndexStateError, IndexMismatchError, IndexLockedError, IndexStorageError: as `add`.
        """
        with self._adding() as generation:
            report = verify(generation.writer(), generation.arrays, generation.manifest.schema)
            result = self._writer(generation, batch_size).repair(report)
            compact(self._newest.store(), generation)
        return result

    def snapshot(self) -> Snapshot:
        """Return an immutable view of the newest commit; the same object as long as nothing is committed.

        Raises:
            IndexStateError: the index is closed.
            IndexDamagedError: an array file is missing or too short.
        """
        return self._newest.snapshot()

    def listing(self) -> Listing:
        """Return an immutable view of the newest commit, as `snapshot` does, but without the arrays."""
        return self._newest.listing()[1]

    def get(self, id: str, *, with_fields: bool = False) -> Entry:
        """Return a document by id; with_fields includes its rows.

        Raises:
            UnknownIdError: the index holds no such document.
        """
        if not with_fields:
            return self._newest.listing()[1].get(id)
        view = self.snapshot()
        return view.get(id)._replace(fields=view.gather(view.positions([id])).fields)

    def entries(self) -> Iterator[Entry]:
        """Iterate over the documents of the newest commit in order, without their rows."""
        return self._newest.listing()[1].entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._newest.listing()[1])

    def __len__(self) -> int:
        return len(self._newest.listing()[1])

    def __contains__(self, id: object) -> bool:
        return id in self._newest.listing()[1]

    @property
    def manifest(self) -> Manifest:
        """The properties of the index, as stored."""
        return self._newest.generation().manifest

    @property
    def schema(self) -> Schema:
        """The fields of a row."""
        return self.manifest.schema

    @property
    def fingerprint(self) -> dict[str, str]:
        """Identifies what encoded the documents, part by part."""
        return dict(self.manifest.fingerprint)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings given to `create`."""
        return dict(self.manifest.settings)

    @property
    def store_text(self) -> bool:
        """Whether texts are kept."""
        return self.manifest.store_text

    @property
    def complete(self) -> bool:
        """Whether `build` has finished."""
        return self.manifest.complete

    def info(self) -> dict[str, Any]:
        """Return settings, counts and sizes as a JSON object; array_bytes includes removed rows until `compact`."""
        generation, listing = self._newest.listing()
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
        """Close the files; snapshots taken before stay usable."""
        self._newest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        where = "build it again where it is needed" if self.path is None else f"open it again by its path, {self.path}"
        raise IndexStateError(f"a CandidateIndex cannot be copied or pickled; {where}")

    @contextmanager
    def _writing(self, *, building: bool = False) -> Generator[Generation]:
        """Hold the write lock and yield the current generation, upgraded to the newest format."""
        self._newest.generation()
        store = self._newest.store()
        if self.read_only:
            raise IndexStateError(f"{store.name} was opened read-only; open it for writing")
        with store.lock():
            # raises if the catalogue is damaged, before anything is written
            generation = self._newest.listing()[0]
            if store.upgrade(generation):
                generation = self._newest.generation()
            if not generation.manifest.complete:
                generation.manifest = generation.writer().manifest()
            if generation.manifest.complete == building:
                state = "complete; add to it with add()" if building else "unfinished; finish it with build()"
                raise IndexStateError(f"{store.name} is {state}")
            store.delete_leftovers()
            yield generation

    @contextmanager
    def _adding(self, *, building: bool = False) -> Generator[Generation]:
        """As `_writing`, for calls that add rows; raises before anything is written if they do not belong here."""
        if self._check_adding is not None:
            self._check_adding(self._newest.store().name, self._newest.generation().manifest)
        with self._writing(building=building) as generation:
            yield generation

    @contextmanager
    def _building(self) -> Generator[Generation]:
        """As `_adding`, for the first build; marks the index complete."""
        with self._adding(building=True) as generation:
            yield generation
            generation.writer().complete()
            generation.manifest = dataclasses.replace(generation.manifest, complete=True)

    def _writer(self, generation: Generation, batch_size: int = 32, progress: ProgressBar | None = None) -> Writer:
        return Writer(generation, self._encode, self._project, positive_integer(batch_size, "batch_size"), progress)

    def _check_resumable(self, manifest: Manifest) -> None:
        found, name = self._newest.generation().manifest, self._newest.store().name
        if found.complete:
            raise IndexStateError(
                f"{name} holds a complete index of {len(self):,} documents; open it to add to it, or "
                "choose another folder"
            )
        if self._check_adding is None:
            found.check_fingerprint(name, manifest.fingerprint)
        else:
            self._check_adding(name, found)
        found.check_settings(f"{name} is an unfinished index", manifest, "Pass the same, or delete the folder")


def _progress(documents: Iterable[Document], show: bool | None) -> ProgressBar:
    return progress_bar(len(documents) if isinstance(documents, list) else None, "Index", "text", show)
