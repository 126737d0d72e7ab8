"""Reading a folder in BEIR layout with a first-stage run beside it: corpus, queries, judgements, candidates.

Files, each also without .gz: ``corpus.jsonl.gz`` (_id, title, text), ``queries.SPLIT.jsonl.gz`` (_id, text),
``qrels.SPLIT.tsv`` (query-id, corpus-id, score), ``bm25_top100.SPLIT.run.gz`` (a TREC run; any name ending in
``.SPLIT.run.gz`` serves).
"""

from dataclasses import dataclass
from pathlib import Path

from mixencoder.errors import DataError
from mixencoder.jsonlines import read_json_lines, read_lines


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
    corpus = {
        _field(row, "_id", path, number): " ".join(
            part for part in (row.get("title", ""), _field(row, "text", path, number)) if part
        )
        for path in [_find(folder, "corpus.jsonl")]
        for number, row in read_json_lines(path)
    }
    queries = {
        _field(row, "_id", path, number): _field(row, "text", path, number)
        for path in [_find(folder, f"queries.{split}.jsonl")]
        for number, row in read_json_lines(path)
    }
    qrels: dict[str, dict[str, int]] = {}
    path = _find(folder, f"qrels.{split}.tsv")
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1 and not fields[-1].lstrip("-").isdigit():
            continue
        if len(fields) != 3 or not fields[2].lstrip("-").isdigit():
            raise DataError(f"{path}, line {number}: {line!r}; expected query-id, corpus-id, integer score, by tabs")
        qrels.setdefault(fields[0], {})[fields[1]] = int(fields[2])
    return BeirSplit(corpus, queries, qrels, _read_run(folder, split, corpus))


def _read_run(folder: Path, split: str, corpus: dict[str, str]) -> dict[str, list[str]]:
    paths = sorted([*folder.glob(f"*.{split}.run.gz"), *folder.glob(f"*.{split}.run")])
    if len(paths) != 1:
        raise DataError(f"{folder} holds {len(paths)} files *.{split}.run[.gz]; expected one first-stage run")
    scored: dict[str, list[tuple[float, str]]] = {}
    for number, line in read_lines(paths[0]):
        fields = line.split()
        if len(fields) != 6:
            raise DataError(
                f"{paths[0]}, line {number}: {len(fields)} fields; expected 6 (qid Q0 docid rank score tag)"
            )
        if fields[2] not in corpus:
            raise DataError(f"{paths[0]}, line {number}: document {fields[2]!r} is not in the corpus")
        scored.setdefault(fields[0], []).append((-float(fields[4]), fields[2]))
    return {query: [document for _, document in sorted(rows)] for query, rows in scored.items()}


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder} holds no {name}.gz and no {name}; expected a folder in BEIR layout")


def _field(row: dict, name: str, path: Path, number: int) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"{path}, line {number}: no text in {name!r}, fields are {', '.join(row)}")
    return row[name]
