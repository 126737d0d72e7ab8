"""An index's folder: generations, the pointer that says which one counts, and the lock that lets one writer in.

    index.json            the pointer: kind, format, number of the current generation; replaced atomically
    lock                  locked (flock) by whoever writes
    generation-000001/    catalogue.sqlite and the shards

Compaction writes a new generation and swaps the pointer; the old one is deleted, which readers that have it open do
not notice. Reading writes nothing, so a read-only folder will do. Nothing is ever deleted that could be somebody
else's: only files of the names above, in generations that a killed writer can have left.
"""

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mixencoder.base.inputs import local_path
from mixencoder.base.texts import printable
from mixencoder.errors import IndexDamagedError, IndexStateError, IndexStorageError, InputError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.files import Folder, read_small, status_of, storage_error
from mixencoder.index.lock import LOCK, locked
from mixencoder.index.manifest import Manifest
from mixencoder.index.shards import SHARD_NAME, Arrays, ShardFiles

KIND = "mixencoder-candidate-index"
FORMAT = 2
"""Raised when what older versions wrote can no longer be read, or they could not read what this one writes. Format 1,
which is read as well and becomes this one when it is first written to, has no checksums of blocks."""
_POINTER, _DRAFT, _CATALOGUE = "index.json", "index.json.new", "catalogue.sqlite"
_POINTER_BYTES = 2**16
_GENERATION = re.compile(r"generation-([0-9]{6,9})")
_CATALOGUE_NAME = re.compile(r"catalogue\.sqlite(-journal|-wal|-shm)?")
_GENERATION_FILES = re.compile(f"{_CATALOGUE_NAME.pattern}|{SHARD_NAME.pattern}")
_ANYTHING = re.compile(r".*", re.DOTALL)


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
        format: of its files.
    """

    number: int
    folder: Path | None
    manifest: Manifest
    catalogue: Catalogue
    arrays: Arrays
    writing: Catalogue | None = None
    format: int = FORMAT

    def writer(self) -> Catalogue:
        """Return the connection for writing; only under the lock."""
        if self.writing is None:
            assert self.folder is not None, "a generation in memory is made with its connection"
            self.writing = Catalogue.on_disk(self.folder / _CATALOGUE, "rw")
        return self.writing


class FolderStore:
    """The generations of one folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = _located(path)
        self.name = str(self.path)
        self._current: Generation | None = None
        self._seen: tuple[object, object] | None = None
        # the folder while it is locked, which everything is written through
        self._held: Folder | None = None

    def current(self) -> Generation:
        """Return the generation that the pointer names, opened anew if its files were replaced.

        Raises:
            IndexStateError: there is no index, or its format is newer.
            IndexDamagedError: the pointer or the catalogue cannot be read.
            FileNotFoundError: compaction swept the generation away meanwhile; ask again.
        """
        pointer = self._identity_of_pointer()
        if self._current is None or (pointer, _identity(self._catalogue(self._current.number))) != self._seen:
            number, version = self._read_pointer()
            generation = self._open(number, version)
            self._current, self._seen = generation, (pointer, _identity(self._catalogue(number)))
            if self._identity_of_pointer() != pointer:
                raise FileNotFoundError(self.path / _POINTER)
        return self._current

    def prepare(self) -> bool:
        """Make the folder ready for a new index, or return True if one is there already, complete or not.

        Raises:
            IndexStateError: something else is there.
            IndexStorageError: the folder cannot be made.
        """
        if status_of(self.path / _POINTER) is not None:
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = Folder(self.path, follow=True)
            # what a creation leaves that was killed before it wrote the pointer
            foreign = [name for name in folder.names(_ANYTHING) if not _left_by_creation(folder, name)]
        except (FileExistsError, NotADirectoryError):
            raise IndexStateError(f"{self.path} is a file; expected a folder to make the index in") from None
        except OSError as error:
            raise storage_error(error, self.path) from error
        if foreign:
            raise IndexStateError(
                f"{self.path} is not empty and not an index (it holds {printable(foreign[0])}); expected a new or "
                "empty folder, or an index"
            )
        return False

    def new_generation(self, manifest: Manifest) -> Generation:
        """Return an empty generation beside the current one, to be published; only under the lock."""
        here = self._folder()
        current = self._read_pointer()[0] if here.status(_POINTER) is not None else 0
        self._sweep(current)
        path = self._generation_path(current + 1)
        try:
            os.mkdir(path.name, dir_fd=here.descriptor)
        except FileExistsError:
            raise IndexStorageError(
                f"{path} is in the way and holds what an index does not make; move it away, then do the same again"
            ) from None
        except OSError as error:
            raise storage_error(error, path) from error
        self._check_in_place()
        catalogue = Catalogue.on_disk(path / _CATALOGUE, "rwc")
        catalogue.create(manifest)
        try:
            arrays = ShardFiles(Folder(path, inside=here), manifest.schema, manifest.shard_rows)
        except OSError as error:
            raise storage_error(error, path) from error
        return Generation(current + 1, path, manifest, catalogue, arrays, catalogue)

    def publish(self, generation: Generation) -> None:
        """Make a generation the current one, whole or not at all, and delete all others."""
        assert generation.folder is not None, "a generation of a folder has one"
        self._check_in_place()
        try:
            folder = Folder(generation.folder, inside=self._folder())
            try:
                os.fsync(folder.descriptor)
            finally:
                folder.close()
        except OSError as error:
            raise storage_error(error, generation.folder) from error
        self._write_pointer(generation.number)
        self._sweep(generation.number)

    def upgrade(self, generation: Generation) -> bool:
        """Give an index of an older format what this one has beside; returns whether it had to; only under the lock."""
        if generation.format < FORMAT:
            # first, so that no older version writes to what it does not know
            self._write_pointer(generation.number)
        if not generation.writer().summed:
            generation.writer().add_sums()
            return True
        return generation.format < FORMAT

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the right to write.

        Raises:
            IndexLockedError: somebody else holds it; the message names the process.
            IndexStorageError: the folder cannot be written.
        """
        with locked(self.path) as folder:
            self._held = folder
            try:
                yield
            finally:
                self._held = None

    def tidy(self) -> None:
        """Delete what a compaction left that was killed; only under the lock."""
        self._sweep(self._read_pointer()[0])

    def _open(self, number: int, version: int) -> Generation:
        path = self._catalogue(number)
        try:
            if status_of(path) is None:
                raise IndexDamagedError(
                    f"{path} is missing, though {self.path / _POINTER} names it; restore the file, or build the index "
                    "again"
                )
            try:
                folder = Folder(path.parent)
            except OSError as error:
                raise IndexDamagedError(
                    f"{path.parent} is not a folder of the index ({error.strerror}); expected a folder, not a link "
                    "to one. Put the folder itself there"
                ) from error
            catalogue = Catalogue.on_disk(path, "ro")
            manifest = catalogue.manifest()
            arrays = ShardFiles(folder, manifest.schema, manifest.shard_rows)
            return Generation(number, path.parent, manifest, catalogue, arrays, format=version)
        except (IndexDamagedError, IndexStorageError):
            if self._read_pointer()[0] != number:
                raise FileNotFoundError(path) from None
            raise

    def _identity_of_pointer(self) -> object:
        found = _identity(self.path / _POINTER)
        if found is None:
            raise IndexStateError(
                f"{self.path} is not an index: it holds no {_POINTER}; expected a folder that index() made"
            )
        return found

    def _read_pointer(self) -> tuple[int, int]:
        """Return the number of the current generation, and the format."""
        path = self.path / _POINTER
        try:
            content = json.loads(read_small(path, _POINTER_BYTES))
            kind, version, number = content["kind"], content["format"], content["generation"]
            # JSON's true and 1.0 are no numbers of anything
            if not (type(version) is type(number) is int and version > 0 and 0 < number < 10**9):
                raise ValueError(f"format {version!r}, generation {number!r}")
        except (IndexDamagedError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise IndexDamagedError(
                f"{path} cannot be read ({type(error).__name__}: {printable(str(error)[:200])}); expected the pointer "
                f'of an index. If the folder is one, write {{"kind": "{KIND}", "format": {FORMAT}, "generation": N}} '
                "there, N being the number of its generation folder"
            ) from error
        if kind != KIND:
            raise IndexStateError(f'{path} is of kind "{printable(str(kind)[:100])}"; expected "{KIND}"')
        if version > FORMAT:
            raise IndexStateError(
                f"{self.path} has format {version}; this version of mixencoder reads up to {FORMAT}. Upgrade mixencoder"
            )
        return number, version

    def _write_pointer(self, number: int) -> None:
        here = self._folder()
        content = json.dumps({"kind": KIND, "format": FORMAT, "generation": number}) + "\n"
        try:
            os.fsync(here.descriptor)
            # whatever lies there is a draft that was never finished, or a link that must not be written through
            with suppress(FileNotFoundError):
                os.unlink(_DRAFT, dir_fd=here.descriptor)
            with os.fdopen(here.open(_DRAFT, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(_DRAFT, _POINTER, src_dir_fd=here.descriptor, dst_dir_fd=here.descriptor)
            os.fsync(here.descriptor)
        except OSError as error:
            raise storage_error(error, self.path / _POINTER) from error

    def _folder(self) -> Folder:
        assert self._held is not None, "only under the lock"
        return self._held

    def _check_in_place(self) -> None:
        """Refuse to go on in a folder that was moved away, as SQLite would write by the path."""
        if not self._folder().is_at(self.path):
            raise IndexStateError(f"{self.path} was moved away while it was written to; open the index where it is now")

    def _generation_path(self, number: int) -> Path:
        return self.path / _generation_name(number)

    def _catalogue(self, number: int) -> Path:
        return self._generation_path(number) / _CATALOGUE

    def _sweep(self, current: int) -> None:
        """Delete generations before the current one, and the next, which was never published."""
        here = self._folder()
        for name in here.names(_GENERATION):
            number = int(name.split("-")[1])
            if name == _generation_name(number) and (0 < number < current or number == current + 1):
                # a file or a link of such a name is somebody else's, and so is a file of another name within
                with suppress(OSError):
                    folder = Folder(self.path / name, inside=here)
                    for file in folder.names(_GENERATION_FILES):
                        os.unlink(file, dir_fd=folder.descriptor)
                    os.rmdir(name, dir_fd=here.descriptor)


def _located(path: str | Path) -> Path:
    """Return where an index is.

    Raises:
        InputError: that cannot be the path of a folder.
    """
    try:
        found = local_path(path)
        usable = bool(str(path)) and b"\0" not in os.fsencode(found)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"path is {path!r:.200} ({error}); expected the path of a folder") from error
    if not usable:
        raise InputError(f"path is {path!r:.200}; expected the path of a folder")
    return found


def _generation_name(number: int) -> str:
    return f"generation-{number:06d}"


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is replaced, None where there is none."""
    found = status_of(path)
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns if path.name == _POINTER else 0)


def _left_by_creation(folder: Folder, name: str) -> bool:
    """Return whether a creation leaves this that was killed: no rows, as these come after the pointer."""
    if name != _generation_name(1):
        return name in (LOCK, _DRAFT)
    try:
        inside = Folder(folder.path / name, inside=folder)
    except OSError:
        return False
    return inside.names(_ANYTHING) == inside.names(_CATALOGUE_NAME)
