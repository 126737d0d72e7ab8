"""An immutable view of an index at one commit: what ranking reads."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import positive_integer
from mixencoder.errors import IndexDamagedError, IndexStateError, InputError, UnknownIdError
from mixencoder.index.catalogue import PAGE, Catalogue, EntryRecord
from mixencoder.index.manifest import Manifest
from mixencoder.index.naming import naming
from mixencoder.index.rows import RowMap
from mixencoder.index.shards import Shard, spread


class Chunk(NamedTuple):
    """Some live rows.

    Attributes:
        positions: (R,) int64 numpy; for every row the place of the document that it belongs to.
        fields: name -> ``(R, *shape)``.
    """

    positions: np.ndarray
    fields: dict[str, Tensor]


class Entry(NamedTuple):
    """A document of an index.

    Attributes:
        id: its name.
        text: None where none is kept.
        metadata: the object given with it, or None.
        fields: name -> ``(rows of the document, *shape)``, where asked for.
    """

    id: str
    text: str | None
    metadata: dict[str, Any] | None
    fields: dict[str, Tensor] | None = None


class Listing:
    """The documents of an index as one commit left them, without their arrays.

    A document's position is its place in iteration order, from 0. Holds two bits a row, no object a document. Safe to
    use from several threads. Iterating gives ids.

    Attributes:
        rows: live rows; more than documents where documents have several.
        removed_rows: rows that `compact` would drop.
    """

    def __init__(self, catalogue: Catalogue, row_map: RowMap) -> None:
        self.rows = row_map.live_rows
        self.removed_rows = row_map.rows - row_map.live_rows
        self._catalogue, self._map = catalogue, row_map

    def __len__(self) -> int:
        return self._map.documents

    def __iter__(self) -> Iterator[str]:
        for places in self._pages():
            yield from self.ids(places)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(find_heads(self._catalogue, self._map, [id]))

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Return the places of documents by id: (n,) int64.

        Raises:
            UnknownIdError: there is no such document; the message names all that are unknown.
        """
        heads = known_heads(self._catalogue, self._map, ids)
        return self._map.places_of(np.array([heads[id] for id in ids], dtype=np.int64))

    def ids(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """Return the ids of documents by place.

        Raises:
            InputError: there is no such place.
        """
        heads = self._heads(positions)
        found = self._catalogue.ids(sorted(set(heads)))
        return [found[head] for head in heads]

    def texts(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str | None]:
        """Return the texts of documents by place; None where none is kept.

        Raises:
            InputError: there is no such place.
        """
        heads = self._heads(positions)
        found = self._catalogue.texts(sorted(set(heads)))
        return [found[head] for head in heads]

    def get(self, id: str) -> Entry:
        """Return a document by id, without its rows.

        Raises:
            UnknownIdError: there is no such document.
        """
        return self._entries(list(known_heads(self._catalogue, self._map, [id]).values()))[0]

    def entries(self) -> Iterator[Entry]:
        """Yield all documents in order, without their rows."""
        for places in self._pages():
            yield from self._entries(self._heads(places))

    def with_arrays(self, manifest: Manifest, map_rows: Callable[[int], tuple[Shard, ...]]) -> "Snapshot":
        """Return the same documents with their arrays."""
        return Snapshot(self._catalogue, self._map, manifest, map_rows(self._map.rows))

    def _entries(self, heads: list[int]) -> list[Entry]:
        found = self._catalogue.entries(heads)
        return [
            Entry(record.id, record.text, None if record.metadata is None else self._metadata(record))
            for record in (found[head] for head in heads)
        ]

    def _metadata(self, record: EntryRecord) -> dict[str, Any]:
        try:
            found = json.loads(record.metadata or "")
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except (RecursionError, ValueError) as error:
            raise IndexDamagedError(
                f"{self._catalogue.name} is damaged: the metadata of {record.id!r} are no JSON object ({error}); "
                "remove() the document and add it again"
            ) from error
        return found

    def __reduce__(self) -> NoReturn:
        raise IndexStateError(
            f"a view of {self._catalogue.name} cannot be copied or pickled; open the index again by its path"
        )

    def _pages(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self), PAGE):
            yield np.arange(first, min(first + PAGE, len(self)))

    def _heads(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[int]:
        return self._map.heads_of(self._checked(positions)).tolist()

    def _checked(self, positions: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        places = np.asarray(positions).reshape(-1)
        if places.size == 0:
            return np.empty(0, dtype=np.int64)
        if places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= len(self):
            raise InputError(
                f"positions reach from {places.min()} to {places.max()}; expected integers from 0 to {len(self) - 1}"
            )
        return places.astype(np.int64)


class Snapshot(Listing):
    """A `Listing` with its arrays: what ranking reads, whatever is added, removed or compacted meanwhile.

    Tensors may share memory with the index and are not to be written to.

    Attributes:
        rows: live rows; more than documents where documents have several.
        manifest: what the index is.
    """

    def __init__(self, catalogue: Catalogue, row_map: RowMap, manifest: Manifest, shards: tuple[Shard, ...]) -> None:
        super().__init__(catalogue, row_map)
        self.manifest = manifest
        self._shards, self._shard_rows = shards, manifest.shard_rows

    def to(self, device: str | torch.device) -> "Snapshot":
        """Return the same view with all its arrays in the memory of a device.

        A GPU then ranks them without reading them again. Takes the bytes of all rows, removed ones included; what the
        index becomes later is not seen.
        """
        shards = tuple(
            Shard(shard.first, {name: array.to(device) for name, array in shard.fields.items()})
            for shard in self._shards
        )
        return Snapshot(self._catalogue, self._map, self.manifest, shards)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all live rows in iteration order, size at a time, fewer in the last chunk.

        Rows are handed out straight from the map where they lie side by side in one shard, and copied together
        otherwise. The rows of a document follow each other but may be split between chunks.

        Args:
            size: rows of a chunk, at least 1.
        """
        size = positive_integer(size, "size")
        for first in range(0, self.rows, size):
            rows = self._map.live_between(first, min(first + size, self.rows))
            yield Chunk(self._map.places_of(rows), self._take(rows))

    def gather(self, positions: Sequence[int] | np.ndarray | Tensor) -> Chunk:
        """Return all rows of some documents, in the order given; repeats are allowed.

        Args:
            positions: (n,) integers, places of documents.

        Raises:
            InputError: there is no such place.
        """
        places = self._checked(positions)
        rows, owner = self._map.spans_of(self._map.heads_of(places))
        return Chunk(places[owner], self._take(rows))

    def _take(self, rows: np.ndarray) -> dict[str, Tensor]:
        first, count = int(rows[0]) if len(rows) else 0, len(rows)
        if count and int(rows[-1]) - first == count - 1 and (count < 3 or bool((np.diff(rows) == 1).all())):
            parts = [
                {name: array[offset : offset + part] for name, array in self._shards[number].fields.items()}
                for number, offset, part in spread(first, count, self._shard_rows)
            ]
            if len(parts) == 1:
                return parts[0]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        numbers = rows // self._shard_rows
        device = next(iter(self._shards[0].fields.values())).device if self._shards else None
        out = {
            field.name: torch.empty(count, *field.shape, dtype=field.torch_dtype, device=device)
            for field in self.manifest.schema.fields
        }
        for number in np.unique(numbers).tolist():
            shard = self._shards[number]
            places = np.flatnonzero(numbers == number)
            within = torch.from_numpy(rows[places] - shard.first).to(device)
            places = torch.from_numpy(places).to(device)
            for name, array in shard.fields.items():
                out[name].index_copy_(0, places, array.index_select(0, within))
        return out


def find_heads(catalogue: Catalogue, row_map: RowMap, ids: Sequence[str]) -> dict[str, int]:
    """Return the first rows of the live documents among ids.

    Raises:
        InputError: an id is not a string.
    """
    if isinstance(ids, str):
        raise InputError(f"ids is the string {ids!r:.60}; expected a list of strings")
    other = next(((place, id) for place, id in enumerate(ids) if not isinstance(id, str)), None)
    if other is not None:
        raise InputError(f"id {other[0]} is {other[1]!r:.60} ({type(other[1]).__name__}); expected a string")
    found = catalogue.find(list(dict.fromkeys(map(str.__str__, ids))), row_map.rows)
    rows = np.array([row for row, _ in found.values()], dtype=np.int64)
    live = row_map.is_live(rows).tolist()
    if not row_map.is_head(rows).all():
        raise IndexDamagedError(f"{catalogue.name} is damaged: entries are not where documents begin; see verify()")
    return {id: row for (id, (row, _)), alive in zip(found.items(), live, strict=True) if alive}


def known_heads(catalogue: Catalogue, row_map: RowMap, ids: Sequence[str]) -> dict[str, int]:
    """Return the first rows of documents by id.

    Raises:
        UnknownIdError: there is no such document; the message names all that are unknown.
    """
    heads = find_heads(catalogue, row_map, ids)
    missing = [id for id in ids if id not in heads]
    if missing:
        raise UnknownIdError(f"no document has the id {naming(missing)}; expected ids that the index holds")
    return heads
