"""The arrays of an index on disk: one file per field and shard, with rows of raw little-endian numbers only.

Files only grow, and only rows that the catalogue has committed count. Readers map files and keep the maps after the
files are deleted. Nothing here locks: `mixencoder.index.folder` does.
"""

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixencoder.errors import IndexDamagedError
from mixencoder.index.files import Folder, status_of, storage_error
from mixencoder.index.rows import BLOCK_ROWS
from mixencoder.index.schema import Field, Schema, raw_bytes

SHARD_BYTES = 256 * 2**20
"""Maximum bytes of a shard over all its fields, unless a single block needs more."""
SHARD_NAME = re.compile(r"shard-\d{5,}\.[a-z][a-z0-9_]*\.bin")


class Shard(NamedTuple):
    """Consecutive rows.

    Attributes:
        first: number of its first row.
        fields: name -> (rows, *shape).
    """

    first: int
    fields: dict[str, Tensor]


class Arrays(Protocol):
    """The arrays of a generation; implemented by `ShardFiles` and `mixencoder.index.memory.MemoryShards`."""

    shard_rows: int

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows, the first at row number `first`; earlier rows stay unchanged."""

    def sync(self) -> None:
        """Flush all appended rows, so that they survive a power failure."""

    def discard(self, rows: int) -> None:
        """Drop what lies beyond this number of rows, which an uncommitted transaction left."""

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return this number of rows, in order, mapped rather than read."""

    def size(self) -> int:
        """Return the bytes held."""

    def pad(self, rows: int) -> None:
        """Lengthen arrays that damage made shorter than this number of rows."""

    def file_of(self, row: int, field: Field) -> Path | str:
        """Return where a row is stored, for messages."""

    def readable(self, field: Field, first: int, rows: int) -> Tensor | None:
        """Return rows of one field within one shard, or None if they cannot be read."""


