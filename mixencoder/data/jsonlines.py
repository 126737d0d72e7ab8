"""JSON lines: an object a line, with errors that name file and line."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mixencoder.base.texts import unicode_fault
from mixencoder.errors import DataError

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON spells what may be half of a surrogate pair; a line read as UTF-8 holds none in another way."""


def parse_json_lines(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of (line number, line); empty lines are passed over.

    Raises:
        DataError: a line is not one JSON object, or holds what is not valid Unicode; the message names file and line.
    """
    for number, line in lines:
        if line.strip():
            yield number, _parse_object(line, f"{name}, line {number}")


def check_unicode(row: dict[str, Any], where: str) -> None:
    """Refuse a row that holds, at any depth, a text that UTF-8 cannot hold.

    Raises:
        DataError: it does; the message names the place and the field.
    """
    for field, value in row.items():
        # by hand, as a stranger's nesting may be deeper than Python's stack
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
        raise DataError(f"{where}: not JSON that can be read: nested too deep; expected one object a line") from None
    except ValueError as error:
        # of an integer with too many digits Python goes on about its own settings
        reason = str(error).partition("; use sys.")[0]
        raise DataError(f"{where}: not JSON: {reason}; expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object")
    if _HALF_PAIR.search(line):
        check_unicode(row, where)
    return row
