"""The files of an index's folder, which a stranger may have made: regular files alone, and none through a link.

A file is reached from a descriptor of its folder, so that a folder that is moved away while it is written to takes
what is written with it, and whatever was put in its place is left alone.
"""

import os
import re
import stat
import weakref
from pathlib import Path

from mixencoder.errors import IndexDamagedError, IndexStorageError

_GUARDED = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Follow no link, wait for no pipe, and hand nothing to a program that is started meanwhile."""
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Folder:
    """A folder held open, however its path changes.

    Args:
        path: where it is.
        follow: whether the path itself may be a symbolic link.
        inside: the folder that holds it, if that is held open too.

    Attributes:
        descriptor: of the open folder.
        close: lets go of it, at the latest when nobody holds the object any more.

    Raises:
        OSError: it cannot be opened, or is no folder.
    """

    def __init__(self, path: Path, *, follow: bool = False, inside: "Folder | None" = None) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        if inside is None:
            self.descriptor = os.open(path, flags)
        else:
            self.descriptor = os.open(path.name, flags, dir_fd=inside.descriptor)

        self.close = weakref.finalize(self, os.close, self.descriptor)

    def names(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the sorted names in it that a pattern matches whole; none once the folder was deleted."""
        try:
            return sorted(name for name in os.listdir(self.descriptor) if pattern.fullmatch(name))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def status(self, name: str) -> os.stat_result | None:
        """Return what is known of a file in it, None where there is none.

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
            OSError: the system refused.
        """
        self.status(name)
        descriptor = os.open(name, flags | _GUARDED, 0o666, dir_fd=self.descriptor)
        try:
            check_regular(os.fstat(descriptor), self.path / name)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def is_at(self, path: Path) -> bool:
        """Return whether a path leads here, perhaps through links."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False


def check_regular(found: os.stat_result, path: Path) -> None:
    """Refuse what is not a regular file.

    Raises:
        IndexDamagedError: it is not.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise IndexDamagedError(
            f"{path} is {kind}; expected a regular file, as an index reads and writes nothing outside of its own "
            "folder. Put the file itself there"
        )


def status_of(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file, None where there is none.

    Raises:
        IndexDamagedError: it is not a regular file.
        IndexStorageError: the system does not tell.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(error, path) from error
    check_regular(found, path)
    return found


def read_small(path: Path, most: int) -> bytes:
    """Return the content of a small regular file.

    Raises:
        IndexDamagedError: it is not regular, or is longer than most bytes.
        OSError: the system refused.
    """
    descriptor = os.open(path, os.O_RDONLY | _GUARDED)
    try:
        found = os.fstat(descriptor)
        check_regular(found, path)
        if found.st_size > most:
            raise IndexDamagedError(f"{path} holds {found.st_size:,} bytes; expected at most {most:,}")
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, path: Path) -> IndexStorageError:
    """Return the error to raise when the system refused to write a file."""
    return IndexStorageError(
        f"{path} cannot be written: {error.strerror or error}; what was committed before is intact. Make room or allow "
        "writing there, then do the same again"
    )


def unreadable(error: OSError, path: Path) -> IndexStorageError:
    """Return the error to raise when the system refused to read a file."""
    return IndexStorageError(f"{path} cannot be read: {error.strerror or error}; expected an index that may be read")
