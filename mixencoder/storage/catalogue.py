"""What an index knows beside its arrays, in one SQLite file: manifest, blocks of rows, and an entry a document.

A commit of this file is what makes rows count. Readers never hold a transaction open between calls, so they do not
keep a writer waiting; entries of removed documents stay until compaction, so what a reader began to read stays there.
"""

import contextlib
import json
import sqlite3
import threading
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.storage.errors import IndexDamagedError, IndexLockedError, IndexMismatchError, IndexStorageError
from mixencoder.storage.rows import BLOCK_ROWS, BlockRecord, RowMap, unpack
from mixencoder.storage.schema import Schema

BUSY_SECONDS = 60
"""How long a commit waits for readers, and a reader for a commit."""
PAGE = 1024
"""Entries read at once when all are."""
_VARIABLES = 500
_WRITER_CACHE_KIB = 64 * 1024
_INTERRUPTED_COMMIT = sqlite3.SQLITE_READONLY_ROLLBACK

_TABLES = """
CREATE TABLE manifest (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE blocks (
    block INTEGER PRIMARY KEY, rows INTEGER NOT NULL, checksums BLOB NOT NULL, starts BLOB, live BLOB
);
CREATE TABLE entries (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL, digest BLOB, checksum INTEGER NOT NULL, metadata TEXT, text TEXT
);
CREATE INDEX entries_id ON entries (id);
"""


@dataclass(frozen=True)
class Manifest:
    """What an index is, fixed when it is made but for `complete`.

    Attributes:
        schema: the fields of a row.
        fingerprint: what encoded it, by part.
        settings: anything else that whoever opens it must know.
        store_text: whether texts are kept.
        shard_rows: rows of a full shard.
        complete: False until the first building is done.
    """

    schema: Schema
    fingerprint: dict[str, str]
    settings: dict[str, Any]
    store_text: bool
    shard_rows: int
    complete: bool

    def check_fingerprint(self, what: str, expected: Mapping[str, str]) -> None:
        """Refuse to be taken for what something else encoded; "name" is for the message alone.

        Args:
            what: the index, for the message.
            expected: the fingerprint it should have.

        Raises:
            IndexMismatchError: it has another; the message names both and the parts that differ.
        """
        found = self.fingerprint
        parts = [key for key in {**found, **expected} if key != "name" and found.get(key) != expected.get(key)]
        if parts:
            differ = "; ".join(f"{part} is {found.get(part)}, expected {expected.get(part)}" for part in parts)
            raise IndexMismatchError(
                f"{what} was made by {found.get('name', 'another model')}, but this is "
                f"{expected.get('name', 'another one')}: {differ}. Use it with what made it, or build it again"
            )


class EntryRecord(NamedTuple):
    """A document as the catalogue keeps it.

    Attributes:
        row: its first row.
        id: its name.
        digest: hash of its content; None where the id is that hash.
        metadata: JSON, or None.
        text: None where texts are not kept or embeddings were given.
    """

    row: int
    id: str
    digest: bytes | None
    metadata: str | None
    text: str | None

    def checksum(self) -> int:
        """CRC-32 of all attributes."""
        values = (str(self.row), self.id, None if self.digest is None else self.digest.hex(), self.metadata, self.text)
        return zlib.crc32("\0".join("\1" if value is None else value for value in values).encode())


