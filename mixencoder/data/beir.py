"""Read a folder in BEIR layout that also holds a first-stage run: corpus, queries, judgements, candidates.

Files, each also with or without .gz: ``corpus.jsonl`` (_id, title, text), ``queries.SPLIT.jsonl`` or ``queries.jsonl``
(_id, text), ``qrels.SPLIT.tsv`` or ``qrels/SPLIT.tsv`` (query-id, corpus-id, score; or TREC's four columns),
``NAME.SPLIT.run`` (a TREC run, which BEIR's own folders lack). docs/files.md describes them.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mixencoder.base.empty_texts import may_be_tokenless
from mixencoder.data.jsonlines import parse_json_lines
from mixencoder.data.lines import read_lines
from mixencoder.data.tables import as_text
from mixencoder.errors import DataError

logger = logging.getLogger(__name__)

_GRADE = re.compile(r"([+-]?[0-9]{1,9})(?:\.0*)?")


class BeirFiles(NamedTuple):
    """The files of one split."""

    corpus: Path
    queries: Path
    qrels: Path
    run: Path


@dataclass(frozen=True)
class BeirSplit:
    """One split of a BEIR-layout folder."""

    corpus: dict[str, str]
    """Document id -> title and text, joined by a space."""
    queries: dict[str, str]
    """Query id -> text."""
    qrels: dict[str, dict[str, int]]
    """Query id -> document id -> grade."""
    run: dict[str, list[str]]
    """Query id -> document ids of the first stage, best first."""
    suspect_documents: dict[str, str] = field(default_factory=dict)
    """Document id -> file and line, for documents that may hold no token."""
    suspect_queries: dict[str, str] = field(default_factory=dict)
    """The same for queries."""


class _Line(NamedTuple):
    """One line of judgements or of a run: a pair and its value."""

    number: int
    query: str
    document: str
    value: float


def read_beir(folder: Path, split: str) -> BeirSplit:
    """Read a split of a folder in BEIR layout.

    Warns about judged documents that the corpus lacks, and about queries of the run that have no judgement.

    Raises:
        DataError: a file is missing or has a malformed line, two lines contradict each other, or the run names a
            document that is not in the corpus.
    """
    files = beir_files(folder, split)
    corpus, suspect_documents = _read_texts(files.corpus, with_titles=True)
    queries, suspect_queries = _read_texts(files.queries)
    qrels = {
        query: {document: int(grade) for document, grade in grades.items()}
        for query, grades in _collect(files.qrels, _judgements, may_repeat=True).items()
    }
    scored = _collect(files.run, _run_lines, may_repeat=False)
    if any(document not in corpus for scores in scored.values() for document in scores):
        line = next(line for line in _run_lines(files.run) if line.document not in corpus)
        raise DataError(f"{files.run}, line {line.number}: document {line.document!r} is not in the corpus")
    judged = [document for grades in qrels.values() for document in grades]
    if absent := sum(document not in corpus for document in judged):
        logger.warning(
            "%s: %d of %d judgements are of documents that %s lacks; they count as not found",
            files.qrels,
            absent,
            len(judged),
            files.corpus.name,
        )
    if unjudged := sum(query not in qrels for query in scored):
        logger.warning("%s: %d of %d queries have no judgement and are not used", files.run, unjudged, len(scored))
    run = {
        query: sorted(scores, key=lambda document: (-scores[document], document)) for query, scores in scored.items()
    }
    return BeirSplit(corpus, queries, qrels, run, suspect_documents, suspect_queries)


def beir_files(folder: Path, split: str) -> BeirFiles:
    """Return the files of a split.

    Raises:
        DataError: one is missing, or there are several first-stage runs.
    """
    corpus = _find(folder, "corpus.jsonl")
    queries = _find(folder, f"queries.{split}.jsonl", "queries.jsonl")
    qrels = _find(folder, f"qrels.{split}.tsv", f"qrels/{split}.tsv")
    runs = sorted([*folder.glob(f"*.{split}.run.gz"), *folder.glob(f"*.{split}.run")])
    if not runs:
        raise DataError(
            f"{folder} holds no *.{split}.run[.gz]: the documents to rank come from a first-stage run, which BEIR's "
            "own folders lack; expected a TREC run with lines `qid Q0 docid rank score tag`, such as BM25's best 100 "
            "documents of every query (docs/files.md shows how to make one)"
        )
    if len(runs) > 1:
        names = ", ".join(path.name for path in runs)
        raise DataError(f"{folder} holds {len(runs)} files *.{split}.run[.gz], {names}; expected one first-stage run")
    return BeirFiles(corpus, queries, qrels, runs[0])


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    expected = " and no ".join(f"{name}[.gz]" for name in names)
    raise DataError(f"{folder} holds no {expected}; expected a folder in BEIR layout")


def _read_texts(path: Path, *, with_titles: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Return {id: text}, and {id: file and line} of the texts that may hold no token."""
    texts: dict[str, str] = {}
    suspects: dict[str, str] = {}
    for number, row in parse_json_lines(read_lines(path), str(path)):
        name, text = (_text(row, key, path, number) for key in ("_id", "text"))
        if with_titles:
            title = "" if row.get("title") is None else _text(row, "title", path, number)
            text = " ".join(filter(None, (title, text)))
        if texts.setdefault(name, text) != text:
            rows = parse_json_lines(read_lines(path), str(path))
            first = next(earlier for earlier, other in rows if as_text(other["_id"]) == name)
            raise DataError(
                f"{path}, line {number}: _id {name!r} has another text than in line {first}; expected unique ids"
            )
        if may_be_tokenless(text):
            suspects.setdefault(name, f"{path}, line {number} (_id {name})")
    return texts, suspects