def rows_per_shard(schema: Schema) -> int:
    """Return the rows of a full shard: as many whole blocks as fit `SHARD_BYTES`, but at least one."""
    return max(1, SHARD_BYTES // (schema.row_bytes * BLOCK_ROWS)) * BLOCK_ROWS


def split_at_multiples(first: int, rows: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Split rows first to first + rows at multiples of step; yield (number of the step, offset in it, rows)."""
    stop = first + rows
    while first < stop:
        number, offset = divmod(first, step)
        count = min(step - offset, stop - first)
        yield number, offset, count
        first += count


def checksum(rows: Tensor, value: int = 0) -> int:
    """Return the CRC-32 of contiguous rows' bytes; value is the CRC-32 of the rows before them."""
    return zlib.crc32(raw_bytes(rows), value)


class ShardFiles:
    """Arrays in the files ``shard-<number>.<field>.bin`` of a folder.

    Raises (all methods):
        IndexStorageError: the disk is full or fails; the message names the file.
        IndexDamagedError: a file is missing, shorter than what was committed, or not a regular file.
    """

    def __init__(self, folder: Folder, schema: Schema, shard_rows: int) -> None:
        self.schema, self.shard_rows = schema, shard_rows
        self._folder = folder
        self._maps: dict[int, Shard] = {}
        self._written: dict[str, int] = {}
        self._created = False

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows, field by field, the first at row number `first`; only `sync` makes them durable."""
        rows = len(fields[self.schema.fields[0].name])
        done = 0
        for number, offset, count in split_at_multiples(first, rows, self.shard_rows):
            for field in self.schema.fields:
                part = raw_bytes(fields[field.name][done : done + count])
                self._write(_name(number, field), part, offset * field.row_bytes)
            done += count

    def sync(self) -> None:
        """Flush every file written since the last call, and the folder if files are new."""
        for name, descriptor in self._written.items():
            self._flush(descriptor, self._folder.path / name)
        self._close()
        if self._created:
            self._flush(self._folder.descriptor, self._folder.path)
            self._created = False

    def discard(self, rows: int) -> None:
        """Truncate files to this number of rows and delete shards beyond it."""
        self._close()
        number = max(0, rows - 1) // self.shard_rows
        kept = rows - number * self.shard_rows
        try:
            for field in self.schema.fields:
                name, size = _name(number, field), kept * field.row_bytes
                found = self._folder.status(name)
                if (found.st_size if found else 0) < size:
                    raise self._too_short(name, found, size)
                if found and found.st_size > size:
                    self._resize(name, size)
            while True:
                number += 1
                names = [_name(number, field) for field in self.schema.fields]
                beyond = [name for name in names if self._folder.status(name) is not None]
                if not beyond:
                    break
                for name in beyond:
                    os.unlink(name, dir_fd=self._folder.descriptor)
        except OSError as error:
            raise storage_error(error, self._folder.path) from error

    def pad(self, rows: int) -> None:
        """Lengthen files that are too short for this number of rows with zeros; only after damage was found."""
        for number, _, count in split_at_multiples(0, rows, self.shard_rows):
            for field in self.schema.fields:
                name, size = _name(number, field), count * field.row_bytes
                found = self._folder.status(name)
                if found is None or found.st_size < size:
                    try:
                        self._resize(name, size)
                    except OSError as error:
                        raise storage_error(error, self._folder.path / name) from error

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return this number of rows as private maps of the files; writing to a map does not change the file."""
        shards = []
        for number, _, count in split_at_multiples(0, rows, self.shard_rows):
            shard = self._maps.get(number)
            if shard is None or len(next(iter(shard.fields.values()))) != count:
                fields = {field.name: self._map(number, field, count) for field in self.schema.fields}
                shard = self._maps[number] = Shard(number * self.shard_rows, fields)
            shards.append(shard)
        return tuple(shards)

    def size(self) -> int:
        """Return the bytes of all array files."""
        found = [self._folder.status(name) for name in self._folder.names(SHARD_NAME)]
        return sum(status.st_size for status in found if status)

    def file_of(self, row: int, field: Field) -> Path:
        """Return the file that holds a row."""
        return self._folder.path / _name(row // self.shard_rows, field)

    def readable(self, field: Field, first: int, rows: int) -> Tensor | None:
        """Return rows within one shard, or None if the file is missing or too short."""
        number, offset = divmod(first, self.shard_rows)
        try:
            return self._map(number, field, offset + rows)[offset:]
        except IndexDamagedError:
            return None

    def _map(self, number: int, field: Field, rows: int) -> Tensor:
        name, size = _name(number, field), rows * field.row_bytes
        path, found = self._folder.path / name, self._folder.status(name)
        if found is None or found.st_size < size:
            raise self._too_short(name, found, size)
        # torch maps by path, which may now lead to another file
        if (here := status_of(path)) is None or not os.path.samestat(found, here):
            raise IndexDamagedError(f"{path} was moved away or replaced; open the index again")
        # unlike mmap.mmap this keeps no file descriptor, and a private map may be written to without a warning
        try:
            with torch.inference_mode(mode=False):
                flat = torch.from_file(str(path), shared=False, size=rows * field.values, dtype=field.torch_dtype)
        except RuntimeError as error:
            # also if a compaction has just deleted the file; the caller then looks up the generation again
            raise IndexDamagedError(f"{path} cannot be mapped: {error}") from error
        return flat.view(rows, *field.shape)

    def _write(self, name: str, data: memoryview, offset: int) -> None:
        try:
            descriptor = self._written.get(name)
            if descriptor is None:
                self._created |= self._folder.status(name) is None
                descriptor = self._written[name] = self._folder.open(name, os.O_WRONLY | os.O_CREAT)
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise storage_error(error, self._folder.path / name) from error

    def _resize(self, name: str, size: int) -> None:
        descriptor = self._folder.open(name, os.O_WRONLY | os.O_CREAT)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)

    def _flush(self, descriptor: int, path: Path) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise storage_error(error, path) from error

    def _close(self) -> None:
        while self._written:
            os.close(self._written.popitem()[1])

    def _too_short(self, name: str, found: os.stat_result | None, expected: int) -> IndexDamagedError:
        what = f"holds {found.st_size:,} bytes" if found else "is missing"
        return IndexDamagedError(
            f"{self._folder.path / name} {what}; {expected:,} bytes were committed. Restore the file, or open the "
            "index with check_sizes=False, see what is lost with verify() and encode it again with repair()"
        )


def _name(number: int, field: Field) -> str:
    return f"shard-{number:05d}.{field.name}.bin"
