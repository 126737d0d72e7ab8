"""The SQLite file of an index: its tables, checks before opening it, and SQLite's errors as the library's own.

The file may come from an untrusted source. So its schema must be the library's own, table by table (a view instead of
a table could return rows without end, a trigger could change what is written). Neither the file nor the files beside
it that SQLite would read may lie outside the folder.
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
"""How long a commit waits for readers, and a reader waits for a commit."""
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
"""Turns the table `blocks` of format 1 into that of format 2."""
_BLOCKS_OF_FORMAT_1 = TABLES["blocks"].replace(", checksum INTEGER", "")
_WRITER_CACHE_KIB = 64 * 1024
_COMPANIONS = ("-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite reads beside the database."""
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
"""Ends a rollback journal that names another file, which SQLite would delete after the rollback."""


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Return a connection to a file; mode is "ro", "rw" or "rwc" (create if missing).

    Raises:
        IndexDamagedError: the file, or one that SQLite would read with it, is not a regular file in its folder.
        sqlite3.Error: SQLite cannot open it.
    """
    _check_files(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
    )
    # allow no functions or virtual tables from the file's own schema, and check pages for consistency
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def prepare_writing(connection: sqlite3.Connection) -> None:
    """Set how a connection commits: durably, and so that readers need no write permission."""
    # unlike with a write-ahead log, a database with a truncated rollback journal can be read in a read-only folder;
    # FULL syncs the truncation too, so that a reported commit survives a power failure
    connection.execute("PRAGMA journal_mode=TRUNCATE").fetchall()
    connection.execute("PRAGMA synchronous=FULL")
    # ids are hashes, so each one changes another page of their index: keep these pages in memory
    connection.execute(f"PRAGMA cache_size=-{_WRITER_CACHE_KIB}")


def check_tables(connection: sqlite3.Connection, name: str) -> bool:
    """Raise unless the schema is the library's own; return whether each block record has a checksum.

    Raises:
        IndexDamagedError: a table is missing, differs, or is not one of an index.
    """
    missing = {key: _without_spaces(statement) for key, statement in TABLES.items()}
    has_checksums = True
    for kind, key, root, statement in connection.execute("SELECT type, name, rootpage, sql FROM sqlite_master"):
        if isinstance(key, str) and key.startswith("sqlite_") and kind in ("table", "index"):
            continue
        found = _without_spaces(statement) if isinstance(statement, str) else None
        has_checksums = has_checksums and not (key == "blocks" and found == _without_spaces(_BLOCKS_OF_FORMAT_1))
        expected = missing.pop(key, None) if isinstance(key, str) else None
        if not (found == expected or (key == "blocks" and not has_checksums)) or expected is None or not root:
            raise IndexDamagedError(
                f"{name} holds {_shown(kind, key)}, which an index does not have; expected only the tables that the "
                "library makes. Build the index again"
            )
    if missing:
        raise IndexDamagedError(
            f"{name} lacks {', '.join(missing)}; restore the file from a backup, or build the index again"
        )
    return has_checksums


@contextlib.contextmanager
def translate_errors(name: str) -> Generator[None]:
    """Turn SQLite's errors into the library's own.

    Args:
        name: of the file, for the messages.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        # from an error message that quotes bytes that are not UTF-8
        raise _damaged(name, error) from error
    except sqlite3.ProgrammingError:
        # a bug in the library, not a fault of the file
        raise
    except sqlite3.DatabaseError as error:
        # the primary code, without the extended code in the upper bits; the error of text that is not UTF-8 has none
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
                f"{name}: {error}; what was committed before is intact. Free disk space or allow writing there, then "
                "try again"
            ) from error
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> IndexDamagedError:
    what = printable(str(error))
    return IndexDamagedError(f"{name} is damaged ({what}); restore the file from a backup, or build the index again")


def _check_files(path: Path) -> None:
    try:
        folder = Folder(path.parent)
        try:
            # the file itself is not opened: closing it would release the locks that SQLite holds in this process
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


def _without_spaces(statement: str) -> str:
    return "".join(statement.split())


def _shown(kind: object, key: object) -> str:
    return printable(f"the {kind} {key}"[:100])
