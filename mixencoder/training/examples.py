"""From rows to examples: training and evaluation data by shape, which is read off the columns (docs/training.md).

Every source is checked whole before training starts. `mixencoder.training.batches` draws batches from sources.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.beir import read_beir
from mixencoder.errors import DataError, InputError
from mixencoder.tables import Row, read_rows, source_name

logger = logging.getLogger(__name__)

TASKS = ("ranking", "graded", "classification", "similarity")
LABEL_COLUMNS = ("label", "labels", "score", "scores")
"""A column of one of these names is the label; the other columns are inputs, in order (as in sentence-transformers)."""
_NAME_COLUMNS = ("id", "_id")
_LIST_COLUMNS = ("positives", "candidates")
_NAMED_SHAPES = (
    ("query", "positive"),
    ("query", "positives"),
    ("query", "candidates", "labels"),
    ("premise", "hypothesis", "label"),
    ("sentence1", "sentence2", "score"),
)


class Example(NamedTuple):
    """One training example of any task."""

    query: str
    positives: tuple[str, ...]
    """The right documents; for labelled and scored pairs the one document."""
    negatives: tuple[str, ...] = ()
    """Listed wrong documents."""
    target: float = 0.0
    """Class number or similarity score; unused for ranking."""
    grades: tuple[float, ...] = ()
    """Of each positive, above 0; used for graded ranking alone."""
    where: str = ""
    """Where it stands, for messages."""


@dataclass(frozen=True)
class Source:
    """One data file, or one BEIR folder, checked and in memory."""

    name: str
    task: str
    """One of `TASKS`."""
    examples: list[Example]
    weight: float = 1.0
    """How often batches come from here, relative to the other sources."""


class Shape(NamedTuple):
    """What the columns of a table mean."""

    kind: str
    """"tuple" (query, right document, wrong ones), "lists" (query, right documents, wrong ones), "candidates" (query,
    documents, a label each) or "labelled" (a pair and its label)."""
    inputs: tuple[str, ...]
    label: str
    """Column of the labels; empty where the kind has none."""
    unread: tuple[str, ...] = ()
    """Further columns, which are passed over."""


def recognise(row: Row, where: str) -> Shape:
    """Return the shape of a table by its first row.

    Raises:
        DataError: it has none; the message names the row, what was found and what was expected.
    """
    columns = tuple(name for name in row if name not in _NAME_COLUMNS)
    named = next((shape for shape in _NAMED_SHAPES if set(shape) <= set(row)), None)
    unread: tuple[str, ...] = ()
    if named:
        # who names both texts may have notes beside them, which are no wrong documents
        has_right = named[1] in ("positive", "positives")
        wrong = tuple(name for name in columns if name.startswith("neg")) if has_right else ()
        unread = tuple(name for name in columns if name not in named + wrong)
        columns = named + wrong
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    inputs = tuple(name for name in columns if name != label)
    has_lists = len(inputs) > 1 and (isinstance(row[inputs[1]], list) or inputs[1] in _LIST_COLUMNS)
    kinds = {(False, False): "tuple", (True, False): "lists", (True, True): "candidates", (False, True): "labelled"}
    kind = kinds[has_lists, label is not None]
    most = {"tuple": math.inf, "lists": 3, "candidates": 2, "labelled": 2}[kind]
    if not 2 <= len(inputs) <= most:
        expected = " or ".join(", ".join(shape) for shape in _NAMED_SHAPES)
        raise DataError(
            f"{where}: fields are {', '.join(row) or 'none'}; expected {expected}, or two texts in any columns, then "
            f"columns of wrong documents or a label in {', '.join(LABEL_COLUMNS)}"
        )
    return Shape(kind, inputs, label or "", unread)


def read_source(
    source: Path | Iterable[Mapping[str, Any]],
    *,
    weight: float = 1.0,
    label2id: dict[str, int] | None = None,
    task: str | None = None,
    name: str | None = None,
) -> Source:
    """Read and check a data file, a folder in BEIR layout (its train split), or rows such as a `datasets.Dataset`.

    Args:
        source: the file, folder or rows.
        weight: see `Source`.
        label2id: class names of the classification head; None if the model has none.
        task: one of `TASKS`; None reads it off the data.
        name: of the source; None takes the file's.

    Raises:
        DataError: the file cannot be read, a line has the wrong shape, a label is out of range, nothing usable is in
            it, or all of it has one label. The message names file, line, found and expected fields.
        InputError: the task does not exist.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if isinstance(source, Path):
        name = name or source_name(source)
    name = name or "rows"
    if isinstance(source, Path) and source.is_dir():
        found, examples = "ranking", _read_beir_examples(source)
    else:
        found, examples = _read_examples(source, name, label2id, task)
    label = str(source) if isinstance(source, Path) else name
    if not examples:
        raise DataError(f"{label} holds no usable example")
    if found == "ranking" and len({grade for example in examples for grade in example.grades}) > 1:
        found = "graded"
    if task is not None and task != found:
        if {task, found} != {"ranking", "graded"}:
            raise DataError(f"{label} holds examples of {found}; expected {task}")
        found = task
    _check_targets(label, found, examples)
    return Source(name, found, examples, weight)


