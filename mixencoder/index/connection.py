"""The SQLite file of an index: its tables, opening it with suspicion, and SQLite's errors as the library's own.

A stranger may have made the file. So its schema must be the library's own, table by table (a view in the place of a
table could go on for ever, a trigger could change what is written), and neither it nor a file that SQLite would take
up beside it may lie outside of the folder.
"""

import contextlib
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path

from mixencoder.base.texts import printable
from mixencoder.errors import IndexDamagedError, IndexLockedError, IndexStorageError
from mixencoder.index.files import Folder, unreadable

BUSY_SECONDS = 60
"""How long a commit waits for readers, and a reader for a commit."""
TABLES = {
    "manifest": "CREATE TABLE manifest (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "blocks": (
        "CREATE TABLE blocks (block INTEGER PRIMARY KEY, rows INTEGER NOT NULL, checksums BLOB NOT NULL, "
        "starts BLOB, live BLOB, checksum INTEGER)"
    ),
    "entries": (
        "CREATE TABLE entries (row INTEGER PRIMARY KEY, id TEXT NOT NULL, digest BLOB, checksum INTEGER NOT NULL, "
        "metadata TEXT, text TEXT)"
    ),
    "entries_id": "CREATE INDEX entries_id ON entries (id)",
}
ADD_CHECKSUM = "ALTER TABLE blocks ADD COLUMN checksum INTEGER"
"""What turns `blocks` of format 1 into that of format 2."""
_BLOCKS_1 = TABLES["blocks"].replace(", checksum INTEGER", "")
_WRITER_CACHE_KIB = 64 * 1024
_COMPANIONS = ("-journal", "-wal", "-shm")
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
"""Ends a rollback journal that names another file, which SQLite would delete after rolling back."""


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Return a connection to a file; mode is "ro", "rw" or "rwc" (made if missing).

    Raises:
        IndexDamagedError: it, or a file that SQLite would take up with it, is not a regular one of its folder.
        sqlite3.Error: SQLite refused.
    """
    _check_files(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )
    # neither functions nor virtual tables out of the file's own schema, and no page that contradicts itself
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def prepare_writing(connection: sqlite3.Connection) -> None:
    """Set how a connection commits."""
    # a truncated rollback journal, unlike a write-ahead log, can be read from a folder that is read-only;
    # FULL syncs the truncation too, so that a commit reported is a commit kept
    connection.execute("PRAGMA journal_mode=TRUNCATE").fetchall()
    connection.execute("PRAGMA synchronous=FULL")
    # ids are hashes, so every one lands on another page of their index: keep those in memory
    connection.execute(f"PRAGMA cache_size=-{_WRITER_CACHE_KIB}")


def check_tables(connection: sqlite3.Connection, name: str) -> bool:
    """Refuse a schema that the library did not make; return whether blocks carry checksums of their own.

    Raises:
        IndexDamagedError: a table is missing or another, or there is more.
    """
    wanted = {key: _squeezed(statement) for key, statement in TABLES.items()}
    summed = True
    for kind, key, root, statement in connection.execute("SELECT type, name, rootpage, sql FROM sqlite_master"):
        if isinstance(key, str) and key.startswith("sqlite_") and kind in ("table", "index"):
            continue
        found = _squeezed(statement) if isinstance(statement, str) else None
        summed = summed and not (key == "blocks" and found == _squeezed(_BLOCKS_1))
        expected = wanted.pop(key, None) if isinstance(key, str) else None
        if not (found == expected or (key == "blocks" and not summed)) or expected is None or not root:
            raise IndexDamagedError(
                f"{name} holds {_shown(kind, key)}, which an index does not have; expected the tables that the library "
                "makes and nothing else. Build the index again"
            )
    if wanted:
        raise IndexDamagedError(
            f"{name} lacks {', '.join(wanted)}; restore the file from a backup, or build the index again"
        )
    return summed


@contextlib.contextmanager
def translated(name: str) -> Generator[None]:
    """Raise the library's errors in the place of SQLite's.

    Args:
        name: of the file, for the messages.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        # of a message that quotes what is no text
        raise _damaged(name, error) from error
    except sqlite3.ProgrammingError:
        # a mistake of the library, whatever the file holds
        raise
    except sqlite3.DatabaseError as error:
        # the primary code, without the extended part in the upper bits; text that is not UTF-8 has none at all
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
            raise IndexLockedError(f"{name} was in use for {BUSY_SECONDS} seconds ({error}); try again") from error
        if code in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        ):
            raise IndexStorageError(
                f"{name}: {error}; what was committed before is intact. Make room or allow writing there, then do the "
                "same again"
            ) from error
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> IndexDamagedError:
    what = printable(str(error))
    return IndexDamagedError(f"{name} is damaged ({what}); restore the file from a backup, or build the index again")


def _check_files(path: Path) -> None:
    try:
        folder = Folder(path.parent)
        try:
            # the file itself is not opened: closing it would take away the locks that SQLite holds in this process
            folder.status(path.name)
            for suffix in _COMPANIONS:
                folder.status(path.name + suffix)
            journal = path.name + _COMPANIONS[0]
            found = folder.status(journal)
            if found is not None and found.st_size >= len(_JOURNAL_MAGIC):
                descriptor = folder.open(journal, os.O_RDONLY)
                try:
                    tail = os.pread(descriptor, len(_JOURNAL_MAGIC), found.st_size - len(_JOURNAL_MAGIC))
                finally:
                    os.close(descriptor)
                if tail == _JOURNAL_MAGIC:
                    raise IndexDamagedError(
                        f"{path.parent / journal} belongs to a commit of several files, which an index never makes; "
                        "build the index again"
                    )
        finally:
            folder.close()
    except OSError as error:
        raise unreadable(error, path) from error


def _squeezed(statement: str) -> str:
    return "".join(statement.split())


def _shown(kind: object, key: object) -> str:
    return printable(f"the {kind} {key}"[:100])