class Catalogue:
    """One connection to the SQLite file; safe to use from several threads.

    Raises (all methods):
        IndexDamagedError: the file is not what SQLite wrote.
        IndexStorageError: the disk is full, read-only or failing.
        IndexLockedError: it was busy for `BUSY_SECONDS`.
    """

    def __init__(self, connection: sqlite3.Connection, name: str, read_only: Path | None = None) -> None:
        self.name = name
        self._connection = connection
        self._read_only = read_only
        self._commits = 0
        self._mutex = threading.RLock()
        # views share a catalogue and may outlive the index, so the last of them closes it
        weakref.finalize(self, connection.close)

    @classmethod
    def in_memory(cls) -> "Catalogue":
        """Return an empty catalogue that is not kept."""
        return cls(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), "the index in memory")

    @classmethod
    def on_disk(cls, path: Path, mode: str) -> "Catalogue":
        """Open a file; mode is "ro" (nothing is ever written, not even beside it), "rw" or "rwc" (made if missing)."""
        with _translated(str(path)):
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
            catalogue = cls(connection, str(path), path if mode == "ro" else None)
            if mode != "ro":
                # a truncated rollback journal, unlike a write-ahead log, can be read from a folder that is read-only;
                # FULL syncs the truncation too, so that a commit reported is a commit kept
                connection.execute("PRAGMA journal_mode=TRUNCATE").fetchall()
                connection.execute("PRAGMA synchronous=FULL")
                # ids are hashes, so every one lands on another page of their index: keep those in memory
                connection.execute(f"PRAGMA cache_size=-{_WRITER_CACHE_KIB}")
        return catalogue

    def create(self, manifest: Manifest) -> None:
        """Make the tables."""
        with self.transaction():
            for statement in _TABLES.strip().split(";\n"):
                self._connection.execute(statement)
            values = {
                "schema": manifest.schema.to_json(),
                "fingerprint": manifest.fingerprint,
                "settings": manifest.settings,
                "store_text": manifest.store_text,
                "shard_rows": manifest.shard_rows,
                "complete": manifest.complete,
            }
            rows = [(name, json.dumps(value)) for name, value in values.items()]
            self._connection.executemany("INSERT INTO manifest VALUES (?, ?)", rows)

    def manifest(self) -> Manifest:
        """Read the manifest."""
        rows = self._query("SELECT name, value FROM manifest")
        values: dict[str, Any] = {name: json.loads(value) for name, value in rows}
        try:
            values["schema"] = Schema.from_json(values["schema"])
            return Manifest(**values)
        except (KeyError, TypeError) as error:
            raise IndexDamagedError(f"{self.name} holds no whole manifest ({error}); build the index again") from error

    def complete(self) -> None:
        """Note that the first building is done."""
        with self.transaction():
            self._connection.execute("UPDATE manifest SET value = 'true' WHERE name = 'complete'")

    def version(self) -> tuple[int, int]:
        """Return what changes with every commit, of another connection or of this one."""
        return self._query("PRAGMA data_version")[0][0], self._commits

    def row_map(self) -> RowMap:
        """Return which rows count: one record a block, however many rows."""
        return RowMap.from_records(self._query("SELECT block, rows, starts, live FROM blocks ORDER BY block"))

    def blocks(self, numbers: Sequence[int] | None = None) -> list[BlockRecord]:
        """Return blocks by number, those there are; None: all in order."""
        columns = "SELECT block, rows, checksums, starts, live FROM blocks"
        rows = self._query(f"{columns} ORDER BY block") if numbers is None else self._chunked(columns, "block", numbers)
        return [BlockRecord(*row) for row in rows]

    def committed_rows(self) -> int:
        """Return the number of rows that were committed, removed ones included."""
        rows = self._query("SELECT block, rows FROM blocks ORDER BY block DESC LIMIT 1")
        return rows[0][0] * BLOCK_ROWS + rows[0][1] if rows else 0

    def find(self, ids: Sequence[str], rows: int) -> dict[str, tuple[int, bytes | None]]:
        """Return for ids the first row and digest of their last entry among the first rows; it may be removed."""
        # of the columns beside max(), SQLite takes the row that holds the maximum
        columns = f"SELECT id, max(row), digest FROM entries WHERE row < {rows:d} AND"
        return {id: (row, digest) for id, row, digest in self._chunked(columns, "id", ids, "GROUP BY id")}

    def live(self, ids: Sequence[str]) -> dict[str, tuple[int, bytes | None]]:
        """Return the first row and digest of the live documents among ids, as last committed."""
        found = self.find(ids, self.committed_rows())
        blocks = {block.block: block for block in self.blocks(sorted({row // BLOCK_ROWS for row, _ in found.values()}))}

        def is_live(row: int) -> bool:
            block = blocks[row // BLOCK_ROWS]
            return bool(unpack(block.live, block.rows)[row % BLOCK_ROWS])

        return {id: entry for id, entry in found.items() if is_live(entry[0])}

    def entries(self, rows: Sequence[int]) -> dict[int, EntryRecord]:
        """Return entries by their first rows, those there are."""
        columns = "SELECT row, id, digest, metadata, text FROM entries"
        return {row[0]: EntryRecord(*row) for row in self._chunked(columns, "row", rows)}

    def ids(self, rows: Sequence[int]) -> dict[int, str]:
        """Return ids by first rows."""
        return dict(self._chunked("SELECT row, id FROM entries", "row", rows))

    def texts(self, rows: Sequence[int]) -> dict[int, str | None]:
        """Return texts by first rows."""
        return dict(self._chunked("SELECT row, text FROM entries", "row", rows))

    def pages(self, rows: int) -> Iterator[list[tuple[EntryRecord, int]]]:
        """Yield all entries of the first rows, removed ones included, with their stored checksums, in order."""
        first = 0
        statement = (
            "SELECT row, id, digest, metadata, text, checksum FROM entries "
            f"WHERE row >= ? AND row < ? ORDER BY row LIMIT {PAGE}"
        )
        while page := self._query(statement, (first, rows)):
            yield [(EntryRecord(*row[:5]), row[5]) for row in page]
            first = page[-1][0] + 1

    def write(self, entries: Iterable[EntryRecord], blocks: Iterable[BlockRecord]) -> None:
        """Add entries, and add or replace blocks, in the current transaction."""
        rows = ((entry.row, entry.id, entry.digest, entry.checksum(), entry.metadata, entry.text) for entry in entries)
        with self._mutex, _translated(self.name):
            self._connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._connection.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)", blocks)

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Write in one transaction, undone by any exception."""
        with self._mutex, _translated(self.name):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
                self._commits += 1
            except BaseException:
                # SQLite itself has rolled back already after some errors, such as a full disk
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def problems(self) -> list[str]:
        """Return what SQLite's own check finds wrong."""
        try:
            found = [row[0] for row in self._query("PRAGMA quick_check")]
        except IndexDamagedError as error:
            return [str(error.__cause__)]
        return [] if found == ["ok"] else found

    def size(self) -> int:
        """Return the bytes of the file."""
        return self._query("PRAGMA page_count")[0][0] * self._query("PRAGMA page_size")[0][0]

    def _chunked(self, columns: str, key: str, values: Sequence[Any], end: str = "") -> list[tuple]:
        found: list[tuple] = []
        join = " " if columns.endswith("AND") else " WHERE "
        for start in range(0, len(values), _VARIABLES):
            part = list(values[start : start + _VARIABLES])
            found += self._query(f"{columns}{join}{key} IN ({', '.join('?' * len(part))}) {end}", part)
        return found

    def _query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple]:
        with self._mutex, _translated(self.name):
            try:
                # fetched at once: a cursor left open would hold SQLite's lock and keep writers from committing
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.OperationalError as error:
                if self._read_only is None or error.sqlite_errorcode != _INTERRUPTED_COMMIT:
                    raise
            self._undo_interrupted_commit()
            return self._connection.execute(statement, values).fetchall()

    def _undo_interrupted_commit(self) -> None:
        """Let a connection that may write roll back what a killed writer left half-committed."""
        assert self._read_only is not None, "only a reading connection asks for it"
        try:
            with contextlib.closing(sqlite3.connect(self._read_only, timeout=BUSY_SECONDS)) as connection:
                connection.execute("SELECT count(*) FROM manifest").fetchall()
        except sqlite3.OperationalError as error:
            raise IndexStorageError(
                f"{self.name}: a writer was killed within a commit, which must be undone before reading, but the "
                f"folder cannot be written ({error}); open the index once where it can be written"
            ) from error


@contextlib.contextmanager
def _translated(name: str) -> Generator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        # the primary code, without the extended part in the upper bits
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise IndexDamagedError(
                f"{name} is damaged ({error}); restore the file from a backup, or build the index again"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise IndexLockedError(f"{name} was in use for {BUSY_SECONDS} seconds ({error}); try again") from error
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise IndexStorageError(
                f"{name}: {error}; what was committed before is intact. Make room or allow writing there, then do the "
                "same again"
            ) from error
        raise
