"""What an index is, as its catalogue keeps it; read with suspicion, as strangers and failing disks write too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixencoder.base.texts import printable
from mixencoder.errors import IndexDamagedError, IndexMismatchError
from mixencoder.index.rows import BLOCK_ROWS
from mixencoder.index.schema import Schema

MOST_BYTES = 2**20
"""Longest value of a manifest that is read."""
_NAMES = ("schema", "fingerprint", "settings", "store_text", "shard_rows", "complete")
_MOST_SHARD_ROWS = 2**40


@dataclass(frozen=True)
class Manifest:
    """What an index is, fixed when it is made but for `complete`.

    Attributes:
        schema: the fields of a row.
        fingerprint: what encoded it, by part.
        settings: anything else that whoever opens it must know.
        store_text: whether texts are kept.
        shard_rows: rows of a full shard.
        complete: False until the first building is done.
    """

    schema: Schema
    fingerprint: dict[str, str]
    settings: dict[str, Any]
    store_text: bool
    shard_rows: int
    complete: bool

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, Any]], where: str) -> "Manifest":
        """Read it from (name, JSON) pairs; others than its own are passed over.

        Args:
            rows: as the catalogue holds them.
            where: names the catalogue in a message.

        Raises:
            IndexDamagedError: something is missing, or is not what `to_rows` writes.
        """
        try:
            found = {name: json.loads(value) for name, value in rows if name in _NAMES}
            missing = [name for name in _NAMES if name not in found]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            manifest = cls(Schema.from_json(found.pop("schema")), **found)
            manifest._check()
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise IndexDamagedError(
                f"{where} holds no whole manifest ({printable(what[:200])}); restore the file from a backup, or build "
                "the index again"
            ) from error
        return manifest

    def to_rows(self) -> list[tuple[str, str]]:
        """Return what `from_rows` reads."""
        values = {**vars(self), "schema": self.schema.to_json()}
        return [(name, json.dumps(values[name])) for name in _NAMES]

    def check_fingerprint(self, what: str, expected: Mapping[str, str]) -> None:
        """Refuse to be taken for what something else encoded; "name" is for the message alone.

        Args:
            what: the index, for the message.
            expected: the fingerprint it should have.

        Raises:
            IndexMismatchError: it has another; the message names both and the parts that differ.
        """
        found = self.fingerprint
        parts = [key for key in {**found, **expected} if key != "name" and found.get(key) != expected.get(key)]
        if parts:
            differ = "; ".join(f"{part} is {found.get(part)}, expected {expected.get(part)}" for part in parts)
            raise IndexMismatchError(
                printable(
                    f"{what} was made by {found.get('name', 'another model')}, but this is "
                    f"{expected.get('name', 'another one')}: {differ}. Use it with what made it, or build it again"
                )
            )

    def check_settings(self, what: str, expected: "Manifest", way_out: str) -> None:
        """Refuse to be taken for an index of the same model that is made otherwise.

        Args:
            what: the index, for the message.
            expected: what it should be.
            way_out: what to do, for the message.

        Raises:
            IndexMismatchError: it is another.
        """
        for name in ("schema", "settings", "store_text"):
            here, wanted = getattr(self, name), getattr(expected, name)
            if here != wanted:
                raise IndexMismatchError(printable(f"{what} with {name} {here}; expected {wanted}. {way_out}"))

    def _check(self) -> None:
        parts = self.fingerprint
        if not (isinstance(parts, dict) and all(isinstance(value, str) for value in parts.values())):
            raise ValueError("fingerprint is not an object of strings")
        if not isinstance(self.settings, dict):
            raise ValueError("settings is not an object")
        if not (isinstance(self.store_text, bool) and isinstance(self.complete, bool)):
            raise ValueError("store_text and complete are not both true or false")
        rows = self.shard_rows
        if type(rows) is not int or rows % BLOCK_ROWS or not 0 < rows <= _MOST_SHARD_ROWS:
            raise ValueError(f"shard_rows is not a positive multiple of {BLOCK_ROWS}")
