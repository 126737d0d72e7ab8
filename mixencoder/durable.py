"""Files that a crash and a power failure leave whole: flushing, and replacing a folder's files as if in one step."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

STAGED = ".saved"
"""Folder inside a folder: a complete set of files that are being moved to their places."""
_DRAFT = f"{STAGED}-"
"""Start of the names of what an interrupted call leaves behind, which nobody reads."""


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or deleted in a folder survive a power failure."""
    _sync(folder)


def sync_files(folder: Path) -> None:
    """Make sure that a folder's files, those of folders below it too, are on the disk under their names."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


@contextmanager
def exclusive(folder: Path) -> Generator[None]:
    """Keep others who ask, threads and processes, from writing a folder at the same time; they wait.

    The folder itself is locked, so nothing is left behind; for one that is not there yet, its parent. Where a file
    system has no locks nobody waits.

    Raises:
        OSError: the parent is not there, or neither can be opened.
    """
    with ExitStack() as stack:
        if not folder.exists():
            stack.enter_context(_locked(folder.parent, fcntl.LOCK_EX))
        if folder.exists():
            # somebody else may have made it while we waited
            stack.enter_context(_locked(folder, fcntl.LOCK_EX))
        yield


@contextmanager
def shared(folder: Path) -> Generator[None]:
    """Keep a folder's files as they are while several of them are read; `exclusive` waits for all who read.

    Raises:
        OSError: the folder cannot be opened.
    """
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(folder: Path, kind: int) -> Generator[None]:
    # a descriptor of our own: locks of one file that a process opened twice exclude each other, as threads need
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that readers find what it was or the whole of what it becomes, after a power failure too.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield the path of a draft to write; at the end it replaces the file as in `replace_file`.

    Raises:
        OSError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_DRAFT) as temporary:
        draft = Path(temporary, path.name)
        yield draft
        _sync(draft)
        os.replace(draft, path)
    _sync(path.parent)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder so that readers (`readable_folder`) find all of its files as they were, or all of them new.

    A folder that is not there appears whole. In one that is there, files are replaced or added and others stay; the
    folder itself stays too, as it may be a mount point or somebody's working directory. Of several who write at once
    each waits for the one before (`exclusive`).

    Args:
        folder: where.
        write: fills the empty folder that it is given, with files alone.

    Raises:
        OSError: something cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        if folder.exists():
            _write_over(folder, write)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            _fill(Path(temporary, "new"), write).rename(folder)
        sync_folder(folder.parent)


def _write_over(folder: Path, write: Callable[[Path], None]) -> None:
    finish(folder)
    for leftover in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
        # this is the moment from which the new files are the folder's
        _fill(Path(temporary, "new"), write).rename(folder / STAGED)
    sync_folder(folder)
    finish(folder)


def finish(folder: Path) -> None:
    """Carry a `write_folder` that was interrupted to its end, if it had come to the point where its files count."""
    staged = folder / STAGED
    if not staged.is_dir():
        return
    for file in staged.iterdir():
        draft = folder / f"{_DRAFT}{file.name}"
        draft.unlink(missing_ok=True)
        try:
            os.link(file, draft)
        except OSError:
            # some file systems have no links
            shutil.copyfile(file, draft)
            _sync(draft)
        os.replace(draft, folder / file.name)
        # two names of one file are both left by the call above
        draft.unlink(missing_ok=True)
    sync_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
        # in one step, so that half of it is never read
        staged.rename(Path(temporary, "done"))


def readable_folder(folder: Path) -> Path:
    """Return where a folder's files are to be read: there, or where an interrupted `write_folder` left them."""
    staged = folder / STAGED
    return staged if staged.is_dir() else folder


def is_vacant(path: Path) -> bool:
    """Return whether nothing is there, or an empty folder, but for what an interrupted `write_folder` left."""
    return not path.exists() or (path.is_dir() and all(entry.name.startswith(_DRAFT) for entry in path.iterdir()))


def _fill(folder: Path, write: Callable[[Path], None]) -> Path:
    folder.mkdir()
    write(folder)
    sync_files(folder)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
