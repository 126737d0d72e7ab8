"""Comparing an index with its checksums."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixencoder.errors import IndexDamagedError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.naming import naming
from mixencoder.index.rows import BLOCK_ROWS, BlockRecord, RowMap
from mixencoder.index.schema import Schema
from mixencoder.index.shards import Arrays, checksum

_HOPELESS = "Restore the file, or build the index again"


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed.

    Attributes:
        file: where.
        what: what was found and expected.
        mend: what to do.
        ids: documents that it touches; empty where that cannot be told.
        heads: their first rows.
    """

    file: str
    what: str
    mend: str
    ids: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        touched = f"; documents {naming(list(self.ids))}" if self.ids else ""
        return f"{self.file}: {self.what}{touched}. {self.mend}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        documents: live ones, when it looked.
        rows: live ones, when it looked.
        checked_bytes: of array data compared with checksums.
        damages: empty where all is well.
        unsummed: which rows count has no checksum, as an older version wrote the index; the next write adds them.
    """

    documents: int
    rows: int
    checked_bytes: int
    damages: tuple[Damage, ...]
    unsummed: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything is as it was committed."""
        return not self.damages

    @property
    def ids(self) -> list[str]:
        """Documents that damage touches."""
        return list(dict.fromkeys(id for damage in self.damages for id in damage.ids))

    def __str__(self) -> str:
        state = "\n".join(map(str, self.damages)) if self.damages else "every checksum agrees"
        if self.unsummed:
            state += (
                "\nAn older version wrote this index, without checksums of which rows are live: damage there would not "
                "be seen. The next write adds them"
            )
        return f"{self.documents:,} documents, {self.rows:,} rows, {self.checked_bytes:,} bytes of arrays: {state}"


def verify(catalogue: Catalogue, arrays: Arrays, schema: Schema) -> Verification:
    """Check arrays, entries and the catalogue's own structure; rows of removed documents are passed over."""
    damages = [Damage(catalogue.name, f"SQLite finds: {problem}", _HOPELESS) for problem in catalogue.problems()]
    try:
        records = catalogue.blocks()
        row_map = catalogue.mapped(records)
        checked, found = _array_damages(catalogue, arrays, schema, records, row_map)
        damages += found + _entry_damages(catalogue, row_map)
        return Verification(
            row_map.documents, row_map.live_rows, checked, tuple(damages), unsummed=not catalogue.summed
        )
    except IndexDamagedError as error:
        # what else is wrong cannot be told without it
        return Verification(0, 0, 0, (*damages, Damage(catalogue.name, str(error), _HOPELESS)))


def _array_damages(
    catalogue: Catalogue, arrays: Arrays, schema: Schema, records: Sequence[BlockRecord], row_map: RowMap
) -> tuple[int, list[Damage]]:
    """Return the bytes that were checked, and what is wrong with them."""
    checked, damages = 0, []
    for record in records:
        first = record.block * BLOCK_ROWS
        rows = np.arange(first, first + record.rows)
        live = rows[row_map.is_live(rows)]
        if len(live) == 0:
            continue
        for field, expected in zip(schema.fields, np.frombuffer(record.checksums, dtype="<u4").tolist(), strict=True):
            found = arrays.readable(field, first, record.rows)
            checked += record.rows * field.row_bytes
            if found is not None and checksum(found) == expected:
                continue
            heads = tuple(row_map.heads_of(np.unique(row_map.places_of(live))).tolist())
            ids = tuple(catalogue.ids(heads, check=False).values())
            wrong = "missing" if found is None else "not what was written (checksum)"
            what = f"rows {first:,} to {first + record.rows - 1:,} of field {field.name} are {wrong}"
            mend = (
                "repair() (mixencoder index repair) encodes these documents again from their stored texts, and removes "
                "those without: add them again"
            )
            damages.append(Damage(str(arrays.file_of(first, field)), what, mend, ids, heads))
    return checked, damages


def _entry_damages(catalogue: Catalogue, row_map: RowMap) -> list[Damage]:
    damages, count = [], 0
    for page in catalogue.pages(row_map.rows):
        rows = np.array([entry.row for entry, _ in page], dtype=np.int64)
        heads, live = row_map.is_head(rows), row_map.is_live(rows)
        count += int(heads.sum())
        for (entry, sound), head, alive in zip(page, heads.tolist(), live.tolist(), strict=True):
            if alive and not (head and sound):
                what = f"the entry of row {entry.row:,} is not what was written"
                mend = "remove() the document and add it again; repair() removes it"
                damages.append(Damage(catalogue.name, what, mend, (entry.id,), (entry.row,)))
    if count != row_map.written_documents:
        what = f"{row_map.written_documents:,} documents were written but {count:,} entries are there"
        damages.append(Damage(catalogue.name, what, _HOPELESS))
    return damages
