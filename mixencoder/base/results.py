"""The results of `rank`, for texts and for an index: entries, activation of scores, and document ids."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import as_list
from mixencoder.errors import InputError, NonFiniteError

Activation = Callable[[Tensor], Any]
"""Function of float32 scores; its result, a tensor or anything that numpy reads as numbers, is returned instead."""

E = TypeVar("E")
"""Encoded texts."""


class RankResult(TypedDict):
    """One document in a ranking."""

    corpus_id: int
    """Its position among the ranked documents; with an index, its position in iteration order."""
    score: float
    id: NotRequired[str]
    """Its name, if ids were given; always with an index."""
    text: NotRequired[str]
    """Only with `return_documents`."""
    probability: NotRequired[float]
    """Only with `return_probabilities`."""


def best_first(scores: Tensor, top_k: int | None) -> tuple[Tensor, np.ndarray]:
    """Return each query's top_k scores on the CPU, best first, and their positions, both (B, n); ties to the lower."""
    values = scores.cpu().numpy()
    positions = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    return torch.from_numpy(np.take_along_axis(values, positions, axis=1)), positions


def entries(
    scores: Tensor, positions: np.ndarray, names: Sequence[str] | None, texts: Sequence[str] | None
) -> list[RankResult]:
    """Return the entries of one ranking.

    Args:
        scores: (n,).
        positions: (n,) int, of the documents.
        names, texts: of the documents; None leaves them out.
    """
    ranking = []
    for rank, (position, score) in enumerate(zip(positions.tolist(), scores.tolist(), strict=True)):
        entry = RankResult(corpus_id=position, score=score)
        if texts is not None:
            entry["text"] = texts[rank]
        if names is not None:
            entry["id"] = names[rank]
        ranking.append(entry)
    return ranking


def activated(scores: Tensor, activation_fn: Activation | None) -> Tensor:
    """Return scores (..., n) on the CPU, after the activation if there is one.

    Raises:
        InputError: the activation returned another shape, or no numbers.
    """
    if activation_fn is None:
        return scores.cpu()
    values = as_numbers(activation_fn(scores))
    if values.shape != scores.shape:
        raise InputError(
            f"activation_fn returned the shape {tuple(values.shape)} for scores of the shape {tuple(scores.shape)}; "
            "expected the same shape, as torch.sigmoid returns"
        )
    return values.cpu()


def as_numbers(values: Any) -> Tensor:
    """Return the result of an activation_fn as a tensor.

    Raises:
        InputError: it is neither a tensor nor anything that numpy reads as numbers.
    """
    if isinstance(values, Tensor):
        return values
    try:
        # np.array copies: torch does not accept arrays with negative strides
        return torch.from_numpy(np.array(values, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"activation_fn returned a {type(values).__name__} that holds no numbers ({error}); expected a tensor or "
            "an array"
        ) from error


def document_names(ids: Iterable[str]) -> list[str]:
    """Return ids of documents as a list of strings.

    Raises:
        InputError: ids is a single string, or holds something else than strings.
    """
    if isinstance(ids, str):
        raise InputError(f"ids is the string {ids!r}; expected a list of strings")
    names = as_list(ids, "ids")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"id {number} is {name!r} ({type(name).__name__}); expected a string")
    return names


def check_encoded(encoded: E, what: str, dtype: torch.dtype) -> E:
    """Raise if encoded texts hold NaN or an infinity; otherwise return them.

    Args:
        encoded: a tensor, or a tuple or dataclass of tensors, of any architecture.
        what: for the message, such as "queries".
        dtype: of the model, for the message.

    Raises:
        NonFiniteError: a number is NaN or infinite.
    """
    for tensor in _tensors(encoded):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{int((~torch.isfinite(tensor)).sum()):,} of {tensor.numel():,} numbers of the encoded {what} are not "
                f"finite (dtype {dtype}); float32 or bfloat16 have the range that float16 lacks, and a checkpoint may "
                "be damaged"
            )
    return encoded


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
