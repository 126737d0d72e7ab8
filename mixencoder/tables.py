"""Rows of named columns from files (JSON lines, CSV, TSV, Parquet), from a `datasets` object, or from any list.

Every row comes with where it stands, for messages: "FILE, line 7".
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixencoder.errors import DataError, MissingExtraError
from mixencoder.jsonlines import read_json_lines, read_lines

Row = dict[str, Any]

_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_rows(source: Path | Iterable[Mapping[str, Any]], name: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file or of an iterable of mappings, such as a `datasets.Dataset`.

    Args:
        source: .jsonl, .csv or .tsv, each also with .gz (the latter two with a header line), .parquet; or rows.
        name: what to call rows that are no file, in messages.

    Raises:
        DataError: the file cannot be read or a row has another form; the message names file and line.
        MissingExtraError: Parquet is read by pyarrow, which is not installed.
    """
    if not isinstance(source, Path):
        yield from _read_mappings(source, name or "rows")
        return
    kind = Path(source.name.removesuffix(".gz")).suffix.lower()
    if not source.is_file():
        raise DataError(f"{source} is neither a file nor a folder")
    if kind in (".csv", ".tsv"):
        yield from _read_separated(source, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        yield from _read_parquet(source)
    elif kind == ".jsonl":
        yield from ((f"{source}, line {number}", row) for number, row in read_json_lines(source))
    else:
        raise DataError(f"{source}: files ending in {kind!r} are not read; expected {', '.join(_SUFFIXES)}")


def source_name(source: Path) -> str:
    """Return a file's name without the endings that say its format."""
    name = source.name.removesuffix(".gz")
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def _read_mappings(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number}: a {type(row).__name__}; expected a mapping of columns to values")
        yield f"{name}, row {number}", dict(row)


def _read_separated(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    rows = csv.reader((f"{line}\n" for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: columns are {', '.join(header)}; expected names that differ")
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields; expected {len(header)} ({', '.join(header)})")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"Parquet needs the extra: pip install 'mixencoder[parquet]' ({error})") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
