"""Reading candidate files for the command line: .txt, .jsonl, .csv, .tsv, or standard input."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixencoder.errors import DataError
from mixencoder.jsonlines import decode, parse_object, read_lines


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
    path = Path(source)
    kind = ".txt" if source == "-" else path.suffix.lower()
    readers = {".txt": _read_text, ".jsonl": _read_json, ".csv": _read_table, ".tsv": _read_table}
    if kind not in readers:
        raise DataError(f"{source}: files ending in {kind!r} are not read; expected .txt, .jsonl, .csv, .tsv or -")
    if column is not None and readers[kind] is not _read_table:
        raise DataError(f"{source}: a column was named ({column!r}), but only .csv and .tsv files have columns")
    lines = _read_stdin() if source == "-" else read_lines(path)
    candidates = readers[kind](lines, source, column)
    if not candidates.texts:
        raise DataError(f"{source} holds no candidate")
    return candidates


def _read_stdin() -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        yield number, decode(raw, "standard input", number)


def _read_text(lines: Iterator[tuple[int, str]], source: str, column: str | None) -> Candidates:
    return Candidates([line for _, line in lines if line.strip()], None)


def _read_json(lines: Iterator[tuple[int, str]], source: str, column: str | None) -> Candidates:
    texts, ids = [], []
    for number, line in lines:
        if not line.strip():
            continue
        row = parse_object(line, source, number)
        if not isinstance(row.get("text"), str):
            raise DataError(f'{source}, line {number}: no string in "text", fields are {", ".join(row) or "none"}')
        texts.append(row["text"])
        ids.append(row.get("id"))
    return _with_ids(texts, ids, source)


def _read_table(lines: Iterator[tuple[int, str]], source: str, column: str | None) -> Candidates:
    delimiter = "\t" if source.lower().endswith(".tsv") else ","
    rows = csv.reader((f"{line}\n" for _, line in lines), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        texts, ids = [], []
        name = column or (header[0] if len(header) == 1 else "text")
        if name not in header:
            raise DataError(
                f"{source} has no column {name!r}; its columns are {', '.join(header) or 'none'} (--column)"
            )
        place = header.index(name)
        id_place = header.index("id") if "id" in header and name != "id" else None
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{source}, line {rows.line_num}: {len(row)} fields; expected {len(header)}")
            texts.append(row[place])
            ids.append(None if id_place is None else row[id_place])
    except csv.Error as error:
        raise DataError(f"{source}, line {rows.line_num}: {error}") from error
    return _with_ids(texts, ids, source)


def _with_ids(texts: list[str], ids: list[str | None], source: str) -> Candidates:
    if all(name is None for name in ids):
        return Candidates(texts, None)
    if any(name is None for name in ids):
        raise DataError(f'{source}: {ids.count(None)} of {len(ids)} candidates have no "id"; expected all or none')
    return Candidates(texts, [str(name) for name in ids])
