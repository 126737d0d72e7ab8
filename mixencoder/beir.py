"""Reading a folder in BEIR layout with a first-stage run beside it: corpus, queries, judgements, candidates.

Files, each also without .gz: ``corpus.jsonl.gz`` (_id, title, text), ``queries.SPLIT.jsonl.gz`` (_id, text),
``qrels.SPLIT.tsv`` (query-id, corpus-id, score), ``bm25_top100.SPLIT.run.gz`` (a TREC run; any name ending in
``.SPLIT.run.gz`` serves).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mixencoder.errors import DataError
from mixencoder.jsonlines import read_json_lines, read_lines


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


def read_beir(folder: Path, split: str) -> BeirSplit:
    """Read a split of a folder in BEIR layout.

    Raises:
        DataError: a file is missing or has a wrong line, or an id is not in the corpus.
    """
    files = beir_files(folder, split)
    corpus = {
        _field(row, "_id", files.corpus, number): " ".join(
            part for part in (row.get("title", ""), _field(row, "text", files.corpus, number)) if part
        )
        for number, row in read_json_lines(files.corpus)
    }
    queries = {
        _field(row, "_id", files.queries, number): _field(row, "text", files.queries, number)
        for number, row in read_json_lines(files.queries)
    }
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(files.qrels):
        fields = line.split("\t")
        if number == 1 and not fields[-1].lstrip("-").isdigit():
            continue
        if len(fields) != 3 or not fields[2].lstrip("-").isdigit():
            raise DataError(
                f"{files.qrels}, line {number}: {line!r}; expected query-id, corpus-id, integer score, by tabs"
            )
        qrels.setdefault(fields[0], {})[fields[1]] = int(fields[2])
    return BeirSplit(corpus, queries, qrels, _read_run(files.run, corpus))


def beir_files(folder: Path, split: str) -> BeirFiles:
    """Return the files of a split.

    Raises:
        DataError: one is missing, or there are several first-stage runs.
    """
    runs = sorted([*folder.glob(f"*.{split}.run.gz"), *folder.glob(f"*.{split}.run")])
    if len(runs) != 1:
        raise DataError(f"{folder} holds {len(runs)} files *.{split}.run[.gz]; expected one first-stage run")
    corpus, queries = _find(folder, "corpus.jsonl"), _find(folder, f"queries.{split}.jsonl")
    return BeirFiles(corpus, queries, _find(folder, f"qrels.{split}.tsv"), runs[0])


def _read_run(path: Path, corpus: dict[str, str]) -> dict[str, list[str]]:
    scored: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise DataError(f"{path}, line {number}: {len(fields)} fields; expected 6 (qid Q0 docid rank score tag)")
        query, document = fields[0], fields[2]
        if document not in corpus:
            raise DataError(f"{path}, line {number}: document {document!r} is not in the corpus")
        if document in scored.setdefault(query, {}):
            raise DataError(f"{path}, line {number}: document {document!r} is listed twice for query {query!r}")
        try:
            scored[query][document] = float(fields[4])
        except ValueError:
            raise DataError(f"{path}, line {number}: score is {fields[4]!r}; expected a number") from None
    return {
        query: sorted(scores, key=lambda document: (-scores[document], document)) for query, scores in scored.items()
    }


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder} holds no {name}.gz and no {name}; expected a folder in BEIR layout")


def _field(row: dict, name: str, path: Path, number: int) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"{path}, line {number}: no text in {name!r}, fields are {', '.join(row)}")
    return row[name]
