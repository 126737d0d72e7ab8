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
    """Read all candidates of a file, as `iterate_candidates` does.

    Raises:
        DataError: as `iterate_candidates`, or the file holds no candidate.
    """
    rows = list(iterate_candidates(source, column=column))
    if not rows:
        raise DataError(f"{source} holds no candidate")
    ids = [name for _, name in rows if name is not None]
    return Candidates([text for text, _ in rows], ids or None)


def iterate_candidates(source: str, *, column: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Yield (text, id) of candidates one by one; either all have an id or none has.

    Args:
        source: a file: .txt (a candidate a line, empty lines passed over), .jsonl (`text`, optional `id`), .csv or
            .tsv (with a header line; `column`, or the only one, or "text"; an "id" column is taken along); or "-",
            standard input, a candidate a line.
        column: of a .csv or .tsv file.

    Raises:
        DataError: the file cannot be read, is not UTF-8, lacks a column, a field or an id; the message names file and
            line.
    """
    kind = ".txt" if source == "-" else Path(source).suffix.lower()
    if kind not in (".txt", ".jsonl", ".csv", ".tsv"):
        raise DataError(f"{source}: files ending in {kind!r} are not read; expected .txt, .jsonl, .csv, .tsv or -")
    is_table = kind in (".csv", ".tsv")
    if column is not None and not is_table:
        raise DataError(f"{source}: a column was named ({column!r}), but only .csv and .tsv files have columns")
    if kind == ".txt":
        lines = read_stdin() if source == "-" else read_lines(Path(source))
        yield from ((line, None) for _, line in lines if line.strip())
    else:
        yield from _read_fields(source, column, is_table=is_table)


def read_stdin() -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of standard input.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        yield number, decode(raw, "standard input", number)


def _read_fields(source: str, column: str | None, *, is_table: bool) -> Iterator[tuple[str, str | None]]:
    has_ids = None
    for where, row in read_rows(Path(source)):
        name = column or (next(iter(row)) if is_table and len(row) == 1 else "text")
        if is_table and name not in row:
            raise DataError(f"{source} has no column {name!r}; its columns are {', '.join(row)} (--column)")
        if not isinstance(row.get(name), str):
            raise DataError(f'{where}: no string in "{name}", fields are {", ".join(row) or "none"}')
        found = None if name == "id" else row.get("id")
        has_ids = found is not None if has_ids is None else has_ids
        if has_ids != (found is not None):
            what = 'no "id", but candidates before it have one' if has_ids else 'an "id", but candidates before it none'
            raise DataError(f"{where}: {what}; expected all or none")
        yield row[name], None if found is None else str(found)
