"""Find what the columns of a table mean: by their names, or by their order where the names are not known."""

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
"""Columns that always hold lists."""
_RIGHT = r"positives?|pos|positive_?(document|passage)s?"
_FIRST = ("query", "question", r"anchor|premise|(query|question|sentence|text)_?[1a]")
_SECOND = (
    _RIGHT,
    r"candidates|answers?|doc(ument)?s?|passages?|responses?|repl(y|ies)|hypothesis"
    r"|(query|question|sentence|text)_?[2b]",
)
"""Patterns for the names of the query column and of the document column, the most specific first."""
_WRONG = r"(hard_?)?neg(ative)?s?(_?(document|passage|doc)s?)?([_ ]?\d+)?"
_IDENTIFIER = (
    r"|unnamed: \d+|__index_level_\d+__|_?id|idx|index|(q|p|d|doc|document|passage|query|question|row|u|uu|gu)id"
    r"|.*[_\- ](id|idx|index)s?"
)
"""Columns of row numbers or ids, which are not read. pandas writes its index as a column without a name."""


class Shape(NamedTuple):
    """What the columns of a table mean."""

    kind: str
    """"tuple" (query, right document, wrong ones), "lists" (query, right documents, wrong ones), "candidates" (query,
    documents, a label each) or "labelled" (a pair and its label)."""
    inputs: tuple[str, ...]
    label: str
    """Column of the labels; empty where the kind has none."""
    unread: tuple[str, ...] = ()
    """Other columns, not read because the inputs were found by their names."""
    identifiers: tuple[str, ...] = ()
    """Columns of row numbers or ids, not read."""
    by_order: bool = False
    """Whether inputs were found by the order of the columns, because their names are not known."""


def recognise(row: Row, where: str) -> Shape:
    """Return the shape of a table, found from its first row.

    Raises:
        DataError: the columns fit no shape; the message names the row, what was found and what was expected.
    """
    identifiers = [name for name in row if _matches(_IDENTIFIER, name)]
    columns = [name for name in row if name not in identifiers]
    label = next((name for known in LABEL_COLUMNS for name in columns if _normalised(name) == known), None)
    texts = [name for name in columns if name != label]
    right = _first_of(texts, (_RIGHT,))
    first, second = _first_of(texts, _FIRST), _first_of(texts, _SECOND)
    if first is not None and second is None:
        # next to a query column, "text" is the document
        second = _first_of(texts, ("text",))
    by_order = first is None or second is None
    unread: list[str] = []
    if first is not None and second is not None:
        # if both texts have known names, other columns may be notes, not wrong documents
        label = None if right else label
        inputs = [first, second, *(name for name in texts if label is None and _matches(_WRONG, name))]
        unread = [name for name in columns if name not in inputs and name != label]
    else:
        others = [name for name in texts if name not in (first, second)]
        inputs = [first or others.pop(0)] if first or others else []
        inputs += [second or others.pop(0)] if second or others else []
        inputs += others
    has_lists = len(inputs) > 1 and (_normalised(inputs[1]) in _LISTS or as_list(row[inputs[1]]) is not None)
    kinds = {(False, False): "tuple", (True, False): "lists", (True, True): "candidates", (False, True): "labelled"}
    kind = kinds[has_lists, label is not None]
    most_inputs = {"tuple": math.inf, "lists": 3 if by_order else math.inf, "candidates": 2, "labelled": 2}[kind]
    if not 2 <= len(inputs) <= most_inputs:
        expected = " or ".join(", ".join(shape) for shape in _NAMED_SHAPES)
        raise DataError(
            f"{where}: fields are {fields_of(row)}; expected {expected}, or two texts in any "
            f"columns, then columns of wrong documents or a label in {', '.join(LABEL_COLUMNS)}"
        )
    skipped = tuple(name for name in identifiers if _normalised(name) not in ("id", "_id"))
    return Shape(kind, tuple(inputs), label or "", tuple(unread), skipped, by_order)


def fields_of(row: Iterable[Any]) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(str(name) or "''" for name in row) or "none"


def _first_of(columns: Sequence[str], patterns: Iterable[str]) -> str | None:
    return next((name for pattern in patterns for name in columns if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, _normalised(name)) is not None


def _normalised(name: Any) -> str:
    return str(name).strip().lower()
