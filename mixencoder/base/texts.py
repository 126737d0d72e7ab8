"""Checks of the characters in a text: valid Unicode for tokenizers, no control characters for terminals."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters except newline and tab, and those that change the direction of the following text."""


def unicode_fault(text: str) -> str | None:
    r"""Return what is wrong with a text that UTF-8 cannot encode, or None.

    JSON may hold half of a surrogate pair (``"\ud83d"``). Python reads it, but tokenizers fail on it.
    """
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        return f"holds half of a surrogate pair ({code} at character {error.start}), which is not valid Unicode"
    return None


def first_unicode_fault(texts: Sequence[str]) -> tuple[int, str] | None:
    """Return the number of the first text that UTF-8 cannot encode, and what is wrong with it, or None."""
    for number, text in enumerate(texts):
        if (fault := unicode_fault(text)) is not None:
            return number, fault
    return None


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: control characters except newline and tab become U+FFFD.

    Otherwise an untrusted text could move the cursor, change colours or rename the window.
    """
    return _CONTROL.sub("\ufffd", text).encode("utf-8", "replace").decode("utf-8")
