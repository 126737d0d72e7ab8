"""What is measured: candidate lists, labelled pairs and scored pairs, recognised by the data's columns."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from mixencoder.beir import beir_files, read_beir
from mixencoder.errors import DataError, InputError
from mixencoder.tables import read_rows, source_name
from mixencoder.training.examples import class_names, read_ranking_rows, read_source, recognise

logger = logging.getLogger(__name__)

EXPECTED = (
    "query, candidates, labels (rankings), two texts and a label or score (pairs), or a folder in BEIR layout with a "
    "first-stage run"
)


@dataclass(frozen=True)
class RankingTask:
    """Queries, the documents that each is to rank, and what is right."""

    kind: ClassVar[str] = "ranking"
    name: str
    source: Path
    files: tuple[Path, ...]
    """What was read."""
    queries: list[str]
    query_ids: list[str]
    """BEIR's, else the number of the row from 0."""
    documents: list[str]
    """All distinct documents of the task."""
    candidates: list[list[int]]
    """For every query, numbers into documents."""
    document_ids: list[list[str]]
    """For every query, its candidates' ids: BEIR's, else the place in the row from 0."""
    qrels: list[dict[str, int]]
    """For every query, document id -> grade; of every judged document, also where it is no candidate."""

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    @property
    def without_right_document(self) -> int:
        """Number of queries for which no judged document is right."""
        return sum(all(grade <= 0 for grade in grades.values()) for grades in self.qrels)


@dataclass(frozen=True, eq=False)
class PairTask:
    """Pairs of texts and what is true of each."""

    kind: str
    """"classification" or "similarity"."""
    name: str
    source: Path
    files: tuple[Path, ...]
    """What was read."""
    pairs: list[tuple[str, str]]
    targets: np.ndarray
    """(n,) float64, class numbers or scores."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)


Task: TypeAlias = RankingTask | PairTask


def read_tasks(
    paths: Sequence[Path],
    *,
    split: str = "test",
    limit: int | None = None,
    sample: int | None = None,
    label2id: dict[str, int] | None = None,
) -> list[Task]:
    """Read several tasks; arguments and errors as in `read_task`.

    Raises:
        DataError: also if two have one name.
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        task = read_task(path, split=split, limit=limit, sample=sample, label2id=label2id)
        if task.name in tasks:
            raise DataError(
                f"{tasks[task.name].source} and {path} are both called {task.name}; expected names that differ"
            )
        tasks[task.name] = task
    return list(tasks.values())


def read_task(
    path: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    sample: int | None = None,
    label2id: dict[str, int] | None = None,
) -> Task:
    """Read a file of candidate lists, labelled or scored pairs, or a BEIR-layout folder with a first-stage run.

    Blank candidates are no documents: they are not ranked, and a right one counts as not found. Queries for which no
    document is right stay in the mean with 0. Both are counted and said once, to this module's logger.

    Args:
        path: file (.jsonl, .csv, .tsv, each also with .gz, or .parquet) or folder.
        split: of a folder.
        limit: use the first so many queries or pairs alone.
        sample: with limit: draw so many with this seed instead.
        label2id: class names of the model's classification head; None if it has none.

    Raises:
        DataError: the data cannot be used, or their labels are not the model's; the message names file and line, what
            was found and what was expected.
        InputError: sample comes without limit.
    """
    if sample is not None and limit is None:
        raise InputError("sample draws queries at random; expected a limit that says how many")
    if path.is_dir():
        return _read_folder(path, split, limit, sample)
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
    raise DataError(
        f"{where}: fields are {', '.join(row)}, which say nothing about wrong documents; expected {EXPECTED}"
    )


def _read_folder(path: Path, split: str, limit: int | None, sample: int | None) -> RankingTask:
    beir = read_beir(path, split)
    judged = list(beir.qrels)
    ids = [judged[number] for number in _chosen(len(judged), limit, sample)]
    for query in ids:
        if query not in beir.queries:
            raise DataError(
                f"{path}: query {query!r} is judged in qrels.{split}.tsv but queries.{split}.jsonl lacks it"
            )
    found = [beir.run.get(query, []) for query in ids]
    texts = [[beir.corpus[document] for document in documents] for documents in found]
    return _ranking_task(
        f"{path.name}.{split}",
        path,
        tuple(beir_files(path, split)),
        [beir.queries[query] for query in ids],
        ids,
        texts,
        found,
        [beir.qrels[query] for query in ids],
    )


