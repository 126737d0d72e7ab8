"""What the columns of a table mean, read off their names first and, where those say nothing, off their order."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mixencoder.data.cells import as_list
from mixencoder.data.tables import Row
from mixencoder.errors import DataError

LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""A column of one of these names is the label; the other columns are inputs."""
_NAMED_SHAPES = (
    ("query", "positive"),
    ("query", "positives"),
    ("query", "candidates", "labels"),
    ("premise", "hypothesis", "label"),
    ("sentence1", "sentence2", "score"),
)
_LISTS = ("positives", "candidates")
"""Columns that hold lists, whatever stands in them."""
_RIGHT = r"positives?|pos|positive_?(document|passage)s?"
_FIRST = ("query", "question", r"anchor|premise|(query|question|sentence|text)_?[1a]")
_SECOND = (
    _RIGHT,
    r"candidates|answers?|doc(ument)?s?|passages?|responses?|repl(y|ies)|hypothesis"
    r"|(query|question|sentence|text)_?[2b]",
)
"""Names of the query's column and of the documents', the clearest first."""
_WRONG = r"(hard_?)?neg(ative)?s?(_?(document|passage|doc)s?)?([_ ]?\d+)?"
_IDENTIFIER = (
    r"|unnamed: \d+|__index_level_\d+__|_?id|idx|index|(q|p|d|doc|document|passage|query|question|row|u|uu|gu)id"
    r"|.*[_\- ](id|idx|index)s?"
)
"""Columns that number rows or name texts, which are no texts; pandas writes an index without a name."""


class Shape(NamedTuple):
    """What the columns of a table mean."""

    kind: str
    """"tuple" (query, right document, wrong ones), "lists" (query, right documents, wrong ones), "candidates" (query,
    documents, a label each) or "labelled" (a pair and its label)."""
    inputs: tuple[str, ...]
    label: str
    """Column of the labels; empty where the kind has none."""
    unread: tuple[str, ...] = ()
    """Further columns, which are passed over beside inputs that go by their names."""
    identifiers: tuple[str, ...] = ()
    """Columns that are passed over, as they number or name things."""
    by_order: bool = False
    """Whether inputs were told by their order, as names say too little."""


def recognise(row: Row, where: str) -> Shape:
    """Return the shape of a table by its first row.

    Raises:
        DataError: it has none; the message names the row, what was found and what was expected.
    """
    identifiers = [name for name in row if _is(_IDENTIFIER, name)]
    columns = [name for name in row if name not in identifiers]
    label = next((name for known in LABEL_COLUMNS for name in columns if _plain(name) == known), None)
    texts = [name for name in columns if name != label]
    right = _first_of(texts, (_RIGHT,))
    first, second = _first_of(texts, _FIRST), _first_of(texts, _SECOND)
    if first is not None and second is None:
        # beside a query it is its document; beside anything else nobody knows
        second = _first_of(texts, ("text",))
    by_order = first is None or second is None
    unread: list[str] = []
    if first is not None and second is not None:
        # who names both texts may have notes beside them, which are no wrong documents
        label = None if right else label
        inputs = [first, second, *(name for name in texts if label is None and _is(_WRONG, name))]
        unread = [name for name in columns if name not in inputs and name != label]
    else:
        others = [name for name in texts if name not in (first, second)]
        inputs = [first or others.pop(0)] if first or others else []
        inputs += [second or others.pop(0)] if second or others else []
        inputs += others
    has_lists = len(inputs) > 1 and (_plain(inputs[1]) in _LISTS or as_list(row[inputs[1]]) is not None)
    kinds = {(False, False): "tuple", (True, False): "lists", (True, True): "candidates", (False, True): "labelled"}
    kind = kinds[has_lists, label is not None]
    most = {"tuple": math.inf, "lists": 3 if by_order else math.inf, "candidates": 2, "labelled": 2}[kind]
    if not 2 <= len(inputs) <= most:
        expected = " or ".join(", ".join(shape) for shape in _NAMED_SHAPES)
        raise DataError(
            f"{where}: fields are {fields_of(row)}; expected {expected}, or two texts in any "
            f"columns, then columns of wrong documents or a label in {', '.join(LABEL_COLUMNS)}"
        )
    passed = tuple(name for name in identifiers if _plain(name) not in ("id", "_id"))
    return Shape(kind, tuple(inputs), label or "", tuple(unread), passed, by_order)


def fields_of(row: Iterable[Any]) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(str(name) or "''" for name in row) or "none"


def _first_of(columns: Sequence[str], patterns: Iterable[str]) -> str | None:
    return next((name for pattern in patterns for name in columns if _is(pattern, name)), None)


def _is(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, _plain(name)) is not None


def _plain(name: Any) -> str:
    return str(name).strip().lower()
