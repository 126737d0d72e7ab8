"""The manifest of an index, stored in its catalogue; all values are checked, as the file may be untrusted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixencoder.base.texts import printable
from mixencoder.errors import IndexDamagedError, IndexMismatchError
from mixencoder.index.rows import BLOCK_ROWS
from mixencoder.index.schema import Schema

MAX_VALUE_BYTES = 2**20
"""Longer values in a manifest are not read."""
_NAMES = ("schema", "fingerprint", "settings", "store_text", "shard_rows", "complete")
_MAX_SHARD_ROWS = 2**40


@dataclass(frozen=True)
class Manifest:
    """The properties of an index; all but `complete` are fixed when it is created.

    Attributes:
        schema: the fields of a row.
        fingerprint: identifies what encodes the documents, part by part.
        settings: a JSON object that the caller stores with the index.
        store_text: whether texts are kept.
        shard_rows: rows of a full shard.
        complete: False until the first build has finished.
    """

    schema: Schema
    fingerprint: dict[str, str]
    settings: dict[str, Any]
    store_text: bool
    shard_rows: int
    complete: bool

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, Any]], where: str) -> "Manifest":
        """Read a manifest from (name, JSON) pairs; unknown names are ignored.

        Args:
            rows: as the catalogue holds them.
            where: the catalogue, for the message.

        Raises:
            IndexDamagedError: a value is missing, or is not one that `to_rows` writes.
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
                f"{where} holds no valid manifest ({printable(what[:200])}); restore the file from a backup, or build "
                "the index again"
            ) from error
        return manifest

    def to_rows(self) -> list[tuple[str, str]]:
        """Return the (name, JSON) pairs that `from_rows` reads."""
        values = {**vars(self), "schema": self.schema.to_json()}
        return [(name, json.dumps(values[name])) for name in _NAMES]

    def check_fingerprint(self, what: str, expected: Mapping[str, str]) -> None:
        """Raise if the fingerprints differ in any part but "name", which only the message uses.

        Args:
            what: the index, for the message.
            expected: the fingerprint that it should have.

        Raises:
            IndexMismatchError: they differ; the message names both models and the parts that differ.
        """
        found = self.fingerprint
        parts = [key for key in {**found, **expected} if key != "name" and found.get(key) != expected.get(key)]
        if parts:
            differ = "; ".join(f"{part} is {found.get(part)}, expected {expected.get(part)}" for part in parts)
            raise IndexMismatchError(
                printable(
                    f"{what} was made by {found.get('name', 'another model')}, but this is "
                    f"{expected.get('name', 'another one')}: {differ}. Use the one that made it, or build it again"
                )
            )

    def check_settings(self, what: str, expected: "Manifest", advice: str) -> None:
        """Raise if schema, settings or store_text differ.

        Args:
            what: the index, for the message.
            expected: the manifest that it should have.
            advice: what to do, for the message.

        Raises:
            IndexMismatchError: one of them differs.
        """
        for name in ("schema", "settings", "store_text"):
            found, wanted = getattr(self, name), getattr(expected, name)
            if found != wanted:
                raise IndexMismatchError(printable(f"{what} with {name} {found}; expected {wanted}. {advice}"))

    def _check(self) -> None:
        parts = self.fingerprint
        if not (isinstance(parts, dict) and all(isinstance(value, str) for value in parts.values())):
            raise ValueError("fingerprint is not an object of strings")
        if not isinstance(self.settings, dict):
            raise ValueError("settings is not an object")
        if not (isinstance(self.store_text, bool) and isinstance(self.complete, bool)):
            raise ValueError("store_text and complete are not both true or false")
        rows = self.shard_rows
        if type(rows) is not int or rows % BLOCK_ROWS or not 0 < rows <= _MAX_SHARD_ROWS:
            raise ValueError(f"shard_rows is not a positive multiple of {BLOCK_ROWS}")