def _text(row: dict, key: str, path: Path, number: int) -> str:
    text = as_text(row.get(key))
    if text is None:
        raise DataError(f"{path}, line {number}: no text in {key!r}, fields are {', '.join(row)}")
    return text


def _collect(path: Path, read: Callable[[Path], Iterator[_Line]], *, may_repeat: bool) -> dict[str, dict[str, float]]:
    """Return {query: {document: value}}. Raises if a pair comes twice; with may_repeat only if the values differ."""
    found: dict[str, dict[str, float]] = {}
    for line in read(path):
        values = found.setdefault(line.query, {})
        if line.document in values and not (may_repeat and values[line.document] == line.value):
            first = next(other for other in read(path) if (other.query, other.document) == (line.query, line.document))
            raise DataError(
                f"{path}, line {line.number}: document {line.document!r} is listed twice for query {line.query!r}, "
                f"with {first.value:g} in line {first.number} and {line.value:g} here; expected one line"
            )
        values[line.document] = line.value
    return found


def _judgements(path: Path) -> Iterator[_Line]:
    """Yield a file's judgements, without a header line: three columns (BEIR) or four (TREC), by tabs or spaces."""
    is_first = True
    for number, line in read_lines(path):
        fields = _fields(line, (3, 4))
        if not fields:
            continue
        # a last field with a digit is a grade, though maybe a malformed one
        is_header = is_first and not any(map(str.isdigit, fields[-1]))
        is_first = False
        if is_header:
            continue
        grade = _GRADE.fullmatch(fields[-1])
        if len(fields) not in (3, 4) or grade is None:
            raise DataError(
                f"{path}, line {number}: {line!r}; expected query-id, corpus-id, integer score, or TREC's qid 0 "
                "docid grade, separated by tabs or spaces"
            )
        yield _Line(number, fields[0], fields[-2], int(grade[1]))


def _run_lines(path: Path) -> Iterator[_Line]:
    """Yield a run's lines. As in trec_eval, the scores give the order, and the rank column is ignored."""
    for number, line in read_lines(path):
        fields = _fields(line, (6,))
        if not fields:
            continue
        if len(fields) != 6:
            raise DataError(f"{path}, line {number}: {len(fields)} fields; expected 6 (qid Q0 docid rank score tag)")
        try:
            score = float(fields[4])
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{path}, line {number}: score is {fields[4]!r}; expected a number")
        yield _Line(number, fields[0], fields[2], score)


def _fields(line: str, counts: tuple[int, ...]) -> list[str]:
    """Split a line at tabs if that gives one of `counts` fields (ids may hold spaces), else at whitespace."""
    by_tabs = [part.strip() for part in line.strip().split("\t")]
    return by_tabs if len(by_tabs) in counts and all(by_tabs) else line.split()
