"""The SQLite file of an index: the manifest, a record per block of rows, and an entry per document.

Rows count once this file commits them. Readers never hold a transaction open between calls, so they do not keep a
writer waiting; entries of removed documents stay until compaction, so a reader finds what it began to read. The file
may have been damaged since it was written: types are checked, blocks and entries are compared with their checksums,
and a mismatch raises `IndexDamagedError`.
"""

import contextlib
import json
import os
import sqlite3
import threading
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mixencoder.base.texts import printable, unicode_fault
from mixencoder.errors import IndexDamagedError, IndexStorageError
from mixencoder.index.connection import (
    ADD_CHECKSUM,
    TABLES,
    check_tables,
    connect,
    prepare_writing,
    translate_errors,
)
from mixencoder.index.fork_check import check_same_process
from mixencoder.index.manifest import MAX_VALUE_BYTES, Manifest
from mixencoder.index.rows import BLOCK_ROWS, BlockRecord, RowMap, unpack

PAGE = 1024
"""Entries read at once when reading all of them."""
_MAX_VARIABLES = 500
_INTERRUPTED_COMMIT = sqlite3.SQLITE_READONLY_ROLLBACK
_MANIFEST = f"SELECT name, CASE WHEN length(value) <= {MAX_VALUE_BYTES} THEN value END FROM manifest LIMIT 32"
_BLOCKS_OF_FORMAT_1 = "SELECT block, rows, checksums, starts, live FROM blocks"
_BLOCKS = "SELECT block, rows, checksums, starts, live, checksum FROM blocks"
_ENTRIES = "SELECT row, id, digest, metadata, text, checksum FROM entries"
_STATE = "state"
"""Manifest row that holds the number of blocks and the XOR of their checksums."""
_NONE = "\1"
"""Stands for None in the content of an entry's checksum."""
_T = TypeVar("_T")


class EntryRecord(NamedTuple):
    """A document as the catalogue keeps it.

    Attributes:
        row: its first row.
        id: its id.
        digest: hash of its content; None if the id is that hash.
        metadata: JSON, or None.
        text: None if texts are not kept or only an embedding was given.
    """

    row: int
    id: str
    digest: bytes | None
    metadata: str | None
    text: str | None

    def checksum(self) -> int:
        """CRC-32 of all attributes."""
        row, id, digest, metadata, text = self
        content = f"{row}\0{id}\0{_NONE if digest is None else digest.hex()}\0"
        content += f"{_NONE if metadata is None else metadata}\0{_NONE if text is None else text}"
        return zlib.crc32(content.encode())

    def has_valid_types(self) -> bool:
        """Return whether every attribute has the right type."""
        row, id, digest, metadata, text = self
        return (
            type(row) is int
            and type(id) is str
            and (digest is None or type(digest) is bytes)
            and (metadata is None or type(metadata) is str)
            and (text is None or type(text) is str)
        )


