"""`ShardedIndex`: several indexes of one encoder, read as one; and merging such indexes into a single one."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mixencoder.errors import IndexDamagedError, IndexStateError, InputError
from mixencoder.index.candidate_index import CandidateIndex
from mixencoder.index.folder import POINTER, Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.shard_list import check_distinct_paths, check_unique_ids, shard_paths, write_list
from mixencoder.index.sharded_view import ShardedSnapshot, check_same_kind, local_view
from mixencoder.index.verification import Verification
from mixencoder.index.view import Snapshot


class ShardedIndex(CandidateIndex):
    """Several indexes of one encoder, read as one: the documents of the first come first, then those of the second.

    Ranks, finds ids and iterates as a single index with the same documents in the same order would. It is read-only:
    to change a shard, open it by its own path; every method sees the newest commits.

    Args:
        shards: open indexes, at least one; closed with this object.
        path: the folder that holds them, or None.

    Attributes:
        path: as given.
        shards: as given.
        read_only: True.

    Raises:
        InputError: there is no shard.
        IndexMismatchError: the shards differ in fingerprint, schema, settings or in whether they keep texts.
    """

    def __init__(self, shards: Sequence[CandidateIndex], path: Path | None = None) -> None:
        if not shards:
            raise InputError("there is no shard; expected at least one index")
        self.shards, self.path, self.read_only = tuple(shards), path, True
        self._commits = _NewestCommits(self.shards)
        self._newest: Any = self._commits
        check_same_kind(self._commits.names, [shard.manifest for shard in shards])

    def verify(self) -> Verification:
        """Check all checksums of all shards."""
        reports = [shard.verify() for shard in self.shards]
        damages = tuple(damage for report in reports for damage in report.damages)
        return Verification(
            sum(report.documents for report in reports),
            sum(report.rows for report in reports),
            sum(report.checked_bytes for report in reports),
            damages,
            any(report.unsummed for report in reports),
        )

    def check_unique_ids(self) -> None:
        """Raise if two shards hold the same id; reads all ids.

        Raises:
            DuplicateIdError: some do; the message names the first of them, and their shards.
        """
        check_unique_ids([shard.listing() for shard in self.shards], self._commits.names)

    def info(self) -> dict[str, Any]:
        """As `CandidateIndex.info`, with the sums of all shards and their paths."""
        parts = [shard.info() for shard in self.shards]
        sums = ("documents", "rows", "removed_rows", "array_bytes", "catalogue_bytes")
        found = {**parts[0], **{name: sum(part[name] for part in parts) for name in sums}}
        return {**found, "path": None if self.path is None else str(self.path), "shards": self._commits.names}

    def close(self) -> None:
        """Close the files of all shards; snapshots taken before stay usable."""
        for shard in self.shards:
            shard.close()

    def __reduce__(self) -> NoReturn:
        raise IndexStateError("a ShardedIndex cannot be copied or pickled; open it again by its path")

    @contextmanager
    def _writing(self, *, building: bool = False) -> Generator[Generation]:
        raise IndexStateError(
            f"this index has {len(self.shards)} shards and is read-only; open the shard to change by its own path"
        )
        yield

    @contextmanager
    def _adding(self, *, building: bool = False) -> Generator[Generation]:
        with self._writing(building=building) as generation:
            yield generation


class _NewestCommits:
    """In place of `NewestCommit`: the newest commits of all shards, as one view."""

    def __init__(self, shards: Sequence[CandidateIndex]) -> None:
        self._shards = shards
        self.names = [
            f"number {number}" if shard.path is None else str(shard.path) for number, shard in enumerate(shards)
        ]
        # the views of the shards, and the same as one; replaced in one step, as threads share it
        self._last: tuple[list[Snapshot], ShardedSnapshot] | None = None

    def generation(self) -> "_NewestCommits":
        """Return what has the manifest."""
        return self

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first shard; the others agree with it."""
        return self._shards[0].manifest

    def listing(self) -> tuple["_NewestCommits", ShardedSnapshot]:
        """Return all documents."""
        return self, self.snapshot()

    def snapshot(self) -> ShardedSnapshot:
        """Return all documents with their arrays; the same object as long as nothing is committed."""
        views, last = [shard.snapshot() for shard in self._shards], self._last
        if last is None or any(view is not other for view, other in zip(views, last[0], strict=True)):
            self._last = last = views, local_view(views, self.names)
        return last[1]


def open_any(path: Path, *, check_sizes: bool = True) -> CandidateIndex:
    """Open an index of any model, single or sharded, for reading; arguments and errors as `CandidateIndex.open`."""
    shards = shard_paths(path)
    if shards is None:
        return CandidateIndex.open(path, None, read_only=True, check_sizes=check_sizes)
    return _opened(shards, path, check_sizes=check_sizes)


def list_shards(path: Path, shards: Sequence[Path]) -> int:
    """Make a folder that lists indexes, which stay where they are, as the shards of one; return the documents.

    Args:
        path: a new folder, or one that holds the shards or an earlier list. Shards inside it are listed by name, others
            by their absolute paths.
        shards: their folders, in the order wanted.

    Raises:
        InputError: there is no shard, or one is named twice.
        IndexStateError: path is a single index, or a shard is no complete index.
        IndexMismatchError, DuplicateIdError: the shards differ, or two hold the same id.
        OSError: the list cannot be written.
    """
    with _opened(shards) as opened:
        opened.check_unique_ids()
        if (path / POINTER).exists():
            raise IndexStateError(f"{path} is a single index; expected another folder for the list of shards")
        path.mkdir(parents=True, exist_ok=True)
        names = []
        for shard in shards:
            inside = shard.resolve().parent == path.resolve()
            names.append(shard.resolve().name if inside else str(shard.resolve()))
        write_list(path, names)
        return len(opened)


def merge_shards(path: Path, shards: Sequence[Path], *, show_progress_bar: bool | None = None) -> CandidateIndex:
    """Copy the documents of indexes into a new single index, in order; after an interruption the same call continues.

    Args:
        path: a new or empty folder, or the unfinished index of the same call.
        shards: folders of indexes of one encoder, with the same settings.
        show_progress_bar: as in `CandidateIndex.build_from`.

    Raises:
        InputError, IndexMismatchError, DuplicateIdError: as `list_shards`.
        IndexStateError: path holds a complete index or other files, or a shard is no complete index.
        IndexDamagedError: a checksum of a shard is wrong; nothing was copied.
        IndexLockedError, IndexStorageError: as `CandidateIndex.build`.
    """
    with _opened(shards) as source:
        source.check_unique_ids()
        report = source.verify()
        if not report.ok:
            raise IndexDamagedError(f"a shard is damaged; nothing was copied: {report.damages[0]}")
        view = source.snapshot()
        manifest = view.manifest
        options = {"settings": manifest.settings, "store_text": manifest.store_text}
        made = CandidateIndex.create(path, manifest.schema, manifest.fingerprint, **options)
        made.build_from(view, lambda fields: fields, show_progress_bar=show_progress_bar)
    return made


def _opened(shards: Sequence[Path], path: Path | None = None, *, check_sizes: bool = True) -> ShardedIndex:
    check_distinct_paths(shards)
    options = {"read_only": True, "check_sizes": check_sizes}
    return ShardedIndex([CandidateIndex.open(shard, None, **options) for shard in shards], path)
