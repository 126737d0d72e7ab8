"""Read evaluation tasks: candidate lists, labelled pairs and scored pairs, recognised by their columns."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from mixencoder.base.empty_texts import Suspect, may_be_tokenless
from mixencoder.base.inputs import local_path
from mixencoder.data.beir import beir_files, read_beir
from mixencoder.data.examples import class_names, read_ranking_rows, read_source, recognise
from mixencoder.data.tables import read_rows, source_name
from mixencoder.errors import DataError, InputError

logger = logging.getLogger(__name__)

EXPECTED = (
    "query, candidates, labels, or a query with right and wrong documents (rankings), two texts and a label or score "
    "(pairs), or a folder in BEIR layout with a first-stage run"
)
MOST_GRADE = 10**9
"""ir-measures keeps grades in 32 bits."""


@dataclass(frozen=True)
class RankingTask:
    """Queries, the candidates of each, and the judgements."""

    kind: ClassVar[str] = "ranking"
    name: str
    source: Path
    files: tuple[Path, ...]
    """The files that were read."""
    queries: list[str]
    query_ids: list[str]
    """BEIR's ids, else the row's number from 0."""
    documents: list[str]
    """All distinct documents of the task."""
    candidates: list[list[int]]
    """For every query, indices into documents."""
    document_ids: list[list[str]]
    """For every query, its candidates' ids: BEIR's, else the position in the row's list from 0."""
    qrels: list[dict[str, int]]
    """For every query, document id -> grade of every judged document, also of those that are not candidates."""
    suspects: list[Suspect] = field(default_factory=list)
    """Texts that may hold no token."""

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    @property
    def without_right_document(self) -> int:
        """Number of queries for which no judged document is right."""
        return sum(all(grade <= 0 for grade in grades.values()) for grades in self.qrels)


@dataclass(frozen=True, eq=False)
class PairTask:
    """Pairs of texts, each with its right label or score."""

    kind: str
    """"classification" or "similarity"."""
    name: str
    source: Path
    files: tuple[Path, ...]
    """The files that were read."""
    pairs: list[tuple[str, str]]
    targets: np.ndarray
    """(n,) float64, class numbers or scores."""
    suspects: list[Suspect] = field(default_factory=list)
    """Texts that may hold no token."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)


Task: TypeAlias = RankingTask | PairTask


def read_tasks(
    paths: Sequence[Path | str],
    *,
    split: str = "test",
    limit: int | None = None,
    sample: int | None = None,
    label2id: dict[str, int] | None = None,
) -> list[Task]:
    """Read several tasks; arguments and errors as in `read_task`.

    Raises:
        DataError: also if two tasks have the same name.
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        task = read_task(path, split=split, limit=limit, sample=sample, label2id=label2id)
        if task.name in tasks:
            raise DataError(f"{tasks[task.name].source} and {path} are both called {task.name}; expected unique names")
        tasks[task.name] = task
    return list(tasks.values())


def read_task(
    path: Path | str,
    *,
    split: str = "test",
    limit: int | None = None,
    sample: int | None = None,
    label2id: dict[str, int] | None = None,
) -> Task:
    """Read a file of candidate lists, labelled or scored pairs, or a BEIR-layout folder with a first-stage run.

    Rows of a query with right and wrong documents, in any form that training reads, count as candidate lists. Queries
    without a right document stay in the mean and count as 0. This module's logger warns about them, about queries
    without candidates, and about queries whose candidates are all right.

    Args:
        path: file (.jsonl, .csv, .tsv, each also with .gz, or .parquet) or folder; a leading ``~`` is the home folder.
        split: split of a folder.
        limit: use only this many queries or pairs, the first ones.
        sample: with limit: draw them at random with this seed instead.
        label2id: class names of the model's classification head; None if it has none.

    Raises:
        DataError: the data cannot be used or change while they are read, or the model lacks their labels; the message
            names file and line, what was found and what was expected.
        InputError: sample is given without limit.
    """
    if sample is not None and limit is None:
        raise InputError("sample was given without limit; expected a limit: the number of queries or pairs to draw")
    path = local_path(path)
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise DataError(f"{path} is a pipe or a device; expected a regular file, as it is read several times")
    before = _state(path)
    task = _read_folder(path, split, limit, sample) if path.is_dir() else _read_file(path, limit, sample, label2id)
    if _state(path) != before:
        raise DataError(f"{path} changed while it was read; expected a file that is not being written")
    return task


