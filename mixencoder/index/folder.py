"""An index's folder: generations of files, the pointer to the current one, and the lock that admits one writer.

    index.json            the pointer: kind, format, number of the current generation; replaced atomically
    lock                  locked (flock) by the process that writes
    generation-000001/    catalogue.sqlite and the shards

Compaction writes a new generation, replaces the pointer and deletes the old generation; readers that have it open keep
reading it. Reading writes nothing, so the folder may be read-only. Files that are not the index's own are never
deleted: only files of the names above, in generations that a killed writer can have left.
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
"""Increased when this version cannot read older indexes, or older versions cannot read its own. Format 1, without
checksums of block records, is read too; the first write upgrades it."""
POINTER, _DRAFT, _CATALOGUE = "index.json", "index.json.new", "catalogue.sqlite"
_POINTER_BYTES = 2**16
_GENERATION = re.compile(r"generation-([0-9]{6,9})")
_CATALOGUE_NAME = re.compile(r"catalogue\.sqlite(-journal|-wal|-shm)?")
_GENERATION_FILES = re.compile(f"{_CATALOGUE_NAME.pattern}|{SHARD_NAME.pattern}")
_ANYTHING = re.compile(r".*", re.DOTALL)


@dataclass
class Generation:
    """One set of an index's files: the catalogue and the arrays, which only grow.

    Attributes:
        number: its number in the pointer.
        folder: where its files are; None in memory.
        manifest: as read when the generation was opened.
        catalogue: a connection for reading.
        arrays: the rows.
        writing: a connection for writing, opened when first needed.
        format: the format of its files.
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
        self.path = _folder_path(path)
        self.name = str(self.path)
        self._current: Generation | None = None
        self._seen: tuple[object, object] | None = None
        # the folder while it is locked; all writes go through it
        self._locked_folder: Folder | None = None

    def current(self) -> Generation:
        """Return the generation that the pointer names; opens it again if its files were replaced.

        Raises:
            IndexStateError: there is no index, or its format is newer.
            IndexDamagedError: the pointer or the catalogue cannot be read.
            FileNotFoundError: a compaction deleted the generation meanwhile; call again.
        """
        pointer = self._identity_of_pointer()
        if self._current is None or (pointer, _identity(self._catalogue_path(self._current.number))) != self._seen:
            number, version = self._read_pointer()
            generation = self._open(number, version)
            self._current, self._seen = generation, (pointer, _identity(self._catalogue_path(number)))
            if self._identity_of_pointer() != pointer:
                raise FileNotFoundError(self.path / POINTER)
        return self._current

    def prepare(self) -> bool:
        """Make the folder ready for a new index, or return True if one is there already, complete or not.

        Raises:
            IndexStateError: the path is a file, or a folder with other files.
            IndexStorageError: the folder cannot be made.
        """
        if status_of(self.path / POINTER) is not None:
            return True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            folder = Folder(self.path, follow=True)
            # a creation that was killed before it wrote the pointer leaves some files
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
        """Make an empty generation beside the current one, for `publish`; only under the lock."""
        here = self._folder()
        current = self._read_pointer()[0] if here.status(POINTER) is not None else 0
        self._delete_stale(current)
        path = self._generation_path(current + 1)
        try:
            os.mkdir(path.name, dir_fd=here.descriptor)
        except FileExistsError:
            raise IndexStorageError(
                f"{path} already exists, with content that an index does not make; move it away, then try again"
            ) from None
        except OSError as error:
            raise storage_error(error, path) from error
        self._check_in_place()
        catalogue = Catalogue.on_disk(path / _CATALOGUE, "rwc")
        catalogue.create(manifest)
        try:
            arrays = ShardFiles(Folder(path, parent=here), manifest.schema, manifest.shard_rows)
        except OSError as error:
            raise storage_error(error, path) from error
        return Generation(current + 1, path, manifest, catalogue, arrays, catalogue)

    def publish(self, generation: Generation) -> None:
        """Make a generation the current one, atomically, and delete stale ones."""
        assert generation.folder is not None, "a generation of a folder has one"
        self._check_in_place()
        try:
            folder = Folder(generation.folder, parent=self._folder())
            try:
                os.fsync(folder.descriptor)
            finally:
                folder.close()
        except OSError as error:
            raise storage_error(error, generation.folder) from error
        self._write_pointer(generation.number)
        self._delete_stale(generation.number)

    def upgrade(self, generation: Generation) -> bool:
        """Upgrade an index of an older format and return whether that was needed; only under the lock."""
        if generation.format < FORMAT:
            # first, so that no older version writes to a format that it does not know
            self._write_pointer(generation.number)
        if not generation.writer().has_block_checksums:
            generation.writer().add_block_checksums()
            return True
        return generation.format < FORMAT

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the write lock.

        Raises:
            IndexLockedError: another process or thread holds it; the message gives the process id.
            IndexStorageError: the folder cannot be written.
        """
        with locked(self.path) as folder:
            self._locked_folder = folder
            try:
                yield
            finally:
                self._locked_folder = None

    def delete_leftovers(self) -> None:
        """Delete what a killed compaction left; only under the lock."""
        self._delete_stale(self._read_pointer()[0])

    def _open(self, number: int, version: int) -> Generation:
        path = self._catalogue_path(number)
        try:
            if status_of(path) is None:
                raise IndexDamagedError(
                    f"{path} is missing, though {self.path / POINTER} names it; restore the file, or build the index "
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
        found = _identity(self.path / POINTER)
        if found is None:
            raise IndexStateError(
                f"{self.path} is not an index: it holds no {POINTER}; expected a folder that index() made"
            )
        return found

    def _read_pointer(self) -> tuple[int, int]:
        """Return the number of the current generation, and the format."""
        path = self.path / POINTER
        try:
            content = json.loads(read_small(path, _POINTER_BYTES))
            kind, version, number = content["kind"], content["format"], content["generation"]
            # an exact type check, as True and 1.0 equal 1
            if not (type(version) is type(number) is int and version > 0 and 0 < number < 10**9):
                raise ValueError(f"format {version!r}, generation {number!r}")
        except (IndexDamagedError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise IndexDamagedError(
                f"{path} cannot be read ({type(error).__name__}: {printable(str(error)[:200])}); expected the pointer "
                f'of an index. If the folder is an index, write {{"kind": "{KIND}", "format": {FORMAT}, "generation": '
                "N} there, where N is the number of its generation folder"
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
            # an existing draft is unfinished, or a link that must not be followed
            with suppress(FileNotFoundError):
                os.unlink(_DRAFT, dir_fd=here.descriptor)
            with os.fdopen(here.open(_DRAFT, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(_DRAFT, POINTER, src_dir_fd=here.descriptor, dst_dir_fd=here.descriptor)
            os.fsync(here.descriptor)
        except OSError as error:
            raise storage_error(error, self.path / POINTER) from error

    def _folder(self) -> Folder:
        assert self._locked_folder is not None, "only under the lock"
        return self._locked_folder

    def _check_in_place(self) -> None:
        """Raise if the folder was moved away: SQLite opens by path and would write to another folder."""
        if not self._folder().is_at(self.path):
            raise IndexStateError(f"{self.path} was moved away while it was written to; open the index where it is now")

    def _generation_path(self, number: int) -> Path:
        return self.path / _generation_name(number)

    def _catalogue_path(self, number: int) -> Path:
        return self._generation_path(number) / _CATALOGUE

    def _delete_stale(self, current: int) -> None:
        """Delete the generations before the current one, and the next one, which was never published."""
        here = self._folder()
        for name in here.names(_GENERATION):
            number = int(name.split("-")[1])
            if name == _generation_name(number) and (0 < number < current or number == current + 1):
                # a file or a link of that name is not the index's, nor are files of other names in the folder
                with suppress(OSError):
                    folder = Folder(self.path / name, parent=here)
                    for file in folder.names(_GENERATION_FILES):
                        os.unlink(file, dir_fd=folder.descriptor)
                    os.rmdir(name, dir_fd=here.descriptor)


def _folder_path(path: str | Path) -> Path:
    """Return the path of an index, with a leading ``~`` expanded.

    Raises:
        InputError: it cannot be the path of a folder.
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
    """Return numbers that change when a file is replaced, or None if there is no file."""
    found = status_of(path)
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns if path.name == POINTER else 0)


def _left_by_creation(folder: Folder, name: str) -> bool:
    """Return whether a killed creation can have left this; never rows, as these are written after the pointer."""
    if name != _generation_name(1):
        return name in (LOCK, _DRAFT)
    try:
        generation = Folder(folder.path / name, parent=folder)
    except OSError:
        return False
    return generation.names(_ANYTHING) == generation.names(_CATALOGUE_NAME)
