"""Read the values of a row as texts, lists of texts or numbers, from the types that files and libraries use."""

import json
import math
import numbers
from decimal import Decimal
from typing import Any

import numpy as np

from mixencoder.base.texts import unicode_fault
from mixencoder.errors import DataError


def as_list(value: Any) -> list[Any] | None:
    """Return a list, tuple, array, or JSON text of a list (as in CSV files) as a list; None for anything else.

    JSON text counts as a list only if it has items and all of them are texts: "[1]" is a text.
    """
    if isinstance(value, str):
        found = _json_list(value)
        return found if found and all(isinstance(item, str) for item in found) else None
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def read_text(value: Any, where: str, field: str) -> str:
    """Return a value that is a text.

    Raises:
        DataError: value is not a string, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a string")
    if (fault := unicode_fault(value)) is not None:
        raise DataError(f"{where}: {field} {fault}")
    return value


def read_texts(value: Any, where: str, field: str) -> list[str]:
    """Return a list of texts.

    Raises:
        DataError: value is not a list of strings.
    """
    found = as_list(value)
    if found is None:
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a list of strings{_json_hint(value)}")
    return [read_text(text, where, field) for text in found]


def read_text_or_texts(value: Any, where: str, field: str) -> list[str]:
    """Return one text or several as a list; an empty cell gives an empty list.

    Raises:
        DataError: value is neither, or a column with a plural name holds a text in brackets that is not a JSON list.
    """
    if _is_missing(value):
        return []
    found = as_list(value)
    if found is None:
        if isinstance(value, str) and field.lower().rstrip("0123456789_").endswith("s") and _json_hint(value):
            raise DataError(f"{where}: {field} is {_short(value)}; expected a list of strings{_json_hint(value)}")
        return [read_text(value, where, field)]
    return [read_text(text, where, field) for text in found if not _is_missing(text)]


def read_grades(value: Any, where: str, field: str) -> list[float]:
    """Return a list of grades; true and false are 1 and 0.

    Raises:
        DataError: value is not a list of finite numbers, or one is too large for float32.
    """
    found = _json_list(value) if isinstance(value, str) else as_list(value)
    grades = None if found is None else [as_grade(item) for item in found]
    if grades is None or None in grades:
        raise DataError(f"{where}: {field} are {_short(value)}; expected a list of numbers in float32's range")
    return [grade for grade in grades if grade is not None]


def as_grade(value: Any) -> float | None:
    """Return a label as a number, true and false as 1 and 0; None if it is not a number or too large for float32."""
    if isinstance(value, bool | np.bool_):
        return float(value)
    number = as_number(value)
    return number if number is not None and abs(number) < _LARGEST else None


def as_number(value: Any) -> float | None:
    """Return a number, also from its text (as in CSV files); None if value is not a number or not finite."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_class_name(value: Any) -> str | None:
    """Return a class name without surrounding whitespace; None for a number or an empty value.

    True and false are names, as in a CSV file.
    """
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if not isinstance(value, str):
        return None
    try:
        # this also excludes "nan", which pandas writes for a missing label
        float(value)
    except ValueError:
        return value.strip() or None
    return None


_LARGEST = 1e38


def _json_list(text: str) -> list[Any] | None:
    if not _looks_like_list(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _looks_like_list(text: str) -> bool:
    text = text.strip()
    return text.startswith("[") and text.endswith("]")


def _json_hint(value: Any) -> str:
    is_list_like = isinstance(value, str) and _looks_like_list(value)
    return ", as valid JSON if the file holds text" if is_list_like else ""


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or NaN, which pandas writes for a missing text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
