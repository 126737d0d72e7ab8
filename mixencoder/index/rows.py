"""Which rows of the arrays count, and to which document they belong: bit vectors instead of an object a candidate.

Rows are numbered in the order in which they were written and are never reused within a generation. A document owns
one run of rows; the first of them is its head. Removing a document clears the live bits of its rows, so the order of
live rows is the order of insertion. A document's *place* is the number of live heads before its own.
"""

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

BLOCK_ROWS = 1024
"""Rows that share a checksum and a record in the catalogue."""
_BLOCK_BYTES = BLOCK_ROWS // 8
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8).sum(axis=1).astype(np.int64)


class BlockRecord(NamedTuple):
    """A block as the catalogue keeps it.

    Attributes:
        block: its number; its first row is block * `BLOCK_ROWS`.
        rows: committed rows in it.
        checksums: CRC-32 of every field's bytes of these rows, little-endian uint32 in the schema's order.
        starts: packed bits, rows that are the first of a document; None: all.
        live: packed bits, rows that were not removed; None: all.
    """

    block: int
    rows: int
    checksums: bytes
    starts: bytes | None
    live: bytes | None

    def checksum(self) -> int:
        """CRC-32 of all attributes: of what decides which rows count, and of the sums of their bytes."""
        value = zlib.crc32(f"{self.block} {self.rows}".encode())
        for part in (self.checksums, self.starts, self.live):
            value = zlib.crc32(b"-" if part is None else b"+" + part, value)
        return value

    def fault(self, number: int) -> str | None:
        """Return why this cannot be the block of a number, or None; the last block alone may be short."""
        if self.block != number:
            return f"is missing, or not where it should be (found {self.block!r})"
        if type(self.rows) is not int or not 0 < self.rows <= BLOCK_ROWS:
            return f"has {self.rows!r:.40} rows"
        if type(self.checksums) is not bytes or len(self.checksums) % 4:
            return "has no checksums"
        for name, bits in (("starts", self.starts), ("live", self.live)):
            if bits is not None and (type(bits) is not bytes or len(bits) != _BLOCK_BYTES):
                return f"has no {name} bits"
            # numbers of bits beyond the rows would be those of rows to come
            if bits is not None and int.from_bytes(bits, "little") >> self.rows:
                return f"has {name} bits beyond its rows"
        return None


