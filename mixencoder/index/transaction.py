"""Transactions: rows are written to the arrays at once, but count only when the catalogue commits.

The order makes a crash harmless: rows are written, then flushed, then the catalogue commits entries and blocks in one
SQLite transaction. The next writer drops rows beyond the committed ones.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from mixencoder.errors import IndexDamagedError, MixEncoderError
from mixencoder.index.catalogue import Catalogue, EntryRecord
from mixencoder.index.rows import BLOCK_ROWS, BlockRecord, pack, unpack
from mixencoder.index.schema import Schema
from mixencoder.index.shards import Arrays, checksum, split_at_multiples


@dataclass
class _Block:
    """A block that the transaction changes."""

    rows: int
    checksums: list[int]
    starts: np.ndarray = field(default_factory=lambda: np.zeros(BLOCK_ROWS, dtype=bool))
    live: np.ndarray = field(default_factory=lambda: np.zeros(BLOCK_ROWS, dtype=bool))


class Transaction:
    """Changes that become visible together or not at all; made by `transaction`.

    Attributes:
        rows: number of rows written so far, committed ones and this transaction's.
    """

    def __init__(self, catalogue: Catalogue, arrays: Arrays, schema: Schema, rows: int) -> None:
        self.rows = rows
        self._catalogue, self._arrays, self._schema = catalogue, arrays, schema
        self._appended = False
        self._entries: list[EntryRecord] = []
        self._blocks: dict[int, _Block] = {}

    def append(self, fields: Mapping[str, Tensor], row_counts: Sequence[int]) -> list[int]:
        """Write the rows of documents and return the first row of each.

        Args:
            fields: name -> (R, *shape), as the schema's check returns them.
            row_counts: rows of each document, adding up to R.
        """
        counts = np.asarray(row_counts, dtype=np.int64)
        first_rows = np.cumsum(counts) - counts
        starts = np.zeros(int(counts.sum()), dtype=bool)
        starts[first_rows] = True
        before = self.rows
        self.append_rows(fields, starts)
        return (first_rows + before).tolist()

    def append_rows(self, fields: Mapping[str, Tensor], starts: np.ndarray) -> None:
        """Write rows; starts (R,) bool marks the rows that begin a document, the others continue the one before."""
        if not self._appended:
            self._arrays.discard(self.rows)
            self._appended = True
        self._arrays.append(self.rows, fields)
        done = 0
        for number, offset, count in split_at_multiples(self.rows, len(starts), BLOCK_ROWS):
            block = self._block(number)
            for i, array in enumerate(self._schema.fields):
                block.checksums[i] = checksum(fields[array.name][done : done + count], block.checksums[i])
            block.starts[offset : offset + count] = starts[done : done + count]
            block.live[offset : offset + count] = True
            block.rows = offset + count
            done += count
        self.rows += len(starts)

    def add_entries(self, entries: Sequence[EntryRecord]) -> None:
        """Add the entries of documents whose rows were appended."""
        self._entries += entries

    def remove(self, rows: np.ndarray) -> None:
        """Remove documents, given all their rows, (R,) int64."""
        for number in np.unique(rows // BLOCK_ROWS).tolist():
            self._block(number).live[rows[rows // BLOCK_ROWS == number] % BLOCK_ROWS] = False

    def recompute_last_checksums(self) -> None:
        """Compute the last block's checksums from its rows as they are now; only if no row of it stays live.

        The next rows appended continue these checksums, so damage in the block would make those rows look damaged too.
        """
        number = max(0, self.rows - 1) // BLOCK_ROWS
        block = self._block(number)
        for i, array in enumerate(self._schema.fields):
            rows = self._arrays.readable(array, number * BLOCK_ROWS, block.rows)
            assert rows is not None, "files that were too short have been padded"
            block.checksums[i] = checksum(rows)

    def commit(self) -> None:
        """Flush the rows and commit all changes."""
        self._arrays.sync()
        records = [
            BlockRecord(
                number,
                block.rows,
                np.array(block.checksums, dtype="<u4").tobytes(),
                pack(block.starts, block.rows),
                pack(block.live, block.rows),
            )
            for number, block in sorted(self._blocks.items())
        ]
        with self._catalogue.transaction():
            self._catalogue.write(self._entries, records)

    def _block(self, number: int) -> _Block:
        if number not in self._blocks:
            record = self._catalogue.block(number)
            if record is not None:
                if len(record.checksums) != 4 * len(self._schema.fields):
                    raise IndexDamagedError(f"{self._catalogue.name} is damaged: block {number} has no checksums")
                checksums = np.frombuffer(record.checksums, dtype="<u4").tolist()
                bits = unpack(record.starts, record.rows), unpack(record.live, record.rows)
                self._blocks[number] = _Block(record.rows, checksums, *bits)
            else:
                self._blocks[number] = _Block(0, [0] * len(self._schema.fields))
        return self._blocks[number]


@contextmanager
def transaction(catalogue: Catalogue, arrays: Arrays, schema: Schema) -> Generator[Transaction]:
    """Commit the changes of the with block; an exception undoes them all.

    Args:
        catalogue: a connection that may write, under the lock.
        arrays: where rows go.
        schema: the fields of a row.
    """
    rows = catalogue.committed_rows()
    try:
        current = Transaction(catalogue, arrays, schema, rows)
        yield current
        current.commit()
    except BaseException:
        # read again, as an interrupt may arrive just after the commit succeeded
        with suppress(MixEncoderError):
            arrays.discard(catalogue.committed_rows())
        raise
