"""How many documents of an index are fully scored: the options ``prefilter`` and ``first_stage`` of `rank`."""

from typing import Any

from mixencoder.base.inputs import positive_integer
from mixencoder.errors import InputError

LEAST_KEPT = 100
"""Least number of documents that "auto" fully scores."""
KEPT_PER_RESULT = 10
"""Documents that "auto" fully scores for each one that is returned."""
ROUNDED_TO = 32
"""With "auto", the number of fully scored documents is a multiple of this. Pieces have a power of two of documents, and
smaller ones save little, so the added documents cost almost nothing."""
LEAST_RATIO = 4
"""With "auto", a prefilter is used only with more than this many documents for each one that it keeps."""


def check_prefilter(prefilter: Any) -> int | str | None:
    """Return a valid value of the option: "auto", None, or a positive integer of any kind as an int.

    Raises:
        InputError: the value is something else.
    """
    if prefilter is None or (isinstance(prefilter, str) and prefilter == "auto"):
        return prefilter
    try:
        return positive_integer(prefilter, "prefilter")
    except InputError:
        raise InputError(f'prefilter is {prefilter!r}; expected a positive integer, "auto" or None') from None


def chosen_prefilter(
    prefilter: int | str | None, documents: int, top_k: int | None, *, score: str = "full", has_dual: bool
) -> int | None:
    """Return how many documents to score fully, the best by dual score; None scores all.

    "auto" takes ten documents per result, at least 100: the measured best ten change in few queries then
    (docs/candidate-index.md). The number is rounded up to a multiple of `ROUNDED_TO`. "auto" is None if

    - all documents are wanted (top_k is None);
    - a single term of the score is wanted, or the model has no dual term;
    - there are at most four times as many documents: little time would be saved.

    Args:
        prefilter: a valid value (`check_prefilter`); integers and None are returned unchanged.
        documents: how many are ranked.
        top_k: how many are returned.
        score: as in `MixEncoder.rank`.
        has_dual: whether the model has a dual term.
    """
    if not isinstance(prefilter, str):
        return prefilter
    if top_k is None or score != "full" or not has_dual:
        return None
    wanted = max(LEAST_KEPT, KEPT_PER_RESULT * top_k)
    kept = -(-wanted // ROUNDED_TO) * ROUNDED_TO
    return kept if documents > LEAST_RATIO * kept else None


def check_first_stage(
    first_stage: Any, prefilter: int | str | None, top_k: int | None, *, score: str, has_ids: bool, has_dual: bool
) -> None:
    """Raise if a first stage cannot choose documents in a call of `MixEncoder.rank`.

    Args:
        first_stage: as given.
        prefilter: a valid value (`check_prefilter`).
        top_k, score: as in `MixEncoder.rank`.
        has_ids: whether documents are named.
        has_dual: whether the model has a dual term.

    Raises:
        InputError: it is no first stage, or the other options contradict it.
    """
    if not callable(getattr(first_stage, "search", None)):
        raise InputError(
            f"first_stage is {first_stage!r:.100} ({type(first_stage).__name__}); expected an object with a method "
            "search(vectors, count), such as open_first_stage() returns"
        )
    if not has_dual:
        raise InputError(
            "first_stage searches the vectors of the dual term, but this model has no dual term (dual_term=False)"
        )
    if has_ids:
        raise InputError("ids and first_stage are both given; expected one of them, as each chooses the documents")
    if prefilter is None:
        raise InputError(
            'prefilter is None, which scores all documents; with first_stage expected "auto" or the number of '
            "documents that it chooses"
        )
    if prefilter == "auto" and (top_k is None or score != "full"):
        raise InputError(
            f'prefilter is "auto" with top_k {top_k} and score "{score}", for which it scores all documents; with '
            "first_stage expected a number of documents here, or top_k and the full score"
        )
