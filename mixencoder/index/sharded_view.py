"""`ShardedSnapshot`: views of several indexes, read as one.

The documents of the first shard come first, then those of the second, and so on. What a shard holds is read through a
`Call`, which `local_view` answers in this process.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import positive_integer
from mixencoder.errors import IndexStateError, InputError
from mixencoder.index.catalogue import EntryRecord
from mixencoder.index.manifest import Manifest
from mixencoder.index.view import Chunk, Entry, Snapshot

Call = Callable[[str, Mapping[int, tuple[Any, ...]]], Mapping[int, Any]]
"""Calls a method of some shards' snapshots: (method, {shard: arguments}) -> {shard: result}."""
MOST_DOCUMENTS = 2**32
"""Of all shards together: ranking packs a position into 32 bits."""


class ShardInfo(NamedTuple):
    """What a shard holds.

    Attributes:
        name: for messages.
        documents, rows, removed_rows: as the snapshot counts them.
        manifest: of the index.
    """

    name: str
    documents: int
    rows: int
    removed_rows: int
    manifest: Manifest

    @classmethod
    def of(cls, name: str, view: Snapshot) -> "ShardInfo":
        """Return what a view holds."""
        return cls(name, len(view), view.rows, view.removed_rows, view.manifest)


class ShardedSnapshot(Snapshot):
    """Views of several indexes of one encoder, as one view. Safe to use from several threads.

    Args:
        shards: what each holds, in order; at least one.
        call: reads from them.

    Attributes:
        shards: as given.
        starts: (shards + 1,) int64, the position of each shard's first document, and the number of all.

    Raises:
        IndexMismatchError: the shards differ in fingerprint, schema or settings.
        InputError: there is no shard, or there are more documents than positions.
    """

    def __init__(self, shards: Sequence[ShardInfo], call: Call) -> None:
        if not shards:
            raise InputError("there is no shard; expected at least one index")
        check_same_kind([shard.name for shard in shards], [shard.manifest for shard in shards])
        self.shards, self.manifest = tuple(shards), shards[0].manifest
        self.rows = sum(shard.rows for shard in shards)
        self.removed_rows = sum(shard.removed_rows for shard in shards)
        self.starts = np.cumsum([0, *(shard.documents for shard in shards)], dtype=np.int64)
        if len(self) > MOST_DOCUMENTS:
            raise InputError(
                f"the {len(shards)} shards hold {len(self):,} documents; expected at most {MOST_DOCUMENTS:,}. Rank "
                "parts of them, and merge the rankings by score"
            )
        self._call, self._digest = call, ""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """As `Listing.digest`: a hash of those of all shards, in order."""
        if not self._digest:
            found = self._call("digest", dict.fromkeys(range(len(self.shards)), ()))
            text = " ".join(found[number] for number in range(len(self.shards)))
            self._digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self._digest

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        """As `Listing.find`. Of a document that several shards hold, the first is found."""
        if isinstance(ids, str):
            raise InputError(f"ids is the string {ids!r:.60}; expected a list of strings")
        found: dict[str, int] = {}
        for number, held in sorted(self._call("find", {n: (list(ids),) for n in range(len(self.shards))}).items()):
            for id, position in held.items():
                found.setdefault(id, position + int(self.starts[number]))
        return found

    def ids(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """As `Listing.ids`."""
        return self._looked_up("ids", positions)

    def texts(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str | None]:
        """As `Listing.texts`."""
        return self._looked_up("texts", positions)

    def records(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[EntryRecord]:
        """As `Listing.records`; a record's row is that in its shard."""
        return self._looked_up("records", positions)

    def entries_of(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[Entry]:
        """As `Listing.entries_of`."""
        return self._looked_up("entries_of", positions)

    def to(self, device: str | torch.device) -> "ShardedSnapshot":
        """As `Snapshot.to`."""
        moved = self._call("to", dict.fromkeys(range(len(self.shards)), (device,)))
        return ShardedSnapshot(self.shards, local_calls([moved[number] for number in range(len(self.shards))]))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """As `Snapshot.chunks`; no chunk holds rows of two shards."""
        size = positive_integer(size, "size")
        for number in range(len(self.shards)):
            (parts,) = self._call("chunks", {number: (size,)}).values()
            for chunk in parts:
                yield self._placed(chunk, number)

    def gather(self, positions: Sequence[int] | np.ndarray | Tensor) -> Chunk:
        """As `Snapshot.gather`."""
        checked = self._checked(positions)
        distinct, order = np.unique(checked, return_inverse=True)
        parts = self.split(distinct)
        if not parts:
            return self._call("gather", {0: (checked,)})[0]
        found = self._call("gather", {number: (part,) for number, part in parts.items()})
        chunks = [self._placed(found[number], number) for number in parts]
        owners = np.concatenate([chunk.positions for chunk in chunks])
        names = chunks[0].fields
        fields = {name: torch.cat([chunk.fields[name] for chunk in chunks]) for name in names}
        if len(distinct) == len(checked) and (order[1:] > order[:-1]).all():
            return Chunk(owners, fields)
        # rows of each distinct document, then those of each wanted one
        counts = np.bincount(np.searchsorted(distinct, owners), minlength=len(distinct))
        firsts, wanted = np.cumsum(counts) - counts, counts[order]
        within = np.arange(wanted.sum()) - np.repeat(np.cumsum(wanted) - wanted, wanted)
        rows = np.repeat(firsts[order], wanted) + within
        device = next(iter(fields.values())).device
        chosen = torch.from_numpy(rows).to(device)
        return Chunk(owners[rows], {name: field.index_select(0, chosen) for name, field in fields.items()})

    def split(self, positions: np.ndarray) -> dict[int, np.ndarray]:
        """Return positions within their shards, by shard: those of each keep their order."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        return {number: positions[numbers == number] - self.starts[number] for number in np.unique(numbers).tolist()}

    def __reduce__(self) -> NoReturn:
        raise IndexStateError(
            f"a view of {len(self.shards)} shards cannot be copied or pickled; open them again by their paths"
        )

    def _looked_up(self, method: str, positions: Sequence[int] | np.ndarray | Tensor) -> list[Any]:
        """Return one value for each position, which a method of the shards gives."""
        checked = self._checked(positions)
        parts = self.split(checked)
        found = {number: iter(part) for number, part in self._call(method, {n: (p,) for n, p in parts.items()}).items()}
        numbers = np.searchsorted(self.starts, checked, side="right") - 1
        return [next(found[number]) for number in numbers.tolist()]

    def _placed(self, chunk: Chunk, number: int) -> Chunk:
        return Chunk(chunk.positions + self.starts[number], chunk.fields)


def local_calls(views: Sequence[Snapshot]) -> Call:
    """Return a `Call` that reads views of this process, one after another."""

    def call(method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        return {number: getattr(views[number], method)(*given) for number, given in arguments.items()}

    return call


def local_view(views: Sequence[Snapshot], names: Sequence[str]) -> ShardedSnapshot:
    """Return views of this process as one."""
    shards = [ShardInfo.of(name, view) for name, view in zip(names, views, strict=True)]
    return ShardedSnapshot(shards, local_calls(views))


def check_same_kind(names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Raise if shards, given by name and manifest, cannot be ranked together.

    Raises:
        IndexMismatchError: one differs from the first in fingerprint, schema, settings, or whether it keeps texts; the
            message names both and what differs.
    """
    first = manifests[0]
    for name, manifest in zip(names[1:], manifests[1:], strict=True):
        manifest.check_fingerprint(f"shard {name}", first.fingerprint)
        advice = f"That is what shard {names[0]} has; build all shards alike"
        manifest.check_settings(f"shard {name} was made", first, advice)
