"""The lock that admits one writer to an index's folder.

Two things are locked (flock): the file `lock`, which holds the writer's process id, and the folder itself, because the
file could be deleted while it is locked.
"""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixencoder.errors import IndexLockedError, IndexStorageError
from mixencoder.index.files import Folder, storage_error

LOCK = "lock"
_TRIES = 100
"""Attempts to lock if the lock file is deleted each time."""


@contextmanager
def locked(path: Path) -> Generator[Folder]:
    """Hold the write lock of a folder and yield the open folder.

    Raises:
        IndexLockedError: another process or thread holds it; the message gives the process id.
        IndexDamagedError: the lock file is not a regular file.
        IndexStorageError: the folder cannot be written.
    """
    for _ in range(_TRIES):
        try:
            folder = Folder(path, follow=True)
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            descriptor = _open(folder)
            try:
                _lock(descriptor, descriptor, path)
                with suppress(IndexStorageError):  # some file systems cannot lock folders
                    _lock(folder.descriptor, descriptor, path)
                try:
                    # the file or the folder may have been deleted or moved away before it was locked
                    if not _still_there(folder, descriptor, path):
                        continue
                    _write_process_id(descriptor)
                    yield folder
                    return
                finally:
                    # explicitly, as a child forked meanwhile holds copies of the descriptors
                    with suppress(OSError):
                        fcntl.flock(folder.descriptor, fcntl.LOCK_UN)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)
        finally:
            folder.close()
    raise IndexLockedError(f"{path / LOCK} was deleted repeatedly while it was locked; do not delete it")


def _open(folder: Folder) -> int:
    try:
        return folder.open(LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise storage_error(error, folder.path) from error


def _lock(descriptor: int, lock_file: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise storage_error(error, path / LOCK) from error
        holder = os.pread(lock_file, 32, 0).decode("ascii", "replace").strip()
        raise IndexLockedError(
            f"{path} is being written by process {holder if holder.isdecimal() else 'unknown'}; expected one writer at "
            "a time. Try again when it is done"
        ) from None


def _still_there(folder: Folder, descriptor: int, path: Path) -> bool:
    found = folder.status(LOCK)
    same = found is not None and os.path.samestat(found, os.fstat(descriptor))
    return same and folder.is_at(path)


def _write_process_id(descriptor: int) -> None:
    """Write this process's id into the lock file, unless it is a hard link to a file elsewhere."""
    if os.fstat(descriptor).st_nlink == 1:
        with suppress(OSError):  # only for the messages; on a full disk documents can still be removed
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
