"""What a request asks of the model, and what it gets, whatever its dialect; with the checks against the limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mixencoder.explanation.result import PairExplanation
from mixencoder.serving.errors import RequestError, too_large
from mixencoder.serving.settings import Limits

RESULTS_OF_INDEX = 10
"""Results per query when a whole index is ranked and the request does not say how many."""


@dataclass(frozen=True)
class Reading:
    """How texts that are longer than the model reads are treated."""

    keep: str | None = None
    """Which part of a text is kept, "start" or "end"; None leaves it to the model's configuration."""
    refuse: bool = False
    """Answer with an error instead of cutting."""
    document_tokens: int | None = None
    """Read at most this many tokens of a document, special tokens included, and at most what the model reads."""


@dataclass(frozen=True)
class Ranking:
    """Rank candidates for each of some queries.

    Attributes:
        queries: at least one.
        documents: texts; None if the candidates are in the index.
        ids: of candidates in the index; None ranks the whole index if documents is None too.
        paired: score query i with document i only; documents then has as many entries as queries.
        top_k: results per query; None returns all.
        raw_scores: return scores as the model gives them, and not probabilities.
        with_metadata, with_texts: return what the index stores besides the scores.
        reading: see `Reading`.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...] | None = None
    ids: tuple[str, ...] | None = None
    paired: bool = False
    top_k: int | None = None
    raw_scores: bool = False
    with_metadata: bool = True
    with_texts: bool = True
    reading: Reading = field(default_factory=Reading)

    @property
    def uses_index(self) -> bool:
        """Whether the candidates come from the index."""
        return self.documents is None

    @property
    def weight(self) -> int:
        """About how many texts must be encoded or looked up."""
        return len(self.queries) + len(self.documents or self.ids or ())

    def check(self, limits: Limits) -> None:
        """Raise if this exceeds a limit or lacks something.

        Raises:
            RequestError: it does.
        """
        if not self.queries:
            raise RequestError(422, "empty", "there is no query; expected some text")
        if not self.paired and len(self.queries) > limits.queries:
            raise too_large("the request", len(self.queries), limits.queries, "queries")
        for name, values in (("documents", self.documents), ("ids", self.ids)):
            if values is not None and not values:
                raise RequestError(422, "empty", f"{name} is empty; expected at least one candidate to rank")
            if values is not None and len(values) > limits.candidates:
                raise too_large("the request", len(values), limits.candidates, name)
        for role, texts in (("query", self.queries), ("document", self.documents or ()), ("id", self.ids or ())):
            check_characters(role, texts, limits)
        for number, query in enumerate(self.queries):
            if not query.strip():
                raise RequestError(422, "empty", f"query {number} is empty; expected some text")
        if self.top_k is not None and self.uses_index and self.top_k > limits.candidates:
            raise too_large("the request", self.top_k, limits.candidates, "results per query")


def check_characters(role: str, texts: Sequence[str], limits: Limits) -> None:
    """Raise if a text is too long.

    Raises:
        RequestError: one is; the message says which.
    """
    for number, text in enumerate(texts):
        if len(text) > limits.characters:
            raise too_large(f"{role} {number}", len(text), limits.characters, "characters")


@dataclass(frozen=True)
class Explaining:
    """Explain the score of one document for one query.

    Attributes:
        query: its text.
        document: its text; None if it is in the index.
        id: of a candidate in the index; None if the text is given.
    """

    query: str
    document: str | None = None
    id: str | None = None

    @property
    def uses_index(self) -> bool:
        """Whether the document comes from the index."""
        return self.id is not None

    def check(self, limits: Limits) -> None:
        """Raise if this exceeds a limit or lacks something.

        Raises:
            RequestError: it does.
        """
        if (self.document is None) == (self.id is None):
            found = "neither" if self.id is None else "both"
            raise RequestError(422, "validation", f"{found} of document and id are given; expected one of them")
        for role, text in (("query", self.query), ("document", self.document or ""), ("id", self.id or "")):
            check_characters(role, [text], limits)
        if not self.query.strip():
            raise RequestError(422, "empty", "the query is empty; expected some text")


class Explained(NamedTuple):
    """The answer to `Explaining`."""

    explanation: PairExplanation
    probability: float
    """Of the score, as in rankings: calibrated if the model is, else the sigmoid."""


class Hit(NamedTuple):
    """A candidate in a ranking."""

    index: int
    """Its position among the documents or ids of the request, or in the index if the whole index was ranked."""
    score: float
    """A probability, or the model's score if the request wants raw scores."""
    id: str | None = None
    """With an index: its id."""
    text: str | None = None
    """With an index that stores texts: its text."""
    metadata: dict[str, Any] | None = None
    """With an index: the object stored with it."""


class Ranked(NamedTuple):
    """The answer to a `Ranking`."""

    rankings: list[list[Hit]]
    """For each query, best first; with `Ranking.paired` a single list in the order of the pairs."""
    tokens: int
    """Tokens of the queries and documents of the request, special tokens included, as far as the model read them."""
    cut: int
    """Number of texts that lost tokens."""


Task = Callable[[], Any]
"""What else runs in the worker thread, such as a change of the index; its result is the request's."""
