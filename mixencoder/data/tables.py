"""Read rows of named columns from files (JSON lines, CSV, TSV, Parquet), from a `datasets` object, or from any list.

Every row comes with its location for messages, such as "FILE, line 7". docs/files.md describes the formats.
"""

import csv
import itertools
import math
import re
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixencoder.data.jsonlines import check_unicode, parse_json_lines
from mixencoder.data.lines import LONGEST_LINE, read_lines
from mixencoder.errors import DataError, MissingExtraError

Row = dict[str, Any]
Lines = Iterator[tuple[int, str]]

FORMATS = ("jsonl", "csv", "tsv", "parquet")
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')
_QUOTED_ROW = re.compile(rf'(?:{_QUOTED.pattern}|[^"\t]*)(?:\t(?:{_QUOTED.pattern}|[^"\t]*))*')
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_BATCH_ROWS, _SLICE_ROWS = 1024, 64

_field_limit = threading.Lock()
"""Held while csv's field limit, which is global to the process, is changed."""


def read_rows(source: Path | Iterable[Mapping[str, Any]], name: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file or of an iterable of mappings, such as a `datasets.Dataset`.

    Args:
        source: .jsonl, .csv or .tsv, each also with .gz (the latter two with a header line), .parquet; or rows.
        name: name of rows that are not a file, in messages.

    Raises:
        DataError: the file cannot be read, or a row is malformed or holds invalid Unicode; the message names file and
            line.
        MissingExtraError: the file is Parquet and pyarrow is not installed.
    """
    if not isinstance(source, Path):
        yield from _read_mappings(source, name or "rows")
        return
    if not source.exists():
        raise DataError(f"{source} is neither a file nor a folder")
    kind = file_format(source)
    if kind not in FORMATS:
        expected = ", ".join(f".{known}" for known in FORMATS)
        raise DataError(f"{source}: files ending in {_ending(source)!r} are not read; expected {expected}")
    if kind == "parquet":
        yield from read_parquet(source)
    else:
        yield from read_table(source, kind)


def read_table(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a file or a pipe; arguments and errors as in `parse_rows`."""
    # a file is read twice, to save memory; a pipe cannot be
    quotes = kind == "tsv" and path.is_file() and _uses_quotes(read_lines(path))
    yield from parse_rows(read_lines(path), str(path), kind, quotes=quotes if path.is_file() else None)


def parse_rows(lines: Lines, name: str, kind: str, *, quotes: bool | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of the lines of a table.

    Args:
        lines: (number, text).
        name: of the file.
        kind: "jsonl", "csv" or "tsv".
        quotes: whether quotation marks in a .tsv quote fields; None finds out, with all lines in memory.

    Raises:
        DataError: as `read_rows`.
    """
    if kind == "jsonl":
        yield from ((f"{name}, line {number}", row) for number, row in parse_json_lines(lines, name))
    elif kind == "csv":
        yield from _parse_csv(lines, name)
    else:
        if quotes is None:
            held = list(lines)
            lines, quotes = iter(held), _uses_quotes(iter(held))
        yield from _parse_csv(lines, name, "\t") if quotes else _parse_tsv(lines, name)


def file_format(path: Path) -> str:
    """Return a file's format: its last ending before any .gz, in lower case and without the dot."""
    return _ending(path).lower().removeprefix(".")


def source_name(source: Path) -> str:
    """Return a file's name without .gz and the ending of a known format."""
    name = _without_gz(source.name)
    return name[: -len(_ending(source))] if file_format(source) in FORMATS else name


def as_text(value: Any) -> str | None:
    """Return a text as it is, and a number as JSON spells it; None for everything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(value)


def _ending(path: Path) -> str:
    return Path(_without_gz(path.name)).suffix


def _without_gz(name: str) -> str:
    return name[:-3] if name.lower().endswith(".gz") else name


def _read_mappings(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[str, Row]]:
    for number, mapping in enumerate(rows):
        where = f"{name}, row {number}"
        if not isinstance(mapping, Mapping):
            raise DataError(f"{where}: a {type(mapping).__name__}; expected a mapping of columns to values")
        row = dict(mapping)
        check_unicode(row, where)
        yield where, row


def _parse_csv(lines: Lines, name: str, delimiter: str | None = None) -> Iterator[tuple[str, Row]]:
    lines = itertools.dropwhile(lambda numbered: not numbered[1].strip(), lines)
    begin = list(itertools.islice(lines, 2))
    if begin and (named := re.fullmatch(r"sep=(.)", begin[0][1])):
        # the line with which Excel names the separator
        delimiter, skipped = named[1], begin.pop(0)[0]
    else:
        skipped = begin[0][0] - 1 if begin else 0
        delimiter = delimiter or _delimiter([line for _, line in begin], f"{name}, line {skipped + 1}")
    rows = csv.reader((f"{line}\n" for _, line in itertools.chain(begin, lines)), delimiter=delimiter, strict=True)
    header = None
    while True:
        where = f"{name}, line {skipped + rows.line_num + 1}"
        try:
            with _long_fields():
                fields = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{where}: {_csv_reason(error)}") from error
        if fields is None:
            return
        if header is None:
            header = _header(fields, where)
        elif fields:
            yield where, _row(header, fields, where)


def _parse_tsv(lines: Lines, name: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a .tsv in which quotation marks are ordinary characters."""
    header = None
    for number, line in lines:
        if not line:
            continue
        where, fields = f"{name}, line {number}", line.split("\t")
        if header is not None:
            yield where, _row(header, fields, where)
            continue
        header = _header(fields, where)
        if len(header) == 1 and {",", ";"} & set(line):
            warnings.warn(
                f"{where}: one column, {line!r}, as the line holds no tab; if commas or semicolons separate the "
                "columns, the file's name must end in .csv",
                stacklevel=2,
            )


def _uses_quotes(lines: Lines) -> bool:
    """Return whether quotation marks in a .tsv file quote fields; the whole file must be consistent with it.

    Every mark must open or close a whole field, or be doubled inside one, and every row must have as many fields as the
    header. If a field would span lines although every line by itself has the same number of fields, marks do not quote:
    one text may begin with a mark, and a later one end with one.
    """
    raw: list[str] = []
    widths: set[int] = set()

    def keep() -> Iterator[str]:
        for _, line in lines:
            if line:
                raw.append(line)
                widths.add(line.count("\t"))
            yield f"{line}\n"

    rows = csv.reader(keep(), delimiter="\t", strict=True)
    header, quotes, spans = 0, False, False
    while True:
        raw.clear()
        try:
            with _long_fields():
                row = next(rows, None)
        except csv.Error:
            return False
        if row is None:
            return quotes and not (spans and len(widths) == 1)
        header = header or len(row)
        text = "\n".join(raw)
        if (row and len(row) != header) or ('"' in text and _QUOTED_ROW.fullmatch(text) is None):
            return False
        quotes |= '"' in text
        spans |= len(raw) > 1


def _header(fields: list[str], where: str) -> list[str]:
    header = [field.strip() for field in fields]
    if len(set(header)) < len(header):
        raise DataError(f"{where}: columns are {', '.join(header)}; expected unique names")
    return header


def _row(header: Sequence[str], fields: Sequence[str], where: str) -> Row:
    if len(fields) != len(header):
        raise DataError(f"{where}: {_ragged(header, fields)}")
    return dict(zip(header, fields, strict=True))


def _ragged(header: Sequence[str], fields: Sequence[str]) -> str:
    return f"{len(fields)} fields; expected {len(header)} ({', '.join(header)})"


def _delimiter(begin: Sequence[str], where: str) -> str:
    """Return the column separator: the one in the header line outside of quotation marks, else a comma.

    If the header line holds several, the only one that gives the next line the same number of fields.
    """
    header = begin[0] if begin else ""
    bare = _QUOTED.sub("", header)
    found = [separator for separator in _SEPARATORS if separator in bare]
    if len(found) < 2:
        return found[0] if found else ","
    fitting = [one for one in found if len({_count_fields(line, one) for line in begin}) == 1 < len(begin)]
    if len(fitting) == 1:
        return fitting[0]
    raise DataError(
        f"{where}: {' and '.join(_SEPARATORS[one] for one in found)} in the header line; expected one separator of "
        "columns: put names that contain another in quotation marks"
    )


def _count_fields(line: str, delimiter: str) -> int:
    with _long_fields():
        return len(next(csv.reader([line], delimiter=delimiter), []))


@contextmanager
def _long_fields() -> Generator[None]:
    """Let csv read fields as long as a line may be; its own limit is 131,072 characters."""
    with _field_limit:
        before = csv.field_size_limit(LONGEST_LINE)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _csv_reason(error: csv.Error) -> str:
    reason = str(error)
    if "unexpected end of data" in reason:
        return "a quotation mark opens a field that is never closed; expected a closing one (inside a field write two)"
    if "field limit" in reason:
        return f"a field of more than {LONGEST_LINE // 2**20} million characters; is a closing quotation mark missing?"
    return f"{reason}; expected quotation marks only around whole fields, and two for one inside"


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) of a Parquet file, a few rows in memory at a time.

    Raises:
        DataError: the file cannot be read, or two columns have one name.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"Parquet needs the extra: pip install 'mixencoder[parquet]' ({error})") from error
    number = 0
    try:
        # buffered, so that columns are read in parts; texts as dictionaries, so that repeated ones are held once
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            names = file.schema_arrow.names
            _header(names, str(path))
            texts = [field.name for field in file.schema_arrow if pyarrow.types.is_string(field.type)]
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20, read_dictionary=texts) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for start in range(0, batch.num_rows, _SLICE_ROWS):
                    for row in batch.slice(start, _SLICE_ROWS).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
    except DataError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}, after row {number}") from error
