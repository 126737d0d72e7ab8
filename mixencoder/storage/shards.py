"""The arrays of an index on disk: one file a field and shard, rows of raw little-endian numbers and nothing else.

Files only grow, and only rows that the catalogue committed count. Readers map files and keep their maps when the files
are deleted; nothing here is locked, which is the business of `mixencoder.storage.folder`.
"""

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixencoder.durable import sync_folder
from mixencoder.storage.errors import IndexDamagedError, IndexStorageError
from mixencoder.storage.rows import BLOCK_ROWS
from mixencoder.storage.schema import Field, Schema, raw_bytes

SHARD_BYTES = 256 * 2**20
"""Most bytes of a shard over all its fields, unless a single block of rows needs more."""


class Shard(NamedTuple):
    """Consecutive rows.

    Attributes:
        first: number of the first row.
        fields: name -> (rows, *shape).
    """

    first: int
    fields: dict[str, Tensor]


class Arrays(Protocol):
    """Where rows are kept; `ShardFiles` and `mixencoder.storage.memory.MemoryShards`."""

    shard_rows: int

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows from number first on; rows before it are left alone."""

    def sync(self) -> None:
        """Return once everything appended would survive a power failure."""

    def discard(self, rows: int) -> None:
        """Drop whatever lies beyond this number of rows: what a writer left that did not commit."""

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return this number of rows, in order, without reading them."""

    def size(self) -> int:
        """Return the bytes held."""

    def pad(self, rows: int) -> None:
        """Make room for this number of rows where damage took it away."""

    def file_of(self, row: int, field: Field) -> Path | str:
        """Return where a row is, to be shown."""

    def readable(self, field: Field, first: int, rows: int) -> Tensor | None:
        """Return rows of one field and shard, None if they are not there."""


def rows_per_shard(schema: Schema) -> int:
    """Return the rows of a full shard: whole blocks, at least one, within `SHARD_BYTES`."""
    return max(1, SHARD_BYTES // (schema.row_bytes * BLOCK_ROWS)) * BLOCK_ROWS


def spread(first: int, rows: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows from number first on at multiples of step: (number of the step, offset in it, rows)."""
    stop = first + rows
    while first < stop:
        number, offset = divmod(first, step)
        count = min(step - offset, stop - first)
        yield number, offset, count
        first += count


def checksum(rows: Tensor, value: int = 0) -> int:
    """Return the CRC-32 of the bytes of contiguous rows, going on from the value of the rows before them."""
    return zlib.crc32(raw_bytes(rows), value)


class ShardFiles:
    """Arrays in the files ``shard-<number>.<field>.bin`` of a folder.

    Raises (all methods):
        IndexStorageError: the disk is full or fails; the message names the file.
        IndexDamagedError: a file is missing or shorter than what was committed.
    """

    def __init__(self, folder: Path, schema: Schema, shard_rows: int) -> None:
        self.folder, self.schema, self.shard_rows = folder, schema, shard_rows
        self._maps: dict[int, Shard] = {}
        self._written: dict[Path, int] = {}
        self._created = False

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows from number first on, field by field; `sync` makes them last."""
        rows = len(fields[self.schema.fields[0].name])
        done = 0
        for number, offset, count in spread(first, rows, self.shard_rows):
            for field in self.schema.fields:
                part = raw_bytes(fields[field.name][done : done + count])
                self._write(self._path(number, field), part, offset * field.row_bytes)
            done += count

    def sync(self) -> None:
        """Flush every file written since the last call, and the folder if there are new ones."""
        for path, descriptor in self._written.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise refusal(error, path) from error
        self._close()
        if self._created:
            sync_folder(self.folder)
            self._created = False

    def discard(self, rows: int) -> None:
        """Truncate files to this number of rows and delete shards beyond it."""
        self._close()
        number = max(0, rows - 1) // self.shard_rows
        kept = rows - number * self.shard_rows
        try:
            for field in self.schema.fields:
                path, size = self._path(number, field), kept * field.row_bytes
                found = _size(path)
                if found < size:
                    raise self._too_short(path, found, size)
                if found > size:
                    os.truncate(path, size)
            while True:
                number += 1
                paths = [self._path(number, field) for field in self.schema.fields]
                beyond = [path for path in paths if path.exists()]
                if not beyond:
                    break
                for path in beyond:
                    path.unlink()
        except OSError as error:
            raise refusal(error, self.folder) from error

    def pad(self, rows: int) -> None:
        """Lengthen files that are too short for this number of rows, with zeros: only where damage was noted."""
        for number, _, count in spread(0, rows, self.shard_rows):
            for field in self.schema.fields:
                path = self._path(number, field)
                if _size(path) < count * field.row_bytes:
                    try:
                        path.touch()
                        os.truncate(path, count * field.row_bytes)
                    except OSError as error:
                        raise refusal(error, path) from error

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return this number of rows as private maps of the files: writing to one does not reach the file."""
        shards = []
        for number, _, count in spread(0, rows, self.shard_rows):
            shard = self._maps.get(number)
            if shard is None or len(next(iter(shard.fields.values()))) != count:
                fields = {field.name: self._map(number, field, count) for field in self.schema.fields}
                shard = self._maps[number] = Shard(number * self.shard_rows, fields)
            shards.append(shard)
        return tuple(shards)

    def size(self) -> int:
        """Return the bytes of all array files."""
        return sum(map(_size, self.folder.glob("shard-*.bin")))

    def file_of(self, row: int, field: Field) -> Path:
        """Return the file that holds a row."""
        return self._path(row // self.shard_rows, field)

    def readable(self, field: Field, first: int, rows: int) -> Tensor | None:
        """Return rows within one shard, or None where the file is missing or too short."""
        number, offset = divmod(first, self.shard_rows)
        try:
            return self._map(number, field, offset + rows)[offset:]
        except IndexDamagedError:
            return None

    def _map(self, number: int, field: Field, rows: int) -> Tensor:
        path, size = self._path(number, field), rows * field.row_bytes
        found = _size(path)
        if found < size:
            raise self._too_short(path, found, size)
        # unlike mmap.mmap this keeps no file descriptor, and a private map may be written to without a warning
        try:
            with torch.inference_mode(mode=False):
                flat = torch.from_file(str(path), shared=False, size=rows * field.values, dtype=field.torch_dtype)
        except RuntimeError as error:
            # also if compaction deleted it just now, upon which the caller looks again
            raise IndexDamagedError(f"{path} cannot be mapped: {error}") from error
        return flat.view(rows, *field.shape)

    def _write(self, path: Path, data: memoryview, offset: int) -> None:
        try:
            descriptor = self._written.get(path)
            if descriptor is None:
                self._created |= not path.exists()
                descriptor = self._written[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise refusal(error, path) from error

    def _close(self) -> None:
        while self._written:
            os.close(self._written.popitem()[1])

    def _path(self, number: int, field: Field) -> Path:
        return self.folder / f"shard-{number:05d}.{field.name}.bin"

    def _too_short(self, path: Path, found: int, expected: int) -> IndexDamagedError:
        what = f"holds {found:,} bytes" if path.exists() else "is missing"
        return IndexDamagedError(
            f"{path} {what}; {expected:,} bytes were committed. Restore the file, or see what is lost with verify() "
            "and encode it again with repair(), opening with check_sizes=False"
        )


def refusal(error: OSError, path: Path) -> IndexStorageError:
    """Return the error to raise when the system refused to write a file."""
    return IndexStorageError(
        f"{path} cannot be written: {error.strerror or error}; what was committed before is intact. Make room or allow "
        "writing there, then do the same again"
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
