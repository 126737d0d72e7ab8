"""Read JSON lines, one object a line; errors name file and line."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mixencoder.base.texts import unicode_fault
from mixencoder.errors import DataError

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""JSON's escape of what may be half of a surrogate pair. A line of valid UTF-8 can hold halves only as escapes."""


def parse_json_lines(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each (line number, line); empty lines are skipped.

    Raises:
        DataError: a line is not one JSON object, or holds invalid Unicode; the message names file and line.
    """
    for number, line in lines:
        if line.strip():
            yield number, _parse_object(line, f"{name}, line {number}")


def check_unicode(row: dict[str, Any], where: str) -> None:
    """Raise if a row holds, at any depth, a text that UTF-8 cannot encode.

    Raises:
        DataError: it does; the message names the row and the field.
    """
    for field, value in row.items():
        # without recursion, as values may nest deeper than Python's stack
        waiting = [field, value]
        while waiting:
            found = waiting.pop()
            if isinstance(found, str) and (fault := unicode_fault(found)) is not None:
                raise DataError(f"{where}: {field!r} {fault}; correct it, or write U+FFFD in its place")
            if isinstance(found, list):
                waiting += found
            elif isinstance(found, dict):
                waiting += [*found, *found.values()]


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deep to be read; expected one object a line") from None
    except ValueError as error:
        # for an integer with too many digits, Python adds advice about its own settings
        reason = str(error).partition("; use sys.")[0]
        raise DataError(f"{where}: not JSON: {reason}; expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object")
    if _HALF_PAIR.search(line):
        check_unicode(row, where)
    return row
