"""An index in memory: the arrays and the store, with the interfaces of `shards` and `folder`."""

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mixencoder.errors import IndexLockedError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.folder import Generation
from mixencoder.index.manifest import Manifest
from mixencoder.index.schema import Field, Schema
from mixencoder.index.shards import Shard, split_at_multiples


class MemoryShards:
    """Arrays in tensors that grow by doubling; rows that were handed out are not written again."""

    def __init__(self, schema: Schema, shard_rows: int) -> None:
        self.schema, self.shard_rows = schema, shard_rows
        self._shards: list[dict[str, Tensor]] = []

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows from number first on."""
        # a tensor made in inference mode could not be written to outside it later
        with torch.inference_mode(mode=False), torch.no_grad():
            self._append(first, fields)

    def sync(self) -> None:
        """Do nothing: nothing outlives the process."""

    def discard(self, rows: int) -> None:
        """Do nothing: the next append overwrites the rows beyond."""

    def pad(self, rows: int) -> None:
        """Do nothing: memory is never too short."""

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return views of this number of rows."""
        return tuple(
            Shard(number * self.shard_rows, {name: array[:count] for name, array in self._shards[number].items()})
            for number, _, count in split_at_multiples(0, rows, self.shard_rows)
        )

    def size(self) -> int:
        """Return the bytes of all tensors, including unused capacity."""
        return sum(array.nbytes for shard in self._shards for array in shard.values())

    def file_of(self, row: int, field: Field) -> str:
        """Return a name for the array that holds a row, for messages."""
        return f"{field.name} in memory"

    def readable(self, field: Field, first: int, rows: int) -> Tensor:
        """Return rows within one shard."""
        number, offset = divmod(first, self.shard_rows)
        return self._shards[number][field.name][offset : offset + rows]

    def _append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        done = 0
        for number, offset, count in split_at_multiples(first, len(next(iter(fields.values()))), self.shard_rows):
            if number == len(self._shards):
                empty = {
                    field.name: torch.empty(0, *field.shape, dtype=field.torch_dtype, device="cpu")
                    for field in self.schema.fields
                }
                self._shards.append(empty)
            shard = self._shards[number]
            for name, rows in fields.items():
                if len(shard[name]) < offset + count:
                    capacity = min(self.shard_rows, max(offset + count, 2 * len(shard[name])))
                    grown = shard[name].new_empty(capacity, *shard[name].shape[1:])
                    grown[:offset] = shard[name][:offset]
                    shard[name] = grown
                shard[name][offset : offset + count] = rows[done : done + count]
            done += count


class MemoryStore:
    """The current generation of an index in memory."""

    name = "the index in memory"

    def __init__(self) -> None:
        self._write_lock = threading.Lock()
        self._generation: Generation | None = None

    def current(self) -> Generation:
        """Return the generation published last."""
        assert self._generation is not None, "an index publishes its first generation when it is made"
        return self._generation

    def prepare(self) -> bool:
        """Return False: there is no index in memory yet."""
        return False

    def new_generation(self, manifest: Manifest) -> Generation:
        """Make an empty generation, for `publish`."""
        catalogue = Catalogue.in_memory()
        catalogue.create(manifest)
        arrays = MemoryShards(manifest.schema, manifest.shard_rows)
        return Generation(0, None, manifest, catalogue, arrays, catalogue)

    def publish(self, generation: Generation) -> None:
        """Make a generation the current one."""
        self._generation = generation

    def delete_leftovers(self) -> None:
        """Do nothing: there is nothing to delete."""

    def upgrade(self, generation: Generation) -> bool:
        """Return False: memory holds no older format."""
        return False

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the write lock.

        Raises:
            IndexLockedError: another thread holds it.
        """
        if not self._write_lock.acquire(blocking=False):
            raise IndexLockedError("another thread is writing to this index; wait until it is done")
        try:
            yield
        finally:
            self._write_lock.release()
