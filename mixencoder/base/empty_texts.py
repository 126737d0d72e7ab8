"""Texts in which a tokenizer finds no token, such as blank ones: read as its special tokens alone, or rejected.

Readers of data files have no tokenizer. They collect texts that may hold no token, with where they were found
(`Suspect`); `report_tokenless` then checks them with the tokenizer.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixencoder.errors import DataError, EmptyTextWarning, InputError

ON_EMPTY = ("special", "error")
"""What to do with a text without a token: read it as the tokenizer's special tokens alone, or raise an error."""
_WORD = re.compile(r"\w")


class TokenlessWarning(EmptyTextWarning):
    """An `EmptyTextWarning` about data files; the message also says where the first text was found."""


class Suspect(NamedTuple):
    """A text that may hold no token."""

    where: str
    """File and line, for messages."""
    text: str


def may_be_tokenless(text: str) -> bool:
    """Whether a text holds neither letter nor digit. Only such texts can lack tokens; not all do."""
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
    """Warn once of texts without a token, with their number and where the first one is, or raise an error.

    Args:
        tokenizer: of the model that will read the texts.
        suspects: texts that `may_be_tokenless`.
        on_empty: one of `ON_EMPTY`.
        of: the total that was read, such as "20 candidates", for the message; empty if it was not counted.

    Raises:
        DataError: a text holds no token, and on_empty is "error".
        InputError: on_empty is not one of `ON_EMPTY`.
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
    """Check a value of on_empty.

    Raises:
        InputError: it is not one of `ON_EMPTY`.
    """
    if on_empty not in ON_EMPTY:
        raise InputError(f"on_empty is {on_empty!r}; expected one of {', '.join(ON_EMPTY)}")
