"""What `rank` returns, for texts and for an index alike: entries, the activation of their scores, their names."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import as_list
from mixencoder.errors import InputError, NonFiniteError

Activation = Callable[[Tensor], Any]
"""Turns float32 scores into what is returned in their place: a tensor, or anything that numpy reads as numbers."""

E = TypeVar("E")


class RankResult(TypedDict):
    """A document in a ranking."""

    corpus_id: int
    """Its place among the documents ranked; in an index, its place in iteration order."""
    score: float
    id: NotRequired[str]
    """Its name: where names were given, and always with an index."""
    text: NotRequired[str]
    """Where `return_documents` asked for it."""
    probability: NotRequired[float]
    """Where `return_probabilities` asked for it."""


def best_first(scores: Tensor, top_k: int | None) -> tuple[Tensor, np.ndarray]:
    """Return the best scores of each query (B, n), falling, on the CPU, and their places (B, n); ties to the lower."""
    values = scores.cpu().numpy()
    places = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    return torch.from_numpy(np.take_along_axis(values, places, axis=1)), places


def entries(
    scores: Tensor, places: np.ndarray, names: Sequence[str] | None, texts: Sequence[str] | None
) -> list[RankResult]:
    """Return the entries of one ranking.

    Args:
        scores: (n,).
        places: (n,) int, of the documents.
        names, texts: of each entry; None leaves them out.
    """
    ranking = []
    for rank, (place, score) in enumerate(zip(places.tolist(), scores.tolist(), strict=True)):
        entry = RankResult(corpus_id=place, score=score)
        if texts is not None:
            entry["text"] = texts[rank]
        if names is not None:
            entry["id"] = names[rank]
        ranking.append(entry)
    return ranking


def activated(scores: Tensor, activation_fn: Activation | None) -> Tensor:
    """Return scores (..., n) after an activation, which keeps their shape, on the CPU.

    Raises:
        InputError: it returned something else than as many numbers.
    """
    if activation_fn is None:
        return scores.cpu()
    values = as_numbers(activation_fn(scores))
    if values.shape != scores.shape:
        raise InputError(
            f"activation_fn made {tuple(values.shape)} of scores {tuple(scores.shape)}; expected the same shape, such "
            "as torch.sigmoid gives"
        )
    return values.cpu()


def as_numbers(values: Any) -> Tensor:
    """Return what an activation_fn gave as a tensor: a tensor, or anything that numpy reads as numbers.

    Raises:
        InputError: it is neither.
    """
    if isinstance(values, Tensor):
        return values
    try:
        # copied, as torch reads no arrays of negative strides
        return torch.from_numpy(np.array(values, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"activation_fn returned a {type(values).__name__} that holds no numbers ({error}); expected a tensor or "
            "an array"
        ) from error


def document_names(ids: Iterable[str]) -> list[str]:
    """Return names of documents as a list of strings.

    Raises:
        InputError: it is one string, which would be taken for its letters, or holds something else.
    """
    if isinstance(ids, str):
        raise InputError(f"ids is the string {ids!r}; expected a list of strings")
    names = as_list(ids, "ids")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"id {number} is {name!r} ({type(name).__name__}); expected a string")
    return names


def check_encoded(encoded: E, what: str, dtype: torch.dtype) -> E:
    """Return encoded texts, a tensor or a dataclass of tensors, as they are.

    Args:
        encoded: of any architecture.
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