def _state(path: Path) -> tuple[int, int] | None:
    """Return a file's size and time of change, to notice writing; None for folders."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _read_file(path: Path, limit: int | None, sample: int | None, label2id: dict[str, int] | None) -> Task:
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise DataError(f"{path} holds no row; expected {EXPECTED}")
    where, row = first
    shape = recognise(row, where)
    if shape.kind == "candidates":
        return _read_lists(path, limit, sample)
    if shape.kind == "labelled":
        if shape.label in ("label", "labels"):
            _check_labels(path, label2id)
        return _read_pairs(path, limit, sample, label2id)
    if len(shape.inputs) == 2:
        raise DataError(f"{where}: fields are {', '.join(row)}, without wrong documents; expected {EXPECTED}")
    return _read_right_and_wrong(path, limit, sample)


def _read_folder(path: Path, split: str, limit: int | None, sample: int | None) -> RankingTask:
    beir = read_beir(path, split)
    files = beir_files(path, split)
    judged = list(beir.qrels)
    ids = [judged[number] for number in _chosen(len(judged), limit, sample)]
    for query in ids:
        if query not in beir.queries:
            raise DataError(
                f"{path}: query {query!r} is judged in {files.qrels.name} but {files.queries.name} lacks it"
            )
    found = [beir.run.get(query, []) for query in ids]
    empty = {document: None for documents in found for document in documents if document in beir.suspect_documents}
    suspects = [Suspect(beir.suspect_documents[document], beir.corpus[document]) for document in empty]
    suspects += [
        Suspect(beir.suspect_queries[query], beir.queries[query]) for query in ids if query in beir.suspect_queries
    ]
    return _ranking_task(
        f"{path.name}.{split}",
        path,
        tuple(files),
        [beir.queries[query] for query in ids],
        ids,
        [[beir.corpus[document] for document in documents] for documents in found],
        found,
        [beir.qrels[query] for query in ids],
        suspects,
    )


def _read_lists(path: Path, limit: int | None, sample: int | None) -> RankingTask:
    rows = [(where, *row) for (where, _), row in zip(read_rows(path), read_ranking_rows(path), strict=True)]
    chosen = _chosen(len(rows), limit, sample)
    qrels, suspects = [], []
    for number in chosen:
        where, query, candidates, labels = rows[number]
        if fractions := [label for label in map(float, labels) if not label.is_integer()]:
            raise DataError(f"{where}: a label is {fractions[0]:g}; expected integers, above 0 for right documents")
        if huge := [label for label in labels if abs(label) > MOST_GRADE]:
            raise DataError(f"{where}: a label is {huge[0]:g}; expected grades up to {MOST_GRADE:,}")
        qrels.append({str(position): int(float(label)) for position, label in enumerate(labels)})
        suspects += _suspects(where, query, candidates)
    return _ranking_task(
        source_name(path),
        path,
        (path,),
        [rows[number][1] for number in chosen],
        list(map(str, chosen)),
        [rows[number][2] for number in chosen],
        [list(map(str, range(len(rows[number][2])))) for number in chosen],
        qrels,
        suspects,
    )


def _read_right_and_wrong(path: Path, limit: int | None, sample: int | None) -> RankingTask:
    """Read rows of a query, right documents and wrong ones as training does: right ones first, graded 1."""
    examples = read_source(path).examples
    chosen = _chosen(len(examples), limit, sample)
    kept = [examples[number] for number in chosen]
    texts = [[*example.positives, *example.negatives] for example in kept]
    return _ranking_task(
        source_name(path),
        path,
        (path,),
        [example.query for example in kept],
        list(map(str, chosen)),
        texts,
        [list(map(str, range(len(own)))) for own in texts],
        [
            {str(position): int(position < len(example.positives)) for position in range(len(own))}
            for example, own in zip(kept, texts, strict=True)
        ],
        [
            suspect
            for example, own in zip(kept, texts, strict=True)
            for suspect in _suspects(example.where, example.query, own)
        ],
    )


def _suspects(where: str, query: str, candidates: Sequence[str]) -> list[Suspect]:
    """Return the texts of a row that may hold no token, each with its location."""
    found = [Suspect(f"{where}, the query", query)] if may_be_tokenless(query) else []
    return found + [
        Suspect(f"{where}, candidate {position}", text)
        for position, text in enumerate(candidates)
        if may_be_tokenless(text)
    ]


def _ranking_task(
    name: str,
    source: Path,
    files: tuple[Path, ...],
    queries: list[str],
    query_ids: list[str],
    texts: list[list[str]],
    document_ids: list[list[str]],
    qrels: list[dict[str, int]],
    suspects: list[Suspect],
) -> RankingTask:
    """Number the distinct documents and warn about unusual queries; texts and document_ids are of the candidates."""
    numbers: dict[str, int] = {}
    candidates = [[numbers.setdefault(text, len(numbers)) for text in own] for own in texts]
    task = RankingTask(
        name, source, files, queries, query_ids, list(numbers), candidates, document_ids, qrels, suspects
    )
    without, count = task.without_right_document, len(task)
    if without == count:
        raise DataError(f"{source}: none of {count} queries has a right document; expected some label above 0")
    if not numbers:
        raise DataError(f"{source}: none of {count} queries has a candidate to rank")
    if without:
        logger.warning("%s: %d of %d queries have no right document; each counts as 0", source, without, count)
    if empty := sum(not own for own in texts):
        logger.warning("%s: %d of %d queries have no candidate; each counts as 0", source, empty, count)
    all_right = sum(
        bool(own) and all(grades.get(document, 0) > 0 for document in own)
        for own, grades in zip(document_ids, qrels, strict=True)
    )
    if all_right:
        logger.warning(
            "%s: %d of %d queries have only right candidates, so every order scores the same",
            source,
            all_right,
            count,
        )
    return task


def _check_labels(path: Path, label2id: dict[str, int] | None) -> None:
    """Raise if the model's classification head lacks a label."""
    names = class_names(path)
    if not names:
        return
    if label2id is None:
        raise DataError(
            f"{path} holds pairs labelled {', '.join(sorted(names))}, but the model has no classification head "
            "(its configuration's heads); expected a model trained on such labels"
        )
    if unknown := sorted(names - set(label2id)):
        raise DataError(
            f"{path} has labels {', '.join(sorted(names))}, but the model's classification head has "
            f"{', '.join(label2id)} (label2id): {', '.join(unknown)} unknown"
        )


def _read_pairs(path: Path, limit: int | None, sample: int | None, label2id: dict[str, int] | None) -> PairTask:
    source = read_source(path, label2id=label2id)
    examples = [source.examples[number] for number in _chosen(len(source.examples), limit, sample)]
    targets = np.array([example.target for example in examples], dtype=np.float64)
    if np.ptp(targets) == 0:
        raise DataError(
            f"{path}: all {len(examples)} chosen pairs have the same label or score; expected at least two different "
            "ones (a higher limit, or a sample)"
        )
    pairs = [(example.query, example.positives[0]) for example in examples]
    suspects = [
        Suspect(f"{example.where}, text {number}", text)
        for example, texts in zip(examples, pairs, strict=True)
        for number, text in enumerate(texts, start=1)
        if may_be_tokenless(text)
    ]
    return PairTask(source.task, source.name, path, (path,), pairs, targets, suspects)


def _chosen(count: int, limit: int | None, sample: int | None) -> list[int]:
    """Return the numbers of the rows to use, in the order of the data."""
    if limit is None or limit >= count:
        return list(range(count))
    return list(range(limit)) if sample is None else sorted(random.Random(sample).sample(range(count), limit))