def read_ranking_rows(path: Path) -> Iterator[tuple[str, list[str], list[float]]]:
    """Yield (query, candidates, labels) of a file of candidate lists.

    Raises:
        DataError: a line has another shape; the message names file and line.
    """
    shape = None
    for where, row in read_rows(path):
        shape = shape or recognise(row, where)
        if shape.kind != "candidates" or not {*shape.inputs, shape.label} <= set(row):
            raise DataError(f"{where}: fields are {', '.join(row)}; expected query, candidates, labels")
        yield _text(row[shape.inputs[0]], where, shape.inputs[0]), *_candidates_and_labels(row, shape, where)


def class_names(source: Path | Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the labels of a file of labelled pairs that are names, none for other files and for numbers.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, Path) and source.is_dir():
        return set()
    names, shape = set(), None
    for where, row in read_rows(source):
        shape = shape or recognise(row, where)
        if shape.kind != "labelled":
            return set()
        if _is_name(row.get(shape.label)):
            names.add(row[shape.label])
    return names


def _read_examples(
    source: Path | Iterable[Mapping[str, Any]], name: str, label2id: dict[str, int] | None, task: str | None
) -> tuple[str, list[Example]]:
    examples: list[Example] = []
    shape, found, dropped = None, "ranking", 0
    for where, row in read_rows(source, name):
        if shape is None:
            shape = recognise(row, where)
            if shape.unread:
                logger.warning(
                    "%s: %s not read beside %s; wrong documents stand in columns negative, negative_2 and so on",
                    source if isinstance(source, Path) else name,
                    ", ".join(shape.unread),
                    ", ".join(shape.inputs),
                )
            if shape.kind == "labelled":
                found = task or _task_of_label(shape.label, row[shape.label], label2id)
        fields = [*shape.inputs, *([shape.label] if shape.label else [])]
        if not set(fields) <= set(row):
            raise DataError(f"{where}: fields are {', '.join(row)}; expected {', '.join(fields)}")
        example = _read_example(row, shape, where, found, label2id)
        if example is None:
            dropped += 1
        else:
            examples.append(example._replace(where=where))
    if dropped:
        label = source if isinstance(source, Path) else name
        logger.warning(
            "%s: %d of %d rows have no right candidate and are left out", label, dropped, dropped + len(examples)
        )
    return found, examples


def _task_of_label(column: str, value: Any, label2id: dict[str, int] | None) -> str:
    """Names are classes; numbers are classes for a model that has some, unless the column says that they are scores."""
    if column in ("score", "scores"):
        return "similarity"
    number = _number(value)
    is_class = _is_name(value) or (label2id is not None and number is not None and number.is_integer())
    return "classification" if is_class else "similarity"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _number(value) is None


