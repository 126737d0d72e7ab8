"""Read candidates for the command line: text files, JSON lines, tables, pipes, or standard input."""

import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mixencoder.base.empty_texts import Suspect, may_be_tokenless
from mixencoder.data.lines import read_lines, read_stdin
from mixencoder.data.tables import FORMATS, as_text, file_format, parse_rows, read_parquet, read_table
from mixencoder.errors import DataError, InputError

CANDIDATE_FORMATS = ("txt", *FORMATS)


class Candidates(NamedTuple):
    """Texts in file order, and their ids if the file has any."""

    texts: list[str]
    ids: list[str] | None
    suspects: list[Suspect]
    """Texts that may hold no token."""


class Candidate(NamedTuple):
    """One text of a file."""

    where: str
    """For messages: file and line, and its id if it has one."""
    text: str
    id: str | None


def read_candidates(source: str, *, column: str | None = None, format: str | None = None) -> Candidates:
    """Read all candidates of a file, as `iterate_candidates` does.

    Raises:
        DataError: as `iterate_candidates`, or the file holds no candidate, or two have the same id.
        InputError: as `iterate_candidates`.
    """
    texts, ids, suspects = [], [], []
    seen: dict[str, str] = {}
    for candidate in _iterate(source, column, format):
        texts.append(candidate.text)
        if candidate.id is not None:
            if candidate.id in seen:
                raise DataError(
                    f"{candidate.where}: the id {candidate.id!r} is also that of {seen[candidate.id]}; expected unique "
                    "ids"
                )
            seen[candidate.id] = candidate.where
            ids.append(candidate.id)
        if may_be_tokenless(candidate.text):
            suspects.append(Suspect(candidate.where, candidate.text))
    if not texts:
        raise DataError(f"{_name(source)} holds no candidate")
    return Candidates(texts, ids or None, suspects)


def iterate_candidates(
    source: str, *, column: str | None = None, format: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """Yield (text, id) of candidates one by one; either all have an id or none has.

    Args:
        source: a file, also gzipped: .txt (one candidate a line, empty lines skipped), .jsonl (`text`, optional
            `id`), .csv, .tsv or .parquet (texts from `column`, else the only column, else "text"; ids from a column
            "id", if there is one); or "-", standard input. Standard input and pipes are read as .txt.
        column: column of a table that holds the texts.
        format: one of `CANDIDATE_FORMATS`; None infers it from the file's name.

    Raises:
        DataError: the file cannot be read, is not UTF-8, lacks a column, a field or an id; the message names file and
            line.
        InputError: there is no such format.
    """
    yield from ((candidate.text, candidate.id) for candidate in _iterate(source, column, format))


def _iterate(source: str, column: str | None, format: str | None) -> Iterator[Candidate]:
    kind = _kind(source, format)
    has_columns = kind in ("csv", "tsv", "parquet")
    if column is not None and not has_columns:
        raise DataError(f"{_name(source)}: column {column!r} was given, but a {kind} file has no columns")
    if kind == "txt":
        yield from _read_plain(source, warn_of_json=format is None)
    else:
        yield from _read_fields(source, kind, column, has_columns=has_columns)


def _kind(source: str, format: str | None) -> str:
    if format is not None:
        if format not in CANDIDATE_FORMATS:
            raise InputError(f"format is {format!r}; expected one of {', '.join(CANDIDATE_FORMATS)}")
        return format
    if source == "-":
        return "txt"
    path = Path(source)
    if (kind := file_format(path)) in CANDIDATE_FORMATS:
        return kind
    if path.is_dir():
        raise DataError(f"{source} is a folder; expected a file of candidates")
    if _is_pipe(path):
        return "txt"
    expected = ", ".join(f".{known}" for known in CANDIDATE_FORMATS)
    raise DataError(
        f"{source}: files ending in {path.suffix!r} are not read; expected {expected}, each also with .gz, or - for "
        "standard input; for a file with another ending give its format"
    )


def _is_pipe(path: Path) -> bool:
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def _name(source: str) -> str:
    return "standard input" if source == "-" else source


def _read_plain(source: str, *, warn_of_json: bool) -> Iterator[Candidate]:
    """Yield the lines that are not blank. With warn_of_json, warn at the first that looks like a JSON object."""
    name = _name(source)
    for number, line in read_stdin() if source == "-" else read_lines(Path(source)):
        if warn_of_json and line.startswith("{") and line.rstrip().endswith("}"):
            warnings.warn(
                f"{name}, line {number}: a JSON object is ranked as plain text; format jsonl ranks its text field",
                stacklevel=2,
            )
            warn_of_json = False
        if line.strip():
            yield Candidate(f"{name}, line {number}", line, None)


def _read_fields(source: str, kind: str, column: str | None, *, has_columns: bool) -> Iterator[Candidate]:
    name = _name(source)
    if source == "-":
        if kind == "parquet":
            raise DataError("Parquet is not read from standard input; expected a file")
        rows = parse_rows(read_stdin(), name, kind)
    else:
        rows = read_parquet(Path(source)) if kind == "parquet" else read_table(Path(source), kind)
    has_ids = None
    for where, row in rows:
        field = column or (next(iter(row)) if has_columns and len(row) == 1 else "text")
        if has_columns and field not in row:
            raise DataError(f"{name} has no column {field!r}; its columns are {', '.join(row)} (--column)")
        text = as_text(row.get(field))
        if text is None:
            raise DataError(f'{where}: no string in "{field}", fields are {", ".join(row) or "none"}')
        found = None if field == "id" else row.get("id")
        has_ids = found is not None if has_ids is None else has_ids
        if has_ids != (found is not None):
            what = 'no "id", but candidates before it have one' if has_ids else 'an "id", but candidates before it none'
            raise DataError(f"{where}: {what}; expected all or none")
        own_id = as_text(found)
        if found is not None and own_id is None:
            raise DataError(f'{where}: "id" is a {type(found).__name__}; expected a string or a number')
        yield Candidate(where if own_id is None else f"{where} (id {own_id})", text, own_id)
