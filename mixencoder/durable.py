"""Writing files so that a crash or a power failure leaves the old or the new ones whole, never a mix."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

STAGED = ".saved"
"""Subfolder that holds a complete set of new files while they are moved into the folder."""
_DRAFT = f"{STAGED}-"
"""Prefix of temporary names. An interrupted call may leave some; they are never read."""


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that names created, renamed or deleted in it survive a power failure."""
    _sync(folder)


def sync_files(folder: Path) -> None:
    """Flush all files below a folder and their names, so that they survive a power failure."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


@contextmanager
def exclusive(folder: Path) -> Generator[None]:
    """Lock a folder for writing: other threads and processes that call `exclusive` or `shared` wait.

    The lock is on the folder itself, so no lock file remains; while the folder does not exist, it is on its parent. On
    a file system without locks nothing waits.

    Raises:
        OSError: the parent does not exist, or the folder or its parent cannot be opened.
    """
    with ExitStack() as stack:
        if not folder.exists():
            stack.enter_context(_locked(folder.parent, fcntl.LOCK_EX))
        if folder.exists():
            # another process may have made it while this one waited
            stack.enter_context(_locked(folder, fcntl.LOCK_EX))
        yield


@contextmanager
def shared(folder: Path) -> Generator[None]:
    """Lock a folder for reading: `exclusive` waits until all readers have left.

    Raises:
        OSError: the folder cannot be opened.
    """
    with _locked(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(folder: Path, kind: int) -> Generator[None]:
    # each call opens its own descriptor: flock then also works between threads of one process
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: readers find the old or the new text whole, after a power failure too.

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

    A new folder appears whole. In an existing one files are replaced or added, and other files stay; the folder itself
    is kept, as it may be a mount point or a working directory. Concurrent calls run one after another (`exclusive`).

    Args:
        folder: where to write; may exist.
        write: fills the empty folder that it is given, with files only, no subfolders.

    Raises:
        OSError: a file or the folder cannot be written.
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
    finish_interrupted(folder)
    for leftover in folder.glob(f"{_DRAFT}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
        # from this rename on the new files count
        _fill(Path(temporary, "new"), write).rename(folder / STAGED)
    sync_folder(folder)
    finish_interrupted(folder)


def finish_interrupted(folder: Path) -> None:
    """Complete an interrupted `write_folder`, if all of its files were staged; otherwise do nothing."""
    staged = folder / STAGED
    if not staged.is_dir():
        return
    for file in staged.iterdir():
        draft = folder / f"{_DRAFT}{file.name}"
        draft.unlink(missing_ok=True)
        try:
            os.link(file, draft)
        except OSError:
            # some file systems have no hard links
            shutil.copyfile(file, draft)
            _sync(draft)
        os.replace(draft, folder / file.name)
        # os.replace does nothing if both names are links to one file
        draft.unlink(missing_ok=True)
    sync_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
        # renamed first, as deleting is not one step: `readable_folder` must not find half of it
        staged.rename(Path(temporary, "done"))


def readable_folder(folder: Path) -> Path:
    """Return the folder to read: this one, or the subfolder where an interrupted `write_folder` staged its files."""
    staged = folder / STAGED
    return staged if staged.is_dir() else folder


def is_vacant(path: Path) -> bool:
    """Whether a path does not exist or is an empty folder; leftovers of an interrupted `write_folder` do not count."""
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
