"""The lock that lets one writer into an index's folder.

Two things are locked (flock): the file `lock`, which tells others who is at work, and the folder itself, which nobody
can delete in passing as one can that file.
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
"""How often a lock is sought whose file somebody deletes again and again."""


@contextmanager
def locked(path: Path) -> Generator[Folder]:
    """Hold the right to write to a folder, and the folder itself.

    Raises:
        IndexLockedError: somebody else holds it; the message names the process.
        IndexDamagedError: the lock's file is not a regular one.
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
                _take(descriptor, descriptor, path)
                with suppress(IndexStorageError):  # some file systems lock no folders
                    _take(folder.descriptor, descriptor, path)
                try:
                    # what was locked may have been deleted or moved away before it was
                    if not _still_there(folder, descriptor, path):
                        continue
                    _sign(descriptor)
                    yield folder
                    return
                finally:
                    # explicitly, as a process forked meanwhile holds copies of the descriptors
                    with suppress(OSError):
                        fcntl.flock(folder.descriptor, fcntl.LOCK_UN)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)
        finally:
            folder.close()
    raise IndexLockedError(f"{path / LOCK} is deleted again and again; expected the file to be left alone")


def _open(folder: Folder) -> int:
    try:
        return folder.open(LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise storage_error(error, folder.path) from error


def _take(descriptor: int, note: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise storage_error(error, path / LOCK) from error
        holder = os.pread(note, 32, 0).decode("ascii", "replace").strip()
        raise IndexLockedError(
            f"{path} is being written by process {holder if holder.isdecimal() else 'unknown'}; one writer at a time: "
            "try again when it is done"
        ) from None


def _still_there(folder: Folder, descriptor: int, path: Path) -> bool:
    found = folder.status(LOCK)
    same = found is not None and os.path.samestat(found, os.fstat(descriptor))
    return same and folder.is_at(path)


def _sign(descriptor: int) -> None:
    """Write who is at work into the lock's file, unless it has other names and is perhaps somebody else's."""
    if os.fstat(descriptor).st_nlink == 1:
        with suppress(OSError):  # only tells others who it is; a full disk must not keep anyone from removing
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