def _number(value: Any) -> float | None:
    """Return a number, which a CSV file holds as text; None if it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_example(row: Row, shape: Shape, where: str, task: str, label2id: dict[str, int] | None) -> Example | None:
    first, second, *rest = shape.inputs
    query = _text(row[first], where, first)
    if shape.kind in ("tuple", "lists"):
        read_right = _texts if shape.kind == "lists" else _text
        right = read_right(row[second], where, second)
        wrong = [text for name in rest for text in _one_or_more(row[name], where, name)]
        return _ranking(query, [right] if isinstance(right, str) else right, wrong)
    if shape.kind == "candidates":
        candidates, labels = _candidates_and_labels(row, shape, where)
        graded = [(text, label) for text, label in zip(candidates, labels, strict=True) if label > 0 and text.strip()]
        wrong = [text for text, label in zip(candidates, labels, strict=True) if label <= 0]
        example = _ranking(query, [text for text, _ in graded], wrong)
        return example and example._replace(grades=tuple(float(label) for _, label in graded))
    read_target = _class_number if task == "classification" else _score
    target = read_target(row[shape.label], where, shape.label, label2id)
    return Example(query, (_text(row[second], where, second),), target=target)


def _class_number(value: Any, where: str, column: str, label2id: dict[str, int] | None) -> int:
    if label2id is None:
        raise DataError(f"{where}: labelled pairs need a classification head, which this model lacks (heads)")
    if value in label2id:
        return label2id[value]
    number = _number(value)
    if number is None or not number.is_integer():
        raise DataError(f"{where}: {column} is {value!r}; expected one of {', '.join(label2id)}")
    if not 0 <= number < len(label2id):
        raise DataError(f"{where}: {column} is {value!r}; expected a class from 0 to {len(label2id) - 1}")
    return int(number)


def _score(value: Any, where: str, column: str, _: Any) -> float:
    number = _number(value)
    if number is None:
        raise DataError(f"{where}: {column} is {value!r}; expected a number")
    return number


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a string")
    return value


def _one_or_more(value: Any, where: str, field: str) -> list[str]:
    return _texts(value, where, field) if isinstance(value, list) else [_text(value, where, field)]


def _texts(value: Any, where: str, field: str) -> list[str]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a list of strings")
    return [_text(text, where, field) for text in value]


def _candidates_and_labels(row: Row, shape: Shape, where: str) -> tuple[list[str], list[float]]:
    name = shape.inputs[1]
    candidates, labels = _texts(row[name], where, name), row[shape.label]
    if not isinstance(labels, list) or any(isinstance(label, str) or _number(label) is None for label in labels):
        raise DataError(f"{where}: {shape.label} are {labels!r}; expected a list of numbers")
    if len(candidates) != len(labels):
        raise DataError(f"{where}: {len(candidates)} {name} but {len(labels)} {shape.label}")
    return candidates, labels


def _ranking(query: str, right: Sequence[str], wrong: Sequence[str]) -> Example | None:
    """Build a ranking example; None without a query or a right document. Blank documents are no documents."""
    right, wrong = tuple(filter(str.strip, right)), tuple(filter(str.strip, wrong))
    return Example(query, right, wrong) if query.strip() and right else None


def _read_beir_examples(folder: Path) -> list[Example]:
    """Judged documents are right, the first stage's other documents are listed wrong ones."""
    split = read_beir(folder, "train")
    examples = []
    for query, grades in split.qrels.items():
        right = [document for document, grade in grades.items() if grade > 0 and document in split.corpus]
        wrong = [split.corpus[document] for document in split.run.get(query, ()) if grades.get(document, 0) <= 0]
        example = _ranking(split.queries[query], [split.corpus[document] for document in right], wrong)
        if example is not None:
            given = tuple(float(grades[document]) for document in right if split.corpus[document].strip())
            examples.append(example._replace(grades=given, where=f"{folder}, query {query}"))
    if not examples:
        raise DataError(f"{folder} holds no judged training query")
    return examples


def _check_targets(label: str, task: str, examples: Sequence[Example]) -> None:
    """Refuse labels that nothing can be learned from."""
    targets = {example.target for example in examples}
    if task in ("classification", "similarity") and len(targets) == 1:
        what = "class number" if task == "classification" else "score"
        raise DataError(
            f"{label}: all {len(examples)} examples have the {what} {targets.pop():g}; expected at least two to learn "
            "what tells them apart"
        )
