"""Reading candidate files for the command line: .txt, .jsonl, .csv, .tsv, or standard input."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixencoder.errors import DataError
from mixencoder.jsonlines import decode, read_lines
from mixencoder.tables import read_rows


class Candidates(NamedTuple):
    """Texts in file order, and their ids where the file has any."""

    texts: list[str]
    ids: list[str] | None


def read_candidates(source: str, *, column: str | None = None) -> Candidates:
    """Read candidates.

    Args:
        source: a file: .txt (a candidate a line, empty lines passed over), .jsonl (`text`, optional `id`), .csv or
            .tsv (with a header line; `column`, or the only one, or "text"; an "id" column is taken along); or "-",
            standard input, a candidate a line.
        column: of a .csv or .tsv file.

    Raises:
        DataError: the file cannot be read, is not UTF-8, lacks a column or a field, or holds no candidate; the message
            names file and line.
    """
    kind = ".txt" if source == "-" else Path(source).suffix.lower()
    if kind not in (".txt", ".jsonl", ".csv", ".tsv"):
        raise DataError(f"{source}: files ending in {kind!r} are not read; expected .txt, .jsonl, .csv, .tsv or -")
    is_table = kind in (".csv", ".tsv")
    if column is not None and not is_table:
        raise DataError(f"{source}: a column was named ({column!r}), but only .csv and .tsv files have columns")
    if kind == ".txt":
        lines = _read_stdin() if source == "-" else read_lines(Path(source))
        candidates = Candidates([line for _, line in lines if line.strip()], None)
    else:
        candidates = _read_fields(source, column, is_table=is_table)
    if not candidates.texts:
        raise DataError(f"{source} holds no candidate")
    return candidates


def _read_stdin() -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        yield number, decode(raw, "standard input", number)


def _read_fields(source: str, column: str | None, *, is_table: bool) -> Candidates:
    texts, ids = [], []
    for where, row in read_rows(Path(source)):
        name = column or (next(iter(row)) if is_table and len(row) == 1 else "text")
        if is_table and name not in row:
            raise DataError(f"{source} has no column {name!r}; its columns are {', '.join(row)} (--column)")
        if not isinstance(row.get(name), str):
            raise DataError(f'{where}: no string in "{name}", fields are {", ".join(row) or "none"}')
        texts.append(row[name])
        ids.append(None if name == "id" else row.get("id"))
    return _with_ids(texts, ids, source)


def _with_ids(texts: list[str], ids: list[str | None], source: str) -> Candidates:
    if all(name is None for name in ids):
        return Candidates(texts, None)
    if any(name is None for name in ids):
        raise DataError(f'{source}: {ids.count(None)} of {len(ids)} candidates have no "id"; expected all or none')
    return Candidates(texts, [str(name) for name in ids])