def _read_lists(path: Path, limit: int | None, sample: int | None) -> RankingTask:
    places = [where for where, _ in read_rows(path)]
    rows = list(read_ranking_rows(path))
    chosen = _chosen(len(rows), limit, sample)
    qrels = []
    for number in chosen:
        query, _, labels = rows[number]
        if not query.strip():
            raise DataError(f"{places[number]}: the query is blank; expected some text")
        if fractions := [label for label in map(float, labels) if not label.is_integer()]:
            raise DataError(f"{places[number]}: a label is {fractions[0]:g}; expected whole numbers, above 0 if right")
        qrels.append({str(place): int(float(label)) for place, label in enumerate(labels)})
    ids = [list(map(str, range(len(rows[number][1])))) for number in chosen]
    return _ranking_task(
        source_name(path),
        path,
        (path,),
        [rows[number][0] for number in chosen],
        list(map(str, chosen)),
        [rows[number][1] for number in chosen],
        ids,
        qrels,
    )


def _ranking_task(
    name: str,
    source: Path,
    files: tuple[Path, ...],
    queries: list[str],
    query_ids: list[str],
    texts: list[list[str]],
    ids: list[list[str]],
    qrels: list[dict[str, int]],
) -> RankingTask:
    """Number the documents, leave blank ones out, say what is odd.

    texts and ids hold every query's candidates.
    """
    numbers: dict[str, int] = {}
    candidates, document_ids = [], []
    for own_texts, own_ids in zip(texts, ids, strict=True):
        kept = [place for place, text in enumerate(own_texts) if text.strip()]
        candidates.append([numbers.setdefault(own_texts[place], len(numbers)) for place in kept])
        document_ids.append([own_ids[place] for place in kept])
    task = RankingTask(name, source, files, queries, query_ids, list(numbers), candidates, document_ids, qrels)
    without, blank = task.without_right_document, sum(map(len, texts)) - sum(map(len, candidates))
    if without == len(task):
        raise DataError(f"{source}: none of {len(task)} queries has a right document; expected some label above 0")
    if not numbers:
        raise DataError(f"{source}: none of {len(task)} queries has a candidate to rank")
    if without:
        logger.warning("%s: %d of %d queries have no right document; each counts as 0", source, without, len(task))
    if blank:
        logger.warning("%s: %d candidates are blank; they are not ranked, right ones count as not found", source, blank)
    return task


def _check_labels(path: Path, label2id: dict[str, int] | None) -> None:
    """Refuse labels that the model's classification head does not know."""
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
            f"{', '.join(label2id)} (label2id): no place for {', '.join(unknown)}"
        )


def _read_pairs(path: Path, limit: int | None, sample: int | None, label2id: dict[str, int] | None) -> PairTask:
    source = read_source(path, label2id=label2id)
    examples = [source.examples[number] for number in _chosen(len(source.examples), limit, sample)]
    for example in examples:
        if not (example.query.strip() and example.positives[0].strip()):
            raise DataError(f"{example.where}: one of the two texts is blank; expected some text in both")
    targets = np.array([example.target for example in examples], dtype=np.float64)
    if np.ptp(targets) == 0:
        raise DataError(
            f"{path}: all {len(examples)} chosen pairs have one label or score; expected at least two different ones "
            "(a higher limit, or a sample)"
        )
    pairs = [(example.query, example.positives[0]) for example in examples]
    return PairTask(source.task, source.name, path, (path,), pairs, targets)


def _chosen(count: int, limit: int | None, sample: int | None) -> list[int]:
    """Return the numbers of the rows to use, in the order of the data."""
    if limit is None or limit >= count:
        return list(range(count))
    return list(range(limit)) if sample is None else sorted(random.Random(sample).sample(range(count), limit))
