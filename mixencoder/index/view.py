"""Immutable views of an index at one commit: `Listing` without arrays, and `Snapshot`, which ranking reads."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import positive_integer
from mixencoder.errors import IndexDamagedError, IndexStateError, InputError, UnknownIdError
from mixencoder.index.catalogue import PAGE, Catalogue, EntryRecord
from mixencoder.index.manifest import Manifest
from mixencoder.index.messages import quoted_ids
from mixencoder.index.rows import RowMap
from mixencoder.index.shards import Shard, split_at_multiples


class Chunk(NamedTuple):
    """Some live rows.

    Attributes:
        positions: (R,) int64 numpy; for every row the position of the document that it belongs to.
        fields: name -> ``(R, *shape)``.
    """

    positions: np.ndarray
    fields: dict[str, Tensor]


class Entry(NamedTuple):
    """A document of an index.

    Attributes:
        id: its id.
        text: None if the index does not keep it.
        metadata: the object given with it, or None.
        fields: name -> ``(rows of the document, *shape)``; None unless requested.
    """

    id: str
    text: str | None
    metadata: dict[str, Any] | None
    fields: dict[str, Tensor] | None = None


class Listing:
    """The documents of an index at one commit, without their arrays.

    A document's position counts from 0 in iteration order. Takes two bits per row, no object per document. Safe to use
    from several threads. Iterating gives ids.

    Attributes:
        rows: number of live rows; a document may have several.
        removed_rows: number of rows that `compact` would drop.
    """

    def __init__(self, catalogue: Catalogue, row_map: RowMap) -> None:
        self.rows = row_map.live_rows
        self.removed_rows = row_map.rows - row_map.live_rows
        self._catalogue, self._map = catalogue, row_map

    def __len__(self) -> int:
        return self._map.documents

    def __iter__(self) -> Iterator[str]:
        for positions in self._pages():
            yield from self.ids(positions)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(self.find([id]))

    def digest(self) -> str:
        """Return a hash of the committed state: of the checksums of all rows, and of which rows are live."""
        return self._map.digest

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the positions of those of the ids that are held, by id.

        Raises:
            InputError: ids is one string, or an id is not a string.
        """
        first_rows = find_first_rows(self._catalogue, self._map, ids)
        positions = self._map.positions_of(np.array(list(first_rows.values()), dtype=np.int64))
        return dict(zip(first_rows, positions.tolist(), strict=True))

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Return the positions of documents by id: (n,) int64.

        Raises:
            UnknownIdError: there is no such document; the message names the unknown ids.
        """
        found = self.find(ids)
        _check_known(ids, found)
        return np.array([found[id] for id in ids], dtype=np.int64)

    def ids(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """Return the ids of documents by position.

        Raises:
            InputError: there is no such position.
        """
        first_rows = self._first_rows(positions)
        found = self._catalogue.ids(sorted(set(first_rows)))
        return [found[row] for row in first_rows]

    def texts(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str | None]:
        """Return the texts of documents by position; None where the index keeps no text.

        Raises:
            InputError: there is no such position.
        """
        first_rows = self._first_rows(positions)
        found = self._catalogue.texts(sorted(set(first_rows)))
        return [found[row] for row in first_rows]

    def records(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[EntryRecord]:
        """Return documents by position as the catalogue keeps them.

        Raises:
            InputError: there is no such position.
        """
        first_rows = self._first_rows(positions)
        found = self._catalogue.entries(first_rows)
        return [found[row] for row in first_rows]

    def get(self, id: str) -> Entry:
        """Return a document by id, without its rows.

        Raises:
            UnknownIdError: there is no such document.
        """
        return self.entries_of(self.positions([id]))[0]

    def entries(self) -> Iterator[Entry]:
        """Yield all documents in order, without their rows."""
        for positions in self._pages():
            yield from self.entries_of(positions)

    def entries_of(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[Entry]:
        """Return documents by position, without their rows.

        Raises:
            InputError: there is no such position.
        """
        first_rows = self._first_rows(positions)
        found = self._catalogue.entries(first_rows)
        return [
            Entry(record.id, record.text, None if record.metadata is None else self._metadata(record))
            for record in (found[row] for row in first_rows)
        ]

    def sorted_ids(self) -> Iterator[tuple[str, bool]]:
        """Yield all ids in ascending order, each with whether it was given; otherwise it is a hash of the content."""
        for page in self._catalogue.sorted_ids(self._map.rows):
            live = self._map.is_live(np.array([row for _, row, _ in page], dtype=np.int64)).tolist()
            yield from ((id, given) for (id, _, given), alive in zip(page, live, strict=True) if alive)

    def with_arrays(self, manifest: Manifest, map_rows: Callable[[int], tuple[Shard, ...]]) -> "Snapshot":
        """Return a snapshot of the same documents with their arrays."""
        return Snapshot(self._catalogue, self._map, manifest, map_rows(self._map.rows))

    def _metadata(self, record: EntryRecord) -> dict[str, Any]:
        try:
            found = json.loads(record.metadata or "")
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except (RecursionError, ValueError) as error:
            raise IndexDamagedError(
                f"{self._catalogue.name} is damaged: the metadata of {record.id!r} is not a JSON object ({error}); "
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

    def _first_rows(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[int]:
        return self._map.first_rows_of(self._checked(positions)).tolist()

    def _checked(self, positions: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        found = np.asarray(positions).reshape(-1)
        if found.size == 0:
            return np.empty(0, dtype=np.int64)
        if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= len(self):
            raise InputError(
                f"positions reach from {found.min()} to {found.max()}; expected integers from 0 to {len(self) - 1}"
            )
        return found.astype(np.int64)


class Snapshot(Listing):
    """A `Listing` with its arrays, for ranking; later changes to the index do not affect it.

    Tensors may share memory with the index: do not write to them.

    Attributes:
        rows: number of live rows; a document may have several.
        manifest: the properties of the index.
    """

    def __init__(self, catalogue: Catalogue, row_map: RowMap, manifest: Manifest, shards: tuple[Shard, ...]) -> None:
        super().__init__(catalogue, row_map)
        self.manifest = manifest
        self._shards, self._shard_rows = shards, manifest.shard_rows

    def to(self, device: str | torch.device) -> "Snapshot":
        """Return the same snapshot with all its arrays in the memory of a device.

        A GPU then ranks without reading rows again. Takes the bytes of all rows, including removed ones.
        """
        shards = tuple(
            Shard(shard.first, {name: array.to(device) for name, array in shard.fields.items()})
            for shard in self._shards
        )
        return Snapshot(self._catalogue, self._map, self.manifest, shards)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield all live rows in iteration order, at most `size` per chunk, and none of two shards.

        A chunk is a view of the map if its rows are consecutive, and a copy otherwise. The rows of a document follow
        each other but may be split between chunks.

        Args:
            size: most rows of a chunk, at least 1.
        """
        size = positive_integer(size, "size")
        first = 0
        while first < self.rows:
            rows = self._map.live_between(first, min(first + size, self.rows))
            # rows of the next shard would have to be copied behind those of this one
            rows = rows[rows < (rows[0] // self._shard_rows + 1) * self._shard_rows]
            yield Chunk(self._map.positions_between(first, rows), self._rows(rows))
            first += len(rows)

    def gather(self, positions: Sequence[int] | np.ndarray | Tensor) -> Chunk:
        """Return all rows of some documents, in the order given; repeats are allowed.

        Args:
            positions: (n,) integers, positions of documents.

        Raises:
            InputError: there is no such position.
        """
        checked = self._checked(positions)
        rows, owner = self._map.all_rows_of(self._map.first_rows_of(checked))
        return Chunk(checked[owner], self._rows(rows))

    def _rows(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the fields of rows: views if the rows are consecutive and in one shard, otherwise copies."""
        first, count = int(rows[0]) if len(rows) else 0, len(rows)
        if count and int(rows[-1]) - first == count - 1 and (count < 3 or bool((np.diff(rows) == 1).all())):
            parts = [
                {name: array[offset : offset + part] for name, array in self._shards[number].fields.items()}
                for number, offset, part in split_at_multiples(first, count, self._shard_rows)
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
            targets = np.flatnonzero(numbers == number)
            sources = torch.from_numpy(rows[targets] - shard.first).to(device)
            targets = torch.from_numpy(targets).to(device)
            for name, array in shard.fields.items():
                out[name].index_copy_(0, targets, array.index_select(0, sources))
        return out


def find_first_rows(catalogue: Catalogue, row_map: RowMap, ids: Sequence[str]) -> dict[str, int]:
    """Return the first rows of the live documents among ids, by id.

    Raises:
        InputError: ids is one string, or an id is not a string.
    """
    if isinstance(ids, str):
        raise InputError(f"ids is the string {ids!r:.60}; expected a list of strings")
    wrong = next(((number, id) for number, id in enumerate(ids) if not isinstance(id, str)), None)
    if wrong is not None:
        raise InputError(f"id {wrong[0]} is {wrong[1]!r:.60} ({type(wrong[1]).__name__}); expected a string")
    found = catalogue.find(list(dict.fromkeys(map(str.__str__, ids))), row_map.rows)
    rows = np.array([row for row, _ in found.values()], dtype=np.int64)
    live = row_map.is_live(rows).tolist()
    if not row_map.is_first_row(rows).all():
        raise IndexDamagedError(f"{catalogue.name} is damaged: an entry's row begins no document; see verify()")
    return {id: row for (id, (row, _)), alive in zip(found.items(), live, strict=True) if alive}


def known_first_rows(catalogue: Catalogue, row_map: RowMap, ids: Sequence[str]) -> dict[str, int]:
    """Return the first rows of documents, by id.

    Raises:
        UnknownIdError: there is no such document; the message names the unknown ids.
    """
    first_rows = find_first_rows(catalogue, row_map, ids)
    _check_known(ids, first_rows)
    return first_rows


def _check_known(ids: Sequence[str], found: Mapping[str, int]) -> None:
    if missing := [id for id in ids if id not in found]:
        raise UnknownIdError(f"no document has the id {quoted_ids(missing)}; expected ids that the index holds")