class BitVector:
    """Bits with rank and select: how many are set before a position, and where the n-th set one is.

    Attributes:
        words: the bits, 64 a number.
    """

    def __init__(self, words: np.ndarray) -> None:
        self.words = words
        counts = _ONES[words.view(np.uint8)].reshape(-1, 8).sum(axis=1)
        self._before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    @classmethod
    def from_bytes(cls, packed: bytes) -> "BitVector":
        """Make one from little-endian bits; a clear word is appended, so that the position after the last is valid."""
        return cls(np.frombuffer(packed + bytes(8), dtype="<u8"))

    def __and__(self, other: "BitVector") -> "BitVector":
        return BitVector(self.words & other.words)

    @property
    def count(self) -> int:
        """Set bits."""
        return int(self._before[-1])

    def test(self, positions: np.ndarray) -> np.ndarray:
        """Return which positions are set: bool, of the positions' shape."""
        shift = (positions & 63).astype(np.uint64)
        return (self.words[positions >> 6] >> shift & np.uint64(1)).astype(bool)

    def rank(self, positions: np.ndarray) -> np.ndarray:
        """Return how many bits are set before each position (n,): int64."""
        words = positions >> 6
        below = (np.uint64(1) << (positions & 63).astype(np.uint64)) - np.uint64(1)
        part = np.ascontiguousarray(self.words[words] & below)
        return self._before[words] + _ONES[part.view(np.uint8)].reshape(-1, 8).sum(axis=1)

    def select(self, numbers: np.ndarray) -> np.ndarray:
        """Return the positions of set bits by their number from 0, each below `count`: int64 (n,)."""
        words = np.searchsorted(self._before, numbers, side="right") - 1
        bits = np.unpackbits(self.words[words].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        wanted = (numbers - self._before[words] + 1)[:, None]
        return words * 64 + (np.cumsum(bits, axis=1) == wanted).argmax(axis=1)

    def select_range(self, first: int, last: int) -> np.ndarray:
        """Return the positions of set bits number first to last (exclusive): int64 (last - first,)."""
        start = int(np.searchsorted(self._before, first, side="right")) - 1
        stop = int(np.searchsorted(self._before, last, side="left"))
        bits = np.unpackbits(self.words[start:stop].view(np.uint8), bitorder="little")
        begin = first - int(self._before[start])
        return np.flatnonzero(bits)[begin : begin + last - first] + start * 64


class RowMap:
    """The rows of one committed state; immutable.

    Attributes:
        rows: rows written, removed ones included.
        live_rows, documents: live rows, and the documents that own them.
        one_row_each: whether every document ever written has one row.
    """

    def __init__(self, rows: int, starts: BitVector, live: BitVector) -> None:
        self.rows = rows
        self.one_row_each = starts.count == rows
        self._starts, self._live = starts, live
        self._heads = live if self.one_row_each else starts & live
        self.live_rows, self.documents = live.count, self._heads.count

    @classmethod
    def from_records(cls, records: Iterable[BlockRecord]) -> "RowMap":
        """Make one from all blocks in order, each without a `fault`.

        Raises:
            ValueError: they contradict each other.
        """
        rows, starts, live = 0, bytearray(), bytearray()
        for record in records:
            if rows % BLOCK_ROWS:
                raise ValueError(f"block {record.block} follows one that is not full")
            rows += record.rows
            starts += record.starts or _all_set(record.rows)
            live += record.live or _all_set(record.rows)
        found = cls(rows, BitVector.from_bytes(bytes(starts)), BitVector.from_bytes(bytes(live)))
        if not found._is_whole():
            raise ValueError("which rows begin a document, and which are live, contradict each other")
        return found

    def live_between(self, first: int, last: int) -> np.ndarray:
        """Return live rows number first to last (exclusive) in iteration order: int64."""
        return self._live.select_range(first, last)

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the places of the documents that own these live rows: int64."""
        return self._heads.rank(rows + 1) - 1

    def live_before(self, rows: np.ndarray) -> np.ndarray:
        """Return how many live rows come before each row: its number once removed rows are gone, int64."""
        return self._live.rank(rows)

    def heads_of(self, places: np.ndarray) -> np.ndarray:
        """Return the first rows of documents by place: int64."""
        return self._heads.select(places)

    def counts_of(self, heads: np.ndarray) -> np.ndarray:
        """Return how many rows documents own, by their first rows: int64."""
        if self.one_row_each:
            return np.ones_like(heads)
        following = self._starts.rank(heads) + 1
        last = following == self._starts.count
        ends = self._starts.select(np.where(last, 0, following))
        return np.where(last, self.rows, ends) - heads

    def spans_of(self, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of documents by their first rows, and for each row the number of its document in heads."""
        counts = self.counts_of(heads)
        owner = np.repeat(np.arange(len(heads)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return heads[owner] + within, owner

    def is_head(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows, live or not, begin a document: bool."""
        return self._starts.test(rows)

    def is_live(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows are live: bool."""
        return self._live.test(rows)

    def _is_whole(self) -> bool:
        """Return whether the first row begins a document, and all rows of each are live or none is."""
        if self.one_row_each:
            return True
        words, starts = self._live.words, self._starts.words
        if not int(starts[0]) & 1:
            return False
        # each row's predecessor, over the ends of the words too
        before = (words << np.uint64(1)) | np.concatenate([np.zeros(1, dtype="<u8"), words[:-1] >> np.uint64(63)])
        changes = (words ^ before) & ~starts
        # the row after the last is no row, and not live
        changes[self.rows >> 6] &= ~(np.uint64(1) << np.uint64(self.rows & 63))
        return not changes.any()

    @property
    def written_documents(self) -> int:
        """Documents ever written, removed ones included."""
        return self._starts.count


def pack(bits: np.ndarray, rows: int) -> bytes | None:
    """Pack a block's bits (BLOCK_ROWS,) bool; None if they are set for all its rows."""
    return None if bits[:rows].all() else np.packbits(bits, bitorder="little").tobytes()


def unpack(packed: bytes | None, rows: int) -> np.ndarray:
    """Return a block's bits (BLOCK_ROWS,) bool, writable, clear beyond its rows."""
    return np.unpackbits(np.frombuffer(packed or _all_set(rows), np.uint8), bitorder="little").astype(bool)


def _all_set(rows: int) -> bytes:
    return ((1 << rows) - 1).to_bytes(_BLOCK_BYTES, "little")
