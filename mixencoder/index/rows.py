"""Which rows of the arrays are live, and which document each belongs to: two bits per row, no object per document.

Rows are numbered in the order in which they were written and are never reused within a generation. A document owns
one or more consecutive rows. Removing a document clears the live bits of its rows, so the order of live rows is the
order of insertion. A document's position is the number of live documents before it.
"""

import hashlib
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

BLOCK_ROWS = 1024
"""Rows of a block, which has one record and one checksum per field in the catalogue."""
_BLOCK_BYTES = BLOCK_ROWS // 8
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8).sum(axis=1).astype(np.int64)


class BlockRecord(NamedTuple):
    """A block as the catalogue keeps it.

    Attributes:
        block: its number; its first row is block * `BLOCK_ROWS`.
        rows: committed rows in it.
        checksums: CRC-32 of these rows' bytes in every field, little-endian uint32 in the schema's order.
        starts: packed bits of the rows that are a document's first row; None: all.
        live: packed bits of the rows that were not removed; None: all.
    """

    block: int
    rows: int
    checksums: bytes
    starts: bytes | None
    live: bytes | None

    def checksum(self) -> int:
        """CRC-32 of all attributes."""
        value = zlib.crc32(f"{self.block} {self.rows}".encode())
        for part in (self.checksums, self.starts, self.live):
            value = zlib.crc32(b"-" if part is None else b"+" + part, value)
        return value

    def fault(self, number: int) -> str | None:
        """Return why this cannot be the block of this number, or None; only the last block may have fewer rows."""
        if self.block != number:
            return f"is missing, or not where it should be (found {self.block!r})"
        if type(self.rows) is not int or not 0 < self.rows <= BLOCK_ROWS:
            return f"has {self.rows!r:.40} rows"
        if type(self.checksums) is not bytes or len(self.checksums) % 4:
            return "has no checksums"
        for name, bits in (("starts", self.starts), ("live", self.live)):
            if bits is not None and (type(bits) is not bytes or len(bits) != _BLOCK_BYTES):
                return f"has no {name} bits"
            # bits beyond the rows would describe rows that are not written yet
            if bits is not None and int.from_bytes(bits, "little") >> self.rows:
                return f"has {name} bits beyond its rows"
        return None


