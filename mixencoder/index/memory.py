"""An index that is not kept: the arrays and the store behind the interface of `shards` and `folder`, in memory."""

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
from mixencoder.index.shards import Shard, spread


class MemoryShards:
    """Arrays in tensors that double as they fill; rows handed out are never written again."""

    def __init__(self, schema: Schema, shard_rows: int) -> None:
        self.schema, self.shard_rows = schema, shard_rows
        self._shards: list[dict[str, Tensor]] = []

    def append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        """Write rows from number first on."""
        # a tensor made in inference mode could not be written to outside of it later
        with torch.inference_mode(mode=False), torch.no_grad():
            self._append(first, fields)

    def sync(self) -> None:
        """Nothing outlives the process, so there is nothing to flush."""

    def discard(self, rows: int) -> None:
        """Rows beyond are written over by the next append."""

    def pad(self, rows: int) -> None:
        """Memory is never too short."""

    def map(self, rows: int) -> tuple[Shard, ...]:
        """Return views of this number of rows."""
        return tuple(
            Shard(number * self.shard_rows, {name: array[:count] for name, array in self._shards[number].items()})
            for number, _, count in spread(0, rows, self.shard_rows)
        )

    def size(self) -> int:
        """Return the bytes of all tensors, room to grow included."""
        return sum(array.nbytes for shard in self._shards for array in shard.values())

    def file_of(self, row: int, field: Field) -> str:
        """Return a name for where a row is."""
        return f"{field.name} in memory"

    def readable(self, field: Field, first: int, rows: int) -> Tensor:
        """Return rows within one shard."""
        number, offset = divmod(first, self.shard_rows)
        return self._shards[number][field.name][offset : offset + rows]

    def _append(self, first: int, fields: Mapping[str, Tensor]) -> None:
        done = 0
        for number, offset, count in spread(first, len(next(iter(fields.values()))), self.shard_rows):
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
    """The one generation of an index in memory."""

    name = "the index in memory"

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._generation: Generation | None = None

    def current(self) -> Generation:
        """Return the generation published last."""
        assert self._generation is not None, "an index publishes its first generation when it is made"
        return self._generation

    def prepare(self) -> bool:
        """Return whether there is an index already: never, at first."""
        return False

    def new_generation(self, manifest: Manifest) -> Generation:
        """Return an empty generation, to be published."""
        catalogue = Catalogue.in_memory()
        catalogue.create(manifest)
        arrays = MemoryShards(manifest.schema, manifest.shard_rows)
        return Generation(0, None, manifest, catalogue, arrays, catalogue)

    def publish(self, generation: Generation) -> None:
        """Make a generation the current one."""
        self._generation = generation

    def tidy(self) -> None:
        """There is nothing to delete."""

    def upgrade(self, generation: Generation) -> bool:
        """There is no older format in memory."""
        return False

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the right to write.

        Raises:
            IndexLockedError: another thread holds it.
        """
        if not self._busy.acquire(blocking=False):
            raise IndexLockedError("another thread is writing to this index; wait until it is done")
        try:
            yield
        finally:
            self._busy.release()
