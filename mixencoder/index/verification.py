"""Comparing an index with its checksums."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixencoder.errors import IndexDamagedError
from mixencoder.index.catalogue import Catalogue
from mixencoder.index.messages import quoted_ids
from mixencoder.index.rows import BLOCK_ROWS, BlockRecord, RowMap
from mixencoder.index.schema import Schema
from mixencoder.index.shards import Arrays, checksum

_RESTORE_OR_REBUILD = "Restore the file, or build the index again"


@dataclass(frozen=True)
class Damage:
    """Part of a file that differs from what was committed.

    Attributes:
        file: the damaged file.
        what: what was found and expected.
        mend: what to do.
        ids: the documents affected; empty if unknown.
        heads: the first rows of these documents.
    """

    file: str
    what: str
    mend: str
    ids: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        touched = f"; documents {quoted_ids(list(self.ids))}" if self.ids else ""
        return f"{self.file}: {self.what}{touched}. {self.mend}"


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        documents: number of live documents.
        rows: number of live rows.
        checked_bytes: bytes of array data compared with checksums.
        damages: empty if there is no damage.
        unsummed: whether the records of live rows have no checksums, because an older version wrote the index; the
            next write adds them.
    """

    documents: int
    rows: int
    checked_bytes: int
    damages: tuple[Damage, ...]
    unsummed: bool = False

    @property
    def ok(self) -> bool:
        """Whether no damage was found."""
        return not self.damages

    @property
    def ids(self) -> list[str]:
        """The documents affected by damage."""
        return list(dict.fromkeys(id for damage in self.damages for id in damage.ids))

    def __str__(self) -> str:
        state = "\n".join(map(str, self.damages)) if self.damages else "every checksum agrees"
        if self.unsummed:
            state += (
                "\nAn older version wrote this index, without checksums for the records of which rows are live: damage "
                "there is not detected. The next write adds these checksums"
            )
        return f"{self.documents:,} documents, {self.rows:,} rows, {self.checked_bytes:,} bytes of arrays: {state}"


def verify(catalogue: Catalogue, arrays: Arrays, schema: Schema) -> Verification:
    """Check arrays, entries and the catalogue's own structure; blocks and entries without live rows are skipped."""
    damages = [
        Damage(catalogue.name, f"SQLite finds: {problem}", _RESTORE_OR_REBUILD) for problem in catalogue.problems()
    ]
    try:
        records = catalogue.blocks()
        row_map = catalogue.row_map_of(records)
        checked, found = _array_damages(catalogue, arrays, schema, records, row_map)
        damages += found + _entry_damages(catalogue, row_map)
        return Verification(
            row_map.documents, row_map.live_rows, checked, tuple(damages), unsummed=not catalogue.has_block_checksums
        )
    except IndexDamagedError as error:
        # without the catalogue, nothing more can be checked
        return Verification(0, 0, 0, (*damages, Damage(catalogue.name, str(error), _RESTORE_OR_REBUILD)))


def _array_damages(
    catalogue: Catalogue, arrays: Arrays, schema: Schema, records: Sequence[BlockRecord], row_map: RowMap
) -> tuple[int, list[Damage]]:
    """Return the number of bytes checked, and the damage found in them."""
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
            first_rows = tuple(row_map.first_rows_of(np.unique(row_map.positions_of(live))).tolist())
            ids = tuple(catalogue.ids(first_rows, check=False).values())
            wrong = "missing" if found is None else "not what was written (checksum)"
            what = f"rows {first:,} to {first + record.rows - 1:,} of field {field.name} are {wrong}"
            mend = (
                "repair() (mixencoder index repair) encodes these documents again from their stored texts, and removes "
                "those without a text: add them again"
            )
            damages.append(Damage(str(arrays.file_of(first, field)), what, mend, ids, first_rows))
    return checked, damages


def _entry_damages(catalogue: Catalogue, row_map: RowMap) -> list[Damage]:
    damages, count = [], 0
    for page in catalogue.pages(row_map.rows):
        rows = np.array([entry.row for entry, _ in page], dtype=np.int64)
        first, live = row_map.is_first_row(rows), row_map.is_live(rows)
        count += int(first.sum())
        for (entry, sound), is_first, alive in zip(page, first.tolist(), live.tolist(), strict=True):
            if alive and not (is_first and sound):
                what = f"the entry of row {entry.row:,} is not what was written"
                mend = "remove() the document and add it again; repair() removes it"
                damages.append(Damage(catalogue.name, what, mend, (entry.id,), (entry.row,)))
    if count != row_map.written_documents:
        what = f"{row_map.written_documents:,} documents were written but {count:,} entries were found"
        damages.append(Damage(catalogue.name, what, _RESTORE_OR_REBUILD))
    return damages
