"""Access to the files of an index's folder, which may be untrusted: only regular files, never through a link.

Files are opened relative to a descriptor of their folder. So if the folder is moved away during a write, the write
goes to the moved folder and not to one that took its place.
"""

import os
import re
import stat
import weakref
from pathlib import Path

from mixencoder.errors import IndexDamagedError, IndexStorageError

_SAFE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Follow no link, do not wait for a pipe, and do not pass the descriptor on to child programs."""
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Folder:
    """An open folder; it stays the same folder if its path changes.

    Args:
        path: where it is.
        follow: whether the path itself may be a symbolic link.
        parent: the folder that holds it, if that is open too.

    Attributes:
        descriptor: of the open folder.
        close: closes it; called at the latest when the object is garbage-collected.

    Raises:
        OSError: it cannot be opened, or is not a folder.
    """

    def __init__(self, path: Path, *, follow: bool = False, parent: "Folder | None" = None) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        if parent is None:
            self.descriptor = os.open(path, flags)
        else:
            self.descriptor = os.open(path.name, flags, dir_fd=parent.descriptor)

        self.close = weakref.finalize(self, os.close, self.descriptor)

    def names(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the sorted names in it that the whole pattern matches; none if the folder has been deleted."""
        try:
            return sorted(name for name in os.listdir(self.descriptor) if pattern.fullmatch(name))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of a file in it, or None if there is no such file.

        Raises:
            IndexDamagedError: it is not a regular file.
        """
        try:
            found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        check_regular(found, self.path / name)
        return found

    def open(self, name: str, flags: int) -> int:
        """Return a descriptor of a regular file in it; flags as for `os.open`.

        Raises:
            IndexDamagedError: it is not a regular file.
            OSError: it cannot be opened.
        """
        self.status(name)
        descriptor = os.open(name, flags | _SAFE_FLAGS, 0o666, dir_fd=self.descriptor)
        try:
            check_regular(os.fstat(descriptor), self.path / name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_at(self, path: Path) -> bool:
        """Return whether a path leads to this folder, links included."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False


def check_regular(found: os.stat_result, path: Path) -> None:
    """Raise if this is not the status of a regular file.

    Raises:
        IndexDamagedError: it is a link, a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise IndexDamagedError(
            f"{path} is {kind}; expected a regular file, as an index reads and writes nothing outside its own folder. "
            "Put the file itself there"
        )


def status_of(path: Path) -> os.stat_result | None:
    """Return the status of a regular file, or None if there is no such file.

    Raises:
        IndexDamagedError: it is not a regular file.
        IndexStorageError: the status cannot be read.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(error, path) from error
    check_regular(found, path)
    return found


def read_small(path: Path, max_bytes: int) -> bytes:
    """Return the content of a small regular file.

    Raises:
        IndexDamagedError: it is not regular, or longer than max_bytes.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | _SAFE_FLAGS)
    try:
        found = os.fstat(descriptor)
        check_regular(found, path)
        if found.st_size > max_bytes:
            raise IndexDamagedError(f"{path} holds {found.st_size:,} bytes; expected at most {max_bytes:,}")
        return os.read(descriptor, max_bytes)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> IndexStorageError:
    """Return the error to raise when a file cannot be written."""
    return IndexStorageError(
        f"{path} cannot be written: {error.strerror or error}; what was committed before is intact. Free disk space "
        "or allow writing there, then try again"
    )


def unreadable(error: OSError, path: Path) -> IndexStorageError:
    """Return the error to raise when a file cannot be read."""
    return IndexStorageError(f"{path} cannot be read: {error.strerror or error}; allow reading the index's files")
