"""Texts in which a tokenizer finds no token, such as blank ones: read as its special tokens alone, or refused by place.

Readers note where texts stand that may be such (`Suspect`); whoever has the tokenizer asks it and speaks of the first.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixencoder.errors import DataError, EmptyTextWarning, InputError

ON_EMPTY = ("special", "error")
"""What is done with a text without a token: read as the tokenizer's special tokens alone, or refused."""
_WORD = re.compile(r"\w")


class TokenlessWarning(EmptyTextWarning):
    """The same of data files: the message also holds the place of the first text."""


class Suspect(NamedTuple):
    """A text that may hold no token."""

    where: str
    """For messages."""
    text: str


def may_be_tokenless(text: str) -> bool:
    """Return whether a text holds neither letter nor digit: only such have no token, and not all of them."""
    return _WORD.search(text) is None


def tokenless(tokenizer: Callable[..., Any], texts: Sequence[str]) -> list[int]:
    """Return the numbers of the texts in which a tokenizer finds no token."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [number for number, tokens in enumerate(found) if not tokens]


def report_tokenless(
    tokenizer: Callable[..., Any], suspects: Sequence[Suspect], *, on_empty: str = "special", of: str = ""
) -> None:
    """Warn once of the texts without a token, with their number and the first one's place, or refuse them.

    Args:
        tokenizer: decides.
        suspects: texts that `may_be_tokenless`.
        on_empty: of `ON_EMPTY`.
        of: among what they were counted, such as "20 candidates"; empty where nobody counted.

    Raises:
        DataError: there are some, and on_empty is "error".
        InputError: on_empty is none of `ON_EMPTY`.
    """
    check_on_empty(on_empty)
    numbers = tokenless(tokenizer, [suspect.text for suspect in suspects])
    if not numbers:
        return
    first = suspects[numbers[0]]
    if on_empty == "error":
        raise DataError(
            f"{first.where}: {first.text!r} holds no token; expected some text (on_empty: special reads it as the "
            "tokenizer's special tokens alone)"
        )
    counted = f"{len(numbers):,} of {of}" if of else f"{len(numbers):,} texts"
    warnings.warn(
        f"{counted} hold no token and are read as the tokenizer's special tokens alone; the first: {first.where}",
        TokenlessWarning,
        stacklevel=2,
    )


def check_on_empty(on_empty: str) -> None:
    """Check what is to be done with texts without a token.

    Raises:
        InputError: it is none of `ON_EMPTY`.
    """
    if on_empty not in ON_EMPTY:
        raise InputError(f"on_empty is {on_empty!r}; expected one of {', '.join(ON_EMPTY)}")