class Catalogue:
    """One connection to the SQLite file; safe to use from several threads, not from a forked process.

    Raises (all methods):
        IndexDamagedError: the file is not what was written.
        IndexStorageError: the disk is full, read-only or failing.
        IndexLockedError: the file was busy for `BUSY_SECONDS`.
        IndexStateError: this process was forked after the file was opened.
    """

    def __init__(self, connection: sqlite3.Connection, name: str, read_only_path: Path | None = None) -> None:
        self.name = name
        self._connection = connection
        self._read_only_path = read_only_path
        self._has_block_checksums = False
        self._commits = 0
        self._mutex = threading.RLock()
        self._process = os.getpid()
        # views share a catalogue and may outlive the index, so the last of them closes it
        weakref.finalize(self, connection.close)

    @classmethod
    def in_memory(cls) -> "Catalogue":
        """Return an empty catalogue in memory."""
        return cls(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), "the index in memory")

    @classmethod
    def on_disk(cls, path: Path, mode: str) -> "Catalogue":
        """Open a file; mode is "ro" (write nothing, not even beside the file), "rw" or "rwc" (create if missing)."""
        with translate_errors(str(path)):
            connection = connect(path, mode)
        catalogue = cls(connection, str(path), path if mode == "ro" else None)
        if mode != "rwc":
            catalogue._has_block_checksums = catalogue._read(lambda connection: check_tables(connection, str(path)))
        if mode != "ro":
            catalogue._read(prepare_writing)
        return catalogue

    def create(self, manifest: Manifest) -> None:
        """Create the tables and write the manifest."""
        with self.transaction():
            for statement in TABLES.values():
                self._connection.execute(statement)
            rows = [*manifest.to_rows(), (_STATE, json.dumps([0, 0]))]
            self._connection.executemany("INSERT INTO manifest VALUES (?, ?)", rows)
        self._has_block_checksums = True

    @property
    def has_block_checksums(self) -> bool:
        """Whether each block record has a checksum; False in format 1."""
        if not self._has_block_checksums:
            self._has_block_checksums = self._read(lambda connection: check_tables(connection, self.name))
        return self._has_block_checksums

    def add_block_checksums(self) -> None:
        """Give every block record a checksum of its present content."""
        records = self.blocks()
        with self.transaction():
            self._connection.execute(ADD_CHECKSUM)
            self._connection.execute("INSERT INTO manifest VALUES (?, ?)", (_STATE, json.dumps([0, 0])))
            self._put_blocks(records)
        self._has_block_checksums = True

    def manifest(self) -> Manifest:
        """Read the manifest."""
        return Manifest.from_rows(self._query(_MANIFEST), self.name)

    def complete(self) -> None:
        """Record that the first build has finished."""
        with self.transaction():
            self._connection.execute("UPDATE manifest SET value = 'true' WHERE name = 'complete'")

    def version(self) -> tuple[int, int]:
        """Return numbers that change with every commit, by another connection or by this one."""
        return self._query("PRAGMA data_version")[0][0], self._commits

    def row_map(self) -> RowMap:
        """Return which rows are live; reads one record per block."""
        return self.row_map_of(self.blocks())

    def row_map_of(self, records: Sequence[BlockRecord]) -> RowMap:
        """Return which rows are live, from the records of all blocks."""
        try:
            return RowMap.from_records(records)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def blocks(self) -> list[BlockRecord]:
        """Return all block records in order; their checksums are checked."""
        has_checksums = self.has_block_checksums

        def read(connection: sqlite3.Connection) -> tuple[list[BlockRecord], list[int], list[tuple]]:
            # one transaction, so that blocks and their state belong to one commit
            own = not connection.in_transaction
            if own:
                connection.execute("BEGIN")
            try:
                records, sums = [], []
                # row by row, as a damaged file could repeat rows without end
                for row in connection.execute(f"{_BLOCKS if has_checksums else _BLOCKS_OF_FORMAT_1} ORDER BY block"):
                    records.append(self._checked_block(BlockRecord(*row[:5]), len(records)))
                    sums.append(row[5] if has_checksums else 0)
                return records, sums, connection.execute(_MANIFEST).fetchall() if has_checksums else []
            finally:
                if own and connection.in_transaction:
                    connection.execute("ROLLBACK")

        records, sums, manifest = self._read(read)
        if has_checksums:
            wrong = next((r.block for r, found in zip(records, sums, strict=True) if r.checksum() != found), None)
            if wrong is not None:
                raise self._damaged(f"the record of block {wrong} is not what was written (checksum)")
            if self._state(manifest) != [len(records), _xor_of(sums)]:
                raise self._damaged(f"its {len(records):,} blocks are not those that were written (checksum)")
        return records

    def block(self, number: int) -> BlockRecord | None:
        """Return one block record, or None if there is none yet; its checksum is checked."""
        rows = self._query(f"{_BLOCKS if self.has_block_checksums else _BLOCKS_OF_FORMAT_1} WHERE block = ?", (number,))
        if not rows:
            return None
        record = self._checked_block(BlockRecord(*rows[0][:5]), number)
        if self.has_block_checksums and record.checksum() != rows[0][5]:
            raise self._damaged(f"the record of block {number} is not what was written (checksum)")
        return record

    def committed_rows(self) -> int:
        """Return the number of committed rows, including removed ones."""
        rows = self._query("SELECT max(block) FROM blocks")
        if rows[0][0] is None:
            return 0
        last = self.block(rows[0][0]) if type(rows[0][0]) is int else None
        if last is None:
            raise self._damaged("its last block cannot be read")
        return last.block * BLOCK_ROWS + last.rows

    def find(self, ids: Sequence[str], rows: int) -> dict[str, tuple[int, bytes | None]]:
        """Return the first row and digest of the last entry of each id below row number `rows`; it may be removed."""
        # SQLite takes the columns beside max() from the row that holds the maximum
        columns = f"SELECT id, max(row), digest FROM entries WHERE row >= 0 AND row < {rows:d} AND"
        # SQLite takes no text that UTF-8 cannot hold, and no document has such an id
        valid = [id for id in ids if unicode_fault(id) is None]
        found = {
            self._of_type(id, str): (self._of_type(row, int), self._of_type(digest, bytes, None))
            for id, row, digest in self._query_in_batches(columns, "id", valid, "GROUP BY id")
        }
        if not found.keys() <= set(valid):
            raise self._damaged("a document is found under an id that it does not have")
        return found

    def live(self, ids: Sequence[str]) -> dict[str, tuple[int, bytes | None]]:
        """Return the first row and digest of the live documents among ids, in the newest commit."""
        found = self.find(ids, self.committed_rows())
        bits: dict[int, Any] = {}
        for number in sorted({row // BLOCK_ROWS for row, _ in found.values()}):
            record = self.block(number)
            if record is None:
                raise self._damaged(f"block {number} is missing")
            bits[number] = unpack(record.live, record.rows)
        return {id: entry for id, entry in found.items() if bits[entry[0] // BLOCK_ROWS][entry[0] % BLOCK_ROWS]}

    def entries(self, rows: Sequence[int], *, check: bool = True) -> dict[int, EntryRecord]:
        """Return entries by first row; with check, raise if one is missing or its checksum differs."""
        found = {}
        for row in self._query_in_batches(_ENTRIES, "row", rows):
            record = self._entry(row)
            if check and not _matches_checksum(record, row):
                raise self._damaged(f"the entry of document {record.id!r} is not what was written (checksum)")
            found[record.row] = record
        return self._require_all(found, rows) if check else found

    def ids(self, rows: Sequence[int], *, check: bool = True) -> dict[int, str]:
        """Return ids by first row; with check, raise if one is missing."""
        found = {
            self._of_type(row, int): self._of_type(id, str)
            for row, id in self._query_in_batches("SELECT row, id FROM entries", "row", rows)
        }
        return self._require_all(found, rows) if check else found

    def texts(self, rows: Sequence[int]) -> dict[int, str | None]:
        """Return texts by first row; the checksums of their entries are checked."""
        return {row: entry.text for row, entry in self.entries(rows).items()}

    def pages(self, rows: int) -> Iterator[list[tuple[EntryRecord, bool]]]:
        """Yield all entries below row number `rows` in order, removed too, and whether each matches its checksum."""
        first = 0
        statement = f"{_ENTRIES} WHERE row >= ? AND row < ? ORDER BY row LIMIT {PAGE}"
        while page := self._query(statement, (first, rows)):
            records = [self._entry(row) for row in page]
            yield [(record, _matches_checksum(record, row)) for record, row in zip(records, page, strict=True)]
            last = self._of_type(page[-1][0], int)
            if not first <= last < rows:
                raise self._damaged("its entries are not in order")
            first = last + 1

    def sorted_ids(self, rows: int) -> Iterator[list[tuple[str, int, bool]]]:
        """Yield every id below row number `rows`, in lists in ascending order, with the first row of its last entry.

        Each with whether the id was given; otherwise it is a hash of the content. Removed documents are included.
        """
        # SQLite takes the columns beside max() from the row that holds the maximum
        statement = (
            "SELECT id, max(row), digest FROM entries WHERE row >= 0 AND row < ? AND id > ? "
            f"GROUP BY id ORDER BY id LIMIT {PAGE}"
        )
        last = ""
        while page := self._query(statement, (rows, last)):
            found = [(self._of_type(id, str), self._of_type(row, int), digest is not None) for id, row, digest in page]
            if not last < found[0][0]:
                raise self._damaged("its ids are not in order")
            yield found
            last = found[-1][0]

    def write(self, entries: Iterable[EntryRecord], blocks: Sequence[BlockRecord]) -> None:
        """Add entries, and add or replace blocks, in the current transaction."""
        rows = ((entry.row, entry.id, entry.digest, entry.checksum(), entry.metadata, entry.text) for entry in entries)
        with self._locked():
            self._connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._put_blocks(blocks)

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Write in one transaction; an exception undoes it."""
        with self._locked():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
                self._commits += 1
            except BaseException:
                # after some errors, such as a full disk, SQLite has rolled back already
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def problems(self) -> list[str]:
        """Return what SQLite's integrity check finds wrong, in the index of ids too."""
        try:
            found = [printable(str(row[0])) for row in self._query("PRAGMA integrity_check")]
        except IndexDamagedError as error:
            return [printable(str(error.__cause__ or error))]
        return [] if found == ["ok"] else found

    def size(self) -> int:
        """Return the bytes of the file."""
        return self._query("PRAGMA page_count")[0][0] * self._query("PRAGMA page_size")[0][0]

    def _put_blocks(self, blocks: Sequence[BlockRecord]) -> None:
        """Add or replace block records in the current transaction, and update the count and XOR of all."""
        if not blocks:
            return
        count, total = self._state(self._connection.execute(_MANIFEST).fetchall())
        for record in blocks:
            before = self._connection.execute("SELECT checksum FROM blocks WHERE block = ?", (record.block,)).fetchall()
            # blocks of format 1 have no checksum yet: NULL counts as 0
            total ^= record.checksum() ^ (self._of_type(before[0][0], int, None) or 0 if before else 0)
        rows = [(*record, record.checksum()) for record in blocks]
        self._connection.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?)", rows)
        state = json.dumps([max(count, blocks[-1].block + 1), total])
        self._connection.execute("UPDATE manifest SET value = ? WHERE name = ?", (state, _STATE))

    def _state(self, manifest: Sequence[tuple]) -> list[int]:
        values = [value for name, value in manifest if name == _STATE]
        try:
            count, total = json.loads(values[0])
            return [self._of_type(count, int), self._of_type(total, int)]
        except (IndexError, RecursionError, TypeError, ValueError) as error:
            raise self._damaged("it does not say how many blocks there are") from error

    def _checked_block(self, record: BlockRecord, number: int) -> BlockRecord:
        fault = record.fault(number)
        if fault is not None:
            raise self._damaged(f"block {number} {fault}")
        return record

    def _entry(self, row: Sequence[Any]) -> EntryRecord:
        """Return an entry; a value of a wrong type becomes empty, so that the checksum differs."""
        record = EntryRecord(*row[:5])
        if record.has_valid_types():
            return record
        values: list[Any] = [
            value if type(value) is kind else None
            for value, kind in zip(row, (int, str, bytes, str, str), strict=False)
        ]
        return EntryRecord(self._of_type(row[0], int), values[1] or "", *values[2:])

    def _require_all(self, found: dict[int, _T], rows: Sequence[int]) -> dict[int, _T]:
        missing = next((row for row in rows if row not in found), None)
        if missing is not None:
            raise self._damaged(f"the entry of row {missing:,} is missing")
        return found

    def _of_type(self, value: Any, *types: type | None) -> Any:
        if (type(value) if value is not None else None) not in types:
            raise self._damaged(f"a value is {printable(repr(value)[:60])} ({type(value).__name__})")
        return value

    def _damaged(self, what: str) -> IndexDamagedError:
        return IndexDamagedError(
            f"{self.name} is damaged: {what}; restore the file from a backup, or build the index again"
        )

    def _query_in_batches(self, columns: str, key: str, values: Sequence[Any], end: str = "") -> list[tuple]:
        found: list[tuple] = []
        join = " " if columns.endswith("AND") else " WHERE "
        for start in range(0, len(values), _MAX_VARIABLES):
            part = list(values[start : start + _MAX_VARIABLES])
            found += self._query(f"{columns}{join}{key} IN ({', '.join('?' * len(part))}) {end}", part)
        return found

    def _query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple]:
        # fetched at once: an open cursor would hold SQLite's lock and keep writers from committing
        return self._read(lambda connection: connection.execute(statement, values).fetchall())

    def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._locked():
            try:
                return work(self._connection)
            except sqlite3.OperationalError as error:
                interrupted = getattr(error, "sqlite_errorcode", None) == _INTERRUPTED_COMMIT
                if self._read_only_path is None or not interrupted:
                    raise
            self._undo_interrupted_commit()
            return work(self._connection)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        check_same_process(self.name, self._process)
        with self._mutex, translate_errors(self.name):
            yield

    def _undo_interrupted_commit(self) -> None:
        """Roll back, through a writing connection, the commit that a killed writer left half-done."""
        assert self._read_only_path is not None, "only for a reading connection"
        try:
            with contextlib.closing(connect(self._read_only_path, "rw")) as connection:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except sqlite3.OperationalError as error:
            raise IndexStorageError(
                f"{self.name}: a writer was killed during a commit, which must be undone before reading, but the "
                f"folder cannot be written ({error}); open the index once with write permission"
            ) from error


def _matches_checksum(record: EntryRecord, row: Sequence[Any]) -> bool:
    """Return whether an entry equals the row of the table that it was read from, and matches its checksum."""
    return record == tuple(row[:5]) and record.checksum() == row[5]


def _xor_of(sums: Sequence[int]) -> int:
    total = 0
    for value in sums:
        total ^= value
    return total
