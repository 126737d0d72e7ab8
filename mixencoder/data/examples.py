"""Turn rows into training and evaluation examples, according to their columns (docs/training.md).

Every source is read and checked as a whole before training starts; `mixencoder.training.batches` draws batches.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mixencoder.data.answers import with_known_answers
from mixencoder.data.beir import read_beir
from mixencoder.data.cells import as_class_name, as_number, read_grades, read_text, read_text_or_texts, read_texts
from mixencoder.data.columns import Shape, fields_of, recognise
from mixencoder.data.sources import RANKINGS, TASKS, Example, Source
from mixencoder.data.tables import Row, read_rows, source_name
from mixencoder.errors import DataError, InputError

logger = logging.getLogger(__name__)

Data: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A file, a folder in BEIR layout, or rows."""


def read_source(
    source: Data,
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
        task: one of `TASKS`; None infers it from the data.
        name: name of the source; None takes the file's.

    Raises:
        DataError: the file cannot be read, a line has the wrong shape, a label is out of range, no example is
            usable, or all pairs have the same label. The message names file, line, found and expected fields.
        InputError: the task does not exist.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if isinstance(source, str):
        source = Path(source)
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
        if {task, found} != set(RANKINGS):
            raise DataError(f"{label} holds examples of {found}; expected {task}")
        found = task
    _check_targets(label, found, examples)
    _warn_of_equal_texts(label, found, examples)
    return with_known_answers([Source(name, found, examples, weight)])[0]


def read_ranking_rows(path: Path) -> Iterator[tuple[str, list[str], list[float]]]:
    """Yield (query, candidates, labels) of a file of candidate lists.

    Raises:
        DataError: a line has another shape; the message names file and line.
    """
    shape = None
    for where, row in read_rows(path):
        shape = shape or recognise(row, where)
        if shape.kind != "candidates" or not {*shape.inputs, shape.label} <= set(row):
            raise DataError(f"{where}: fields are {fields_of(row)}; expected query, candidates, labels")
        yield read_text(row[shape.inputs[0]], where, shape.inputs[0]), *_candidates_and_labels(row, shape, where)


def class_names(source: Data) -> set[str]:
    """Return the class names among the labels of a file of labelled pairs; none for other files and numeric labels.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, Path) and source.is_dir():
        return set()
    names, shape = set(), None
    for where, row in read_rows(source):
        shape = shape or recognise(row, where)
        if shape.kind != "labelled" or shape.label.lower() in _SCORE_COLUMNS:
            return set()
        if (name := as_class_name(row.get(shape.label))) is not None:
            names.add(read_text(name, where, shape.label))
    return names


def warn_of_similar_names(names: Iterable[str], what: str) -> None:
    """Warn about class names that differ only in case or spaces, which is rarely intended."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            logger.warning(
                "%s: the classes %s differ only in case or spaces and are learned as %d classes",
                what,
                ", ".join(map(repr, group)),
                len(group),
            )


_SCORE_COLUMNS = ("score", "scores")


def _read_examples(
    source: Path | Iterable[Mapping[str, Any]], name: str, label2id: dict[str, int] | None, task: str | None
) -> tuple[str, list[Example]]:
    examples: list[Example] = []
    label = str(source) if isinstance(source, Path) else name
    shape, found, dropped = None, "ranking", 0
    names: tuple[bool, str] | None = None
    for where, row in read_rows(source, name):
        if shape is None:
            shape = recognise(row, where)
            _warn_of_columns(shape, label)
            if shape.kind == "labelled":
                found = task or _task_of_label(shape.label, row[shape.label], label2id)
        fields = [*shape.inputs, *([shape.label] if shape.label else [])]
        if not set(fields) <= set(row):
            raise DataError(f"{where}: fields are {fields_of(row)}; expected {', '.join(fields)}")
        if found == "classification":
            is_name = as_class_name(row[shape.label]) is not None
            names = names or (is_name, where)
            if is_name != names[0]:
                raise DataError(
                    f"{where}: {shape.label} is {row[shape.label]!r}, but that of {names[1]} is "
                    f"{'a name' if names[0] else 'a number'}; expected names or numbers alone"
                )
        example = _read_example(row, shape, where, found, label2id)
        if example is None:
            dropped += 1
        else:
            examples.append(example._replace(where=where))
    if dropped:
        what = "no right candidate" if shape and shape.kind == "candidates" else "no query or no right document"
        logger.warning("%s: %d of %d rows have %s and are left out", label, dropped, dropped + len(examples), what)
    return found, examples


def _warn_of_columns(shape: Shape, label: str) -> None:
    """Warn about columns that are not read, and about inputs that are found by the order of the columns."""
    if shape.unread:
        hint = "" if shape.label else "; call columns of wrong documents negative, negative_2 and so on"
        unread, inputs = ", ".join(shape.unread), ", ".join(shape.inputs)
        logger.warning("%s: columns %s are not read, only %s%s", label, unread, inputs, hint)
    if shape.identifiers:
        identifiers = fields_of(shape.identifiers)
        logger.warning("%s: columns %s are not read: by their names they hold ids or row numbers", label, identifiers)
    if shape.by_order:
        query, document, *wrong = shape.inputs
        roles = [f"{query} (the query)", f"{document} (the {'document' if shape.label else 'right document'})"]
        roles += [f"{name} (wrong documents)" for name in wrong]
        logger.warning(
            "%s: columns are read by their order, as their names are not known: %s; if that is wrong, call them query, "
            "positive, negative (docs/training.md)",
            label,
            ", ".join(roles),
        )


