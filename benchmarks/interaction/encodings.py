"""Encodings of queries and documents by a frozen encoder, as `benchmarks.interaction.features` stores them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Queries:
    """Encoded queries, float16, rows of tokens one after the other."""

    mean: Tensor
    """(B, d), mean of the final token vectors."""
    tokens: dict[int, Tensor]
    """Layer (-1 the last, -2) -> (tokens, d), what enters that layer."""
    offsets: Tensor
    """(B + 1,)"""


@dataclass
class Documents:
    """Encoded documents, float16; every form holds the mean of the final token vectors, or several vectors."""

    forms: dict[str, Tensor]
    """Name -> (N, k, d): "mean", "spans-4", "spans-8", "codes-4" (random), "directions-4" (principal directions)."""


@dataclass
class Lists:
    """A source or a development set: queries with lists of documents."""

    queries: Queries
    documents: Documents
    candidates: list[list[int]]
    """For each query documents by number. Of a source: right ones first."""
    grades: list[list[int]]
    mined: Tensor | None = None
    """(B, MINED), the most similar wrong documents of the source, by cosine; sources only."""
    texts: tuple[list[str], list[str]] | None = None
    """The texts of queries and documents, for a teacher."""
