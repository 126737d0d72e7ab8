"""Reading JSON-lines and tab-separated files, plain or gzipped, with errors that name file and line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixencoder.errors import DataError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end); a name ending in .gz is decompressed.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, decode(raw, path, number)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def decode(raw: bytes, path: Path | str, number: int) -> str:
    """Decode one line as UTF-8, a leading byte-order mark and the line end removed.

    Raises:
        DataError: it is not UTF-8; the message names file, line and byte.
    """
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1}); "
            "convert the file, for example with iconv"
        ) from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object); empty lines are passed over.

    Raises:
        DataError: as `read_lines`, or a line is not one JSON object.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_object(line, path, number)


def parse_object(line: str, path: Path | str, number: int) -> dict[str, Any]:
    """Parse a line that must be one JSON object.

    Raises:
        DataError: it is not; the message names file and line.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a JSON {type(row).__name__}; expected an object")
    return row
