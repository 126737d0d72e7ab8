"""An index's folder: generations, the pointer that says which one counts, and the lock that lets one writer in.

    index.json            the pointer: kind, format, number of the current generation; replaced atomically
    lock                  locked (flock) by whoever writes
    generation-000001/    catalogue.sqlite and the shards

Compaction writes a new generation and swaps the pointer; the old one is deleted, which readers that have it open do
not notice. Reading writes nothing, so a read-only folder will do.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mixencoder.durable import sync_folder
from mixencoder.storage.catalogue import Catalogue, Manifest
from mixencoder.storage.errors import IndexDamagedError, IndexLockedError, IndexStateError, IndexStorageError
from mixencoder.storage.shards import Arrays, ShardFiles, refusal

KIND = "mixencoder-candidate-index"
FORMAT = 1
"""Raised when what older versions wrote can no longer be read, or they could not read what this one writes."""
_POINTER, _LOCK, _CATALOGUE = "index.json", "lock", "catalogue.sqlite"


@dataclass
class Generation:
    """One state of the files that only ever grows.

    Attributes:
        number: its number in the pointer.
        folder: where it lies; None in memory.
        manifest: as read when it was opened.
        catalogue: a connection for reading.
        arrays: the rows.
        writing: a connection for writing, made when first needed.
    """

    number: int
    folder: Path | None
    manifest: Manifest
    catalogue: Catalogue
    arrays: Arrays
    writing: Catalogue | None = None

    def writer(self) -> Catalogue:
        """Return the connection for writing; only under the lock."""
        if self.writing is None:
            assert self.folder is not None, "a generation in memory is made with its connection"
            self.writing = Catalogue.on_disk(self.folder / _CATALOGUE, "rw")
        return self.writing


class FolderStore:
    """The generations of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._current: Generation | None = None
        self._seen: tuple[int, int] | None = None

    def current(self) -> Generation:
        """Return the generation that the pointer names, opened anew if the pointer was replaced.

        Raises:
            IndexStateError: there is no index, or its format is newer.
            IndexDamagedError: the pointer or the catalogue cannot be read.
            FileNotFoundError: compaction swept the generation away meanwhile; ask again.
        """
        try:
            status = (self.path / _POINTER).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise IndexStateError(
                f"{self.path} is not an index: it holds no {_POINTER}; expected a folder that index() made"
            ) from None
        seen = status.st_ino, status.st_mtime_ns
        if self._current is None or seen != self._seen:
            self._current, self._seen = self._open(self._read_pointer()), seen
        return self._current

    def prepare(self) -> bool:
        """Make the folder ready for a new index, or return True if one is there already, complete or not.

        Raises:
            IndexStateError: something else is there.
            IndexStorageError: the folder cannot be made.
        """
        if (self.path / _POINTER).exists():
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # what a creation leaves that was killed before it wrote the pointer
            foreign = [item.name for item in self.path.iterdir() if not _is_ours(item.name)]
        except (FileExistsError, NotADirectoryError):
            raise IndexStateError(f"{self.path} is a file; expected a folder to make the index in") from None
        except OSError as error:
            raise refusal(error, self.path) from error
        if foreign:
            raise IndexStateError(
                f"{self.path} is not empty and not an index (it holds {sorted(foreign)[0]}); expected a new or empty "
                "folder, or an index"
            )
        return False

    def new_generation(self, manifest: Manifest) -> Generation:
        """Return an empty generation beside the current one, to be published; only under the lock."""
        number = self._read_pointer() + 1 if (self.path / _POINTER).exists() else 1
        folder = self._folder(number)
        try:
            self._sweep(number - 1)
            folder.mkdir()
        except OSError as error:
            raise refusal(error, folder) from error
        catalogue = Catalogue.on_disk(folder / _CATALOGUE, "rwc")
        catalogue.create(manifest)
        return self._generation(number, manifest, catalogue, catalogue)

    def publish(self, generation: Generation) -> None:
        """Make a generation the current one, whole or not at all, and delete all others."""
        assert generation.folder is not None, "a generation of a folder has one"
        pointer, draft = self.path / _POINTER, self.path / f"{_POINTER}.new"
        content = json.dumps({"kind": KIND, "format": FORMAT, "generation": generation.number}) + "\n"
        try:
            sync_folder(generation.folder)
            sync_folder(self.path)
            with draft.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, pointer)
            sync_folder(self.path)
        except OSError as error:
            raise refusal(error, pointer) from error
        self._sweep(generation.number)

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the right to write.

        Raises:
            IndexLockedError: somebody else holds it; the message names the process.
            IndexStorageError: the folder cannot be written.
        """
        path = self.path / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise refusal(error, self.path) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise refusal(error, path) from error
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise IndexLockedError(
                    f"{self.path} is being written by process {holder}; one writer at a time: try again when it is done"
                ) from None
            try:
                with suppress(OSError):  # only tells others who it is; a full disk must not keep anyone from removing
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                yield
            finally:
                # explicitly, as a process forked meanwhile holds a copy of the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _open(self, number: int) -> Generation:
        path = self._folder(number) / _CATALOGUE
        try:
            if not path.exists():
                raise IndexDamagedError(
                    f"{path} is missing, though {self.path / _POINTER} names it; restore the file, or build the index "
                    "again"
                )
            catalogue = Catalogue.on_disk(path, "ro")
            return self._generation(number, catalogue.manifest(), catalogue)
        except (IndexDamagedError, IndexStorageError):
            if self._read_pointer() != number:
                raise FileNotFoundError(path) from None
            raise

    def _generation(
        self, number: int, manifest: Manifest, catalogue: Catalogue, writing: Catalogue | None = None
    ) -> Generation:
        folder = self._folder(number)
        return Generation(
            number, folder, manifest, catalogue, ShardFiles(folder, manifest.schema, manifest.shard_rows), writing
        )

    def _read_pointer(self) -> int:
        path = self.path / _POINTER
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, version, number = content["kind"], int(content["format"]), int(content["generation"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexDamagedError(
                f"{path} cannot be read ({type(error).__name__}: {error}); expected the pointer of an index. If the "
                f'folder is one, write {{"kind": "{KIND}", "format": {FORMAT}, "generation": N}} there, N being the '
                "number of its generation folder"
            ) from error
        if kind != KIND:
            raise IndexStateError(f'{path} is of kind "{kind}"; expected "{KIND}"')
        if version > FORMAT:
            raise IndexStateError(
                f"{self.path} has format {version}; this version of mixencoder reads up to {FORMAT}. Upgrade mixencoder"
            )
        return number

    def _folder(self, number: int) -> Path:
        return self.path / f"generation-{number:06d}"

    def tidy(self) -> None:
        """Delete what a compaction left that was killed; only under the lock."""
        self._sweep(self._read_pointer())

    def _sweep(self, keep: int) -> None:
        kept = self._folder(keep).name
        for folder in self.path.glob("generation-*"):
            if folder.name != kept:
                shutil.rmtree(folder, ignore_errors=True)


def _is_ours(name: str) -> bool:
    return name in (_LOCK, f"{_POINTER}.new") or name.startswith("generation-")