class BitVector:
    """Bits with rank (how many are set before a position) and select (the position of the n-th set bit).

    Attributes:
        words: the bits, 64 per number.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.words = words
        counts = _BITS_SET[words.view(np.uint8)].reshape(-1, 8).sum(axis=1)
        self._before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    @classmethod
    def from_bytes(cls, packed: bytes) -> "BitVector":
        """Make one from little-endian bits; a zero word is appended, so that the position after the last is valid."""
        return cls(np.frombuffer(packed + bytes(8), dtype="<u8"))

    def __and__(self, other: "BitVector") -> "BitVector":
        return BitVector(self.words & other.words)

    @property
    def count(self) -> int:
        """Number of set bits."""
        return int(self._before[-1])

    def test(self, positions: np.ndarray) -> np.ndarray:
        """Return whether the bit at each position is set: bool, of the positions' shape."""
        shift = (positions & 63).astype(np.uint64)
        return (self.words[positions >> 6] >> shift & np.uint64(1)).astype(bool)

    def rank(self, positions: np.ndarray) -> np.ndarray:
        """Return how many bits are set before each position (n,): int64."""
        words = positions >> 6
        below = (np.uint64(1) << (positions & 63).astype(np.uint64)) - np.uint64(1)
        part = np.ascontiguousarray(self.words[words] & below)
        return self._before[words] + _BITS_SET[part.view(np.uint8)].reshape(-1, 8).sum(axis=1)

    def select(self, numbers: np.ndarray) -> np.ndarray:
        """Return the positions of set bits, given their numbers from 0 to `count` - 1: int64 (n,)."""
        words = np.searchsorted(self._before, numbers, side="right") - 1
        bits = np.unpackbits(self.words[words].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        wanted = (numbers - self._before[words] + 1)[:, None]
        return words * 64 + (np.cumsum(bits, axis=1) == wanted).argmax(axis=1)

    def select_range(self, first: int, last: int) -> np.ndarray:
        """Return the positions of the set bits with numbers first to last (exclusive): int64 (last - first,)."""
        start = int(np.searchsorted(self._before, first, side="right")) - 1
        stop = int(np.searchsorted(self._before, last, side="left"))
        bits = np.unpackbits(self.words[start:stop].view(np.uint8), bitorder="little")
        begin = first - int(self._before[start])
        return np.flatnonzero(bits)[begin : begin + last - first] + start * 64


class RowMap:
    """The rows of one committed state; immutable.

    Attributes:
        rows: number of rows written, including removed ones.
        live_rows: number of live rows.
        documents: number of live documents.
        one_row_each: whether every document ever written has one row.
        digest: hash of the records, thus of what all rows hold and of which are live; empty if made without records.
    """

    def __init__(self, rows: int, starts: BitVector, live: BitVector, digest: str = "") -> None:
        self.rows, self.digest = rows, digest
        self.one_row_each = starts.count == rows
        self._starts, self._live = starts, live
        self._live_starts = live if self.one_row_each else starts & live
        self.live_rows, self.documents = live.count, self._live_starts.count

    @classmethod
    def from_records(cls, records: Iterable[BlockRecord]) -> "RowMap":
        """Make one from the records of all blocks in order, each without a `fault`.

        Raises:
            ValueError: the records contradict each other.
        """
        rows, starts, live, hashed = 0, bytearray(), bytearray(), hashlib.blake2b(digest_size=16)
        for record in records:
            if rows % BLOCK_ROWS:
                raise ValueError(f"block {record.block} follows one that is not full")
            rows += record.rows
            starts += record.starts or _all_set(record.rows)
            live += record.live or _all_set(record.rows)
            hashed.update(repr(tuple(record)).encode())
        found = cls(rows, BitVector.from_bytes(bytes(starts)), BitVector.from_bytes(bytes(live)), hashed.hexdigest())
        if not found._is_consistent():
            raise ValueError("the bits of first rows and of live rows contradict each other")
        return found

    def live_between(self, first: int, last: int) -> np.ndarray:
        """Return the live rows first to last (exclusive), counted among live rows only: int64."""
        if self.live_rows == self.rows:
            return np.arange(first, last)
        return self._live.select_range(first, last)

    def positions_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of the documents that own these live rows: int64."""
        return self._live_starts.rank(rows + 1) - 1

    def positions_between(self, first: int, rows: np.ndarray) -> np.ndarray:
        """`positions_of` for rows from `live_between`, of which the first has the number `first` among live rows."""
        return np.arange(first, first + len(rows)) if self.one_row_each else self.positions_of(rows)

    def live_before(self, rows: np.ndarray) -> np.ndarray:
        """Return how many live rows come before each row, which is its row number after compaction: int64."""
        return self._live.rank(rows)

    def first_rows_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the first rows of the documents at these positions: int64."""
        return self._live_starts.select(positions)

    def row_counts_of(self, first_rows: np.ndarray) -> np.ndarray:
        """Return the number of rows of each document, given its first row: int64."""
        if self.one_row_each:
            return np.ones_like(first_rows)
        following = self._starts.rank(first_rows) + 1
        last = following == self._starts.count
        ends = self._starts.select(np.where(last, 0, following))
        return np.where(last, self.rows, ends) - first_rows

    def all_rows_of(self, first_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of documents, given their first rows, and for each row the index of its document in these."""
        counts = self.row_counts_of(first_rows)
        owner = np.repeat(np.arange(len(first_rows)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return first_rows[owner] + within, owner

    def is_first_row(self, rows: np.ndarray) -> np.ndarray:
        """Return which of these rows, live or not, are a document's first row: bool."""
        return self._starts.test(rows)

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Return which of these rows are live: bool."""
        return self._live.test(rows)

    def _is_consistent(self) -> bool:
        """Return whether row 0 is a document's first row, and each document's rows are all live or all removed."""
        if self.one_row_each:
            return True
        words, starts = self._live.words, self._starts.words
        if not int(starts[0]) & 1:
            return False
        # the bit of the row before each row, across the ends of words too
        before = (words << np.uint64(1)) | np.concatenate([np.zeros(1, dtype="<u8"), words[:-1] >> np.uint64(63)])
        changes = (words ^ before) & ~starts
        # the bit after the last row belongs to no row
        changes[self.rows >> 6] &= ~(np.uint64(1) << np.uint64(self.rows & 63))
        return not changes.any()

    @property
    def written_documents(self) -> int:
        """Number of documents ever written, including removed ones."""
        return self._starts.count


def pack(bits: np.ndarray, rows: int) -> bytes | None:
    """Pack a block's bits, (BLOCK_ROWS,) bool; None if all its rows' bits are set."""
    return None if bits[:rows].all() else np.packbits(bits, bitorder="little").tobytes()


def unpack(packed: bytes | None, rows: int) -> np.ndarray:
    """Return a block's bits, (BLOCK_ROWS,) bool, writable; False beyond its rows."""
    return np.unpackbits(np.frombuffer(packed or _all_set(rows), np.uint8), bitorder="little").astype(bool)


def _all_set(rows: int) -> bytes:
    return ((1 << rows) - 1).to_bytes(_BLOCK_BYTES, "little")
