"""`PairExplanation`: the result of `MixEncoder.explain`, arrays with the tokens that they are about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Token(NamedTuple):
    """A token that the model reads, and where it is in its text."""

    text: str
    """As the tokenizer's vocabulary has it."""
    start: int | None
    """Its characters in the text are ``text[start:end]``; None for special tokens, and if the tokenizer cannot tell."""
    end: int | None
    word: int | None
    """The number of the word that it is part of; None for special tokens."""


class WordWeight(NamedTuple):
    """A word of a text and its weight."""

    text: str
    start: int | None
    """As in `Token`."""
    end: int | None
    weight: float


@dataclass(frozen=True, eq=False, repr=False)
class PairExplanation:
    """How a MixEncoder scores one document for one query.

    Sizes: m and n tokens read of the query and of the document, special tokens included; k context embeddings of the
    document; J interaction layers with H attention heads each. Every row of an array (its last dimension) sums to 1.

    Attributes:
        query, document: the texts.
        query_tokens, document_tokens: the m and n tokens; of a text that is too long, those that were read.
        layers: the backbone layer that each of the J interaction layers reads.
        context_attention: (J, H, k, m + k) float32, how much each context embedding attends to the m query tokens,
            then to the document's k context embeddings. None for a model without context update.
        state_attention: (J, H, m) float32, how much the state attends to the query tokens. None for a model without
            state row.
        pooling: (k, n) float32, how much of each document token is in each context embedding; the same for all queries.
        score: the ranking score, as `MixEncoder.predict` returns it.
        interaction: its term ``h . e``.
        dual: its dual term; None for a model without one.
        probability: the calibrated probability; None for a model without calibration.
    """

    query: str
    document: str
    query_tokens: tuple[Token, ...]
    document_tokens: tuple[Token, ...]
    layers: tuple[int, ...]
    context_attention: np.ndarray | None
    state_attention: np.ndarray | None
    pooling: np.ndarray
    score: float
    interaction: float
    dual: float | None
    probability: float | None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def summary(self) -> str:
        """Return the score, its terms and the probability in one line."""
        line = f"score {self.score:.2f}"
        if self.dual is not None:
            line += f" = interaction {self.interaction:.2f} + dual term {self.dual:.2f}"
        return line + ("" if self.probability is None else f"; probability {self.probability:.0%}")

    @property
    def query_weights(self) -> np.ndarray:
        """(m,) float32: the attention to each query token, the mean over layers, heads, context embeddings and state.

        The sum is below 1 by what the context embeddings attend to themselves.
        """
        m = len(self.query_tokens)
        parts = []
        if self.context_attention is not None:
            parts.append(self.context_attention[..., :m])
        if self.state_attention is not None:
            parts.append(self.state_attention[:, :, None])
        return np.concatenate(parts, axis=2).mean(axis=(0, 1, 2))

    def query_words(self) -> list[WordWeight]:
        """Return the query's words with the sum of `query_weights` over their tokens; special tokens are left out."""
        return words(self.query, self.query_tokens, self.query_weights)

    def document_words(self) -> list[WordWeight]:
        """Return the document's words with their weight in the context embeddings, the mean over these."""
        return words(self.document, self.document_tokens, self.pooling.mean(axis=0))

    def plot(self, *, heads: bool = False) -> "Figure":
        """Draw the attention to the query tokens as a matplotlib figure; save it with ``.savefig("explained.png")``.

        Args:
            heads: draw a row for each attention head; otherwise rows are means over the heads.

        Raises:
            MissingExtraError: matplotlib is not installed (extra ``plots``).
        """
        # matplotlib is an optional extra
        from mixencoder.explanation.picture import draw

        return draw(self, heads=heads)

    def as_dict(self) -> dict[str, Any]:
        """Return everything in lists and dictionaries, as JSON knows them; names are those of the attributes."""
        arrays = {name: getattr(self, name) for name in ("context_attention", "state_attention", "pooling")}
        names = ("query", "document", "score", "interaction", "dual", "probability")
        return {
            **{name: getattr(self, name) for name in names},
            "layers": list(self.layers),
            "query_tokens": [token._asdict() for token in self.query_tokens],
            "document_tokens": [token._asdict() for token in self.document_tokens],
            "query_words": [word._asdict() for word in self.query_words()],
            "document_words": [word._asdict() for word in self.document_words()],
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        }


def words(text: str, tokens: Sequence[Token], weights: np.ndarray) -> list[WordWeight]:
    """Return the words of a text, each with the sum of its tokens' weights (one per token)."""
    found: dict[int, list[int]] = {}
    for number, token in enumerate(tokens):
        if token.word is not None:
            found.setdefault(token.word, []).append(number)
    out = []
    for numbers in found.values():
        starts = [start for number in numbers if (start := tokens[number].start) is not None]
        ends = [end for number in numbers if (end := tokens[number].end) is not None]
        weight = float(weights[numbers].sum())
        if starts and ends:
            start, end = min(starts), max(ends)
            out.append(WordWeight(text[start:end], start, end, weight))
        else:
            out.append(WordWeight("".join(tokens[number].text for number in numbers), None, None, weight))
    return out