def _task_of_label(column: str, value: Any, label2id: dict[str, int] | None) -> str:
    """Return a label's task: names are classes; so are integers if the model has classes, except in score columns."""
    if column.lower() in _SCORE_COLUMNS:
        return "similarity"
    number = as_number(value)
    is_class = as_class_name(value) is not None or (label2id is not None and number is not None and number.is_integer())
    return "classification" if is_class else "similarity"


def _read_example(row: Row, shape: Shape, where: str, task: str, label2id: dict[str, int] | None) -> Example | None:
    first, second, *rest = shape.inputs
    query = read_text(row[first], where, first)
    if shape.kind in ("tuple", "lists"):
        is_one = shape.kind == "tuple"
        right = [read_text(row[second], where, second)] if is_one else read_texts(row[second], where, second)
        wrong = [text for name in rest for text in read_text_or_texts(row[name], where, name)]
        return _ranking_example(query, dict.fromkeys(right, 0.0), wrong)
    if shape.kind == "candidates":
        candidates, labels = _candidates_and_labels(row, shape, where)
        grades: dict[str, float] = {}
        for text, label in zip(candidates, labels, strict=True):
            if label > 0:
                grades[text] = max(label, grades.get(text, label))
        return _ranking_example(query, grades, [t for t, label in zip(candidates, labels, strict=True) if label <= 0])
    read_target = _class_number if task == "classification" else _score
    target = read_target(row[shape.label], where, shape.label, label2id)
    return Example(query, (read_text(row[second], where, second),), target=target)


def _class_number(value: Any, where: str, column: str, label2id: dict[str, int] | None) -> int:
    if label2id is None:
        raise DataError(f"{where}: labelled pairs need a classification head, which this model lacks (heads)")
    if isinstance(value, str) and value in label2id:
        return label2id[value]
    name, number = as_class_name(value), as_number(value)
    if name in label2id:
        return label2id[name]
    if number is None or not number.is_integer():
        raise DataError(f"{where}: {column} is {value!r}; expected one of {', '.join(label2id)}")
    if not 0 <= number < len(label2id):
        raise DataError(f"{where}: {column} is {value!r}; expected a class from 0 to {len(label2id) - 1}")
    return int(number)


def _score(value: Any, where: str, column: str, _: Any) -> float:
    number = as_number(value)
    if number is None:
        raise DataError(f"{where}: {column} is {value!r}; expected a number")
    return number


def _candidates_and_labels(row: Row, shape: Shape, where: str) -> tuple[list[str], list[float]]:
    name = shape.inputs[1]
    candidates, labels = read_texts(row[name], where, name), read_grades(row[shape.label], where, shape.label)
    if len(candidates) != len(labels):
        raise DataError(f"{where}: {len(candidates)} {name} but {len(labels)} {shape.label}")
    return candidates, labels


def _ranking_example(query: str, right: Mapping[str, float], wrong: Iterable[str]) -> Example | None:
    """Build a ranking example without blank documents; None if no query or no right document is left.

    Args:
        query: the query.
        right: right documents and their grades; 0 for documents without a grade.
        wrong: wrong documents.
    """
    graded = {text: grade for text, grade in right.items() if text.strip()}
    if not query.strip() or not graded:
        return None
    grades = tuple(graded.values()) if all(graded.values()) else ()
    return Example(query, tuple(graded), tuple(dict.fromkeys(filter(str.strip, wrong))), grades=grades)


def _read_beir_examples(folder: Path) -> list[Example]:
    """Read the train split: documents judged above 0 are right, the first stage's other documents are wrong."""
    split = read_beir(folder, "train")
    examples = []
    for query, grades in split.qrels.items():
        where = f"{folder}, query {query}"
        if query not in split.queries:
            raise DataError(f"{where}: it is judged, but queries.train.jsonl lacks it")
        right: dict[str, float] = {}
        for document, grade in grades.items():
            if grade > 0 and document in split.corpus:
                text = read_text(split.corpus[document], where, f"document {document}")
                right[text] = max(float(grade), right.get(text, 0.0))
        wrong = [
            read_text(split.corpus[document], where, f"document {document}")
            for document in split.run.get(query, ())
            if grades.get(document, 0) <= 0
        ]
        example = _ranking_example(read_text(split.queries[query], where, "query"), right, wrong)
        if example is not None:
            examples.append(example._replace(where=where))
    if not examples:
        raise DataError(f"{folder} holds no judged training query")
    return examples


def _check_targets(label: str, task: str, examples: Sequence[Example]) -> None:
    """Raise if all labels are equal, so that nothing can be learned from them."""
    targets = {example.target for example in examples}
    if task in ("classification", "similarity") and len(targets) == 1:
        what = "class number" if task == "classification" else "score"
        raise DataError(
            f"{label}: all {len(examples)} examples have the {what} {targets.pop():g}; expected at least two "
            "different ones"
        )


def _warn_of_equal_texts(label: str, task: str, examples: Sequence[Example]) -> None:
    """Warn about rankings in which a right document is the query itself: they only teach to copy."""
    if task not in RANKINGS:
        return
    equal = [example for example in examples if example.query.strip() in map(str.strip, example.positives)]
    if equal:
        logger.warning(
            "%s: in %d of %d rows a right document is the query itself; the first: %s",
            label,
            len(equal),
            len(examples),
            equal[0].where,
        )
