"""What every front door shares: texts in, scores and rankings out, and what bad input gets.

`Engine` holds a model and a tokenizer, reads texts, predicts and ranks; `EncodingEngine` adds encoding ahead of time.
How pairs are scored is the business of those that derive from them: `mixencoder.fast.MixEncoder` and
`mixencoder.peers`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np
import torch
from torch import Tensor

from mixencoder.backbones import max_positions
from mixencoder.checkpoint import save
from mixencoder.configuration import EncoderConfig
from mixencoder.errors import InputError, NonFiniteError
from mixencoder.heads import model_with_head
from mixencoder.inputs import as_list, positive_integer
from mixencoder.modeling import HeadedModel
from mixencoder.passes import EncoderPasses
from mixencoder.progress import progress_bar
from mixencoder.scoring import Pairs
from mixencoder.tokenization import TextEncoder


class Request(NamedTuple):
    """How to score, as `Engine.predict` and `Engine.rank` were asked."""

    head: str
    score: str
    batch_size: int
    show_progress_bar: bool | None


class Engine:
    """Predict and rank texts with a model.

    Attributes:
        model: the torch module.
        tokenizer: its tokenizer.
        read_query: from texts to token ids, as this engine cuts them.
        read_document: the same of documents.
        score_terms: what `predict` and `rank` accept as ``score``: the whole, and single terms where there are any.
        encoded_types: what `rank` accepts as documents beside texts.
        reads_jointly: whether every pair takes a pass of its own through backbone layers.
    """

    score_terms: tuple[str, ...] = ("full",)
    encoded_types: tuple[type, ...] = ()
    reads_jointly: bool = False

    def __init__(self, model: HeadedModel, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        config = model.config
        longest = self._longest("query"), self._longest("document")
        self.read_query = TextEncoder(
            tokenizer, min(config.max_query_length or longest[0], longest[0]), config.query_truncation_side, "query"
        )
        self.read_document = TextEncoder(tokenizer, min(config.max_document_length or longest[1], longest[1]))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write configuration, weights (safetensors) and tokenizer into a directory, which `from_pretrained` reads.

        A crash leaves the checkpoint that was there or the new one, never a mix; other files there stay.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        save(self.model, self.tokenizer, Path(directory))

    def with_limits(self, *, max_query_length: int | None = None, max_document_length: int | None = None) -> Self:
        """Return an engine over the same weights that reads fewer tokens; the configuration is left alone.

        Args:
            max_query_length, max_document_length: tokens, special tokens included; None keeps the limit.

        Raises:
            InputError: a limit is more than the backbone has positions for, or leaves no room for text.
        """
        other = copy.copy(self)
        for role, length in (("query", max_query_length), ("document", max_document_length)):
            if length is None:
                continue
            if not 3 <= length <= self._longest(role):
                raise InputError(f"max_{role}_length is {length}; expected 3 to {self._longest(role)} tokens")
            name = f"read_{role}"
            setattr(other, name, dataclasses.replace(getattr(self, name), max_length=length))
        return other

    def with_head(self, head: str, class_names: Sequence[str] = ()) -> Self:
        """Return an engine whose model has one more, untrained head; all other weights are copies, bit for bit.

        The new head comes last: the default head, ranking scores and this engine stay as they are.

        Args:
            head: "ranking" or "classification".
            class_names: for classification, the classes' names in order of their numbers.

        Raises:
            InputError: the model has that head, there is no such head, or class_names does not fit it.
        """
        other = self._over(model_with_head(self.model, head, class_names))
        other.read_query, other.read_document = self.read_query, self.read_document
        return other

    def _over(self, model: HeadedModel) -> Self:
        """Return an engine of the same kind over another model."""
        return type(self)(model, self.tokenizer)

    @property
    def config(self) -> EncoderConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and encoded texts; scores are float32 whatever it is."""
        return self.model.dtype

    @overload
    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Callable[[Tensor], Tensor] | None = ...,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        score: str = ...,
    ) -> np.ndarray: ...

    @overload
    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Callable[[Tensor], Tensor] | None = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: Literal[True],
        score: str = ...,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Callable[[Tensor], Tensor] | None = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        score: str = ...,
    ) -> np.ndarray | list[Tensor] | Tensor: ...

    @torch.inference_mode()
    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        head: str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        score: str = "full",
    ) -> np.ndarray | list[Tensor] | Tensor:
        """Score (query, document) pairs; equal texts are encoded once.

        Args:
            pairs: (query, document) texts; one pair alone gives one result.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if the logger "mixencoder" is at INFO or below.
            head: "ranking" or "classification"; None takes the configuration's default.
            activation_fn: applied to the logits, for example ``torch.sigmoid``; None leaves them as they are.
            convert_to_numpy: return a numpy array, else a list of tensors.
            convert_to_tensor: return one tensor; wins over convert_to_numpy.
            score: which part of a ranking score, of `score_terms`.

        Returns:
            float32 scores (n,) for ranking, logits (n, num_labels) for classification.

        Raises:
            InputError: a pair is not two strings, a text holds no token, or the model has no such head or score.
            NonFiniteError: a score is NaN or infinite.
        """
        head = self.model.check_head(head)
        self._check_score(score)
        single = len(pairs) == 2 and all(isinstance(text, str) for text in pairs)
        listed: list[Any] = [pairs] if single else list(pairs)
        for index, pair in enumerate(listed):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"pair {index} is {pair!r}; expected (query, document)")
        if not listed:
            out = torch.empty((0,) if head == "ranking" else (0, self.config.num_classes))
        else:
            queries, query_of = unique(self.read_query([pair[0] for pair in listed]))
            documents, document_of = unique(self.read_document([pair[1] for pair in listed]))
            request = Request(head, score, batch_size, show_progress_bar)
            out = self._score_pairs(queries, documents, Pairs(query_of, document_of), request)
        if activation_fn is not None:
            out = activation_fn(out)
        if single:
            out = out[0]
        if convert_to_tensor:
            return out
        return out.cpu().numpy() if convert_to_numpy else (out if single else list(out))

    @overload
    def rank(
        self,
        query: str,
        documents: Sequence[str] | Any,
        top_k: int | None = ...,
        *,
        ids: Sequence[str] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Callable[[Tensor], Tensor] | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
    ) -> list[dict[str, Any]]: ...

    @overload
    def rank(
        self,
        query: Sequence[str],
        documents: Sequence[str] | Any,
        top_k: int | None = ...,
        *,
        ids: Sequence[str] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Callable[[Tensor], Tensor] | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
    ) -> list[list[dict[str, Any]]]: ...

    def rank(
        self,
        query: str | Sequence[str],
        documents: Sequence[str] | Any,
        top_k: int | None = None,
        *,
        ids: Sequence[str] | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        score: str = "full",
        return_probabilities: bool = False,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Rank documents for a query, best first, ties to the lower corpus_id.

        Args:
            query: one text, or several, which give a list of rankings.
            documents: texts, or what `encode_document` made of them where the model has that method.
            top_k: how many to return; None returns all.
            ids: a name of each document, returned as "id".
            return_documents: also return each document's text.
            batch_size, show_progress_bar, activation_fn, score: as in `predict`.
            return_probabilities: also return what `probability` makes of each score.

        Returns:
            ``[{"corpus_id": int, "score": float, "text": str?, "id": str?, "probability": float?}, ...]`` a query.

        Raises:
            InputError: no query or no document, a text that is not a string or holds no token, or a bad option.
            NonFiniteError: a score is NaN or infinite.
        """
        self.model.check_head("ranking")
        self._check_score(score)
        if return_probabilities:
            self._check_probabilities(score, activation_fn)
        encoded = isinstance(documents, self.encoded_types)
        if not encoded:
            documents = as_list(documents, "document")
        if len(documents) == 0:
            raise InputError("documents is empty; expected at least one candidate to rank")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {top_k!r}; expected a positive integer or None")
        if ids is not None and len(ids) != len(documents):
            raise InputError(f"ids names {len(ids)} documents but there are {len(documents)}")
        if return_documents and encoded:
            raise InputError("return_documents needs texts, but documents are encoded")
        queries = as_list(query, "query")
        if not queries:
            raise InputError("query is empty; expected at least one text")
        scores = self._score_all(queries, documents, Request("ranking", score, batch_size, show_progress_bar))
        if activation_fn is not None:
            scores = activation_fn(scores)

        def entry(corpus_id: int, value: float) -> dict[str, Any]:
            result: dict[str, Any] = {"corpus_id": corpus_id, "score": value}
            if return_documents:
                result["text"] = documents[corpus_id]
            if ids is not None:
                result["id"] = ids[corpus_id]
            return result

        rankings = []
        for row in scores.cpu().numpy():
            order = np.argsort(-row, kind="stable")[:top_k]
            rankings.append([entry(int(place), float(row[place])) for place in order])
        if return_probabilities:
            self._add_probabilities(rankings)
        return rankings[0] if isinstance(query, str) else rankings

    def probability(self, scores: np.ndarray | Tensor | Sequence[float] | float) -> np.ndarray:
        """Turn ranking scores into probabilities that a document is right, float64 of the same shape.

        ``sigmoid(score / temperature + bias)``, fitted by ``mixencoder calibrate`` on candidate lists: a probability
        holds for lists with about as many right documents among the wrong ones.

        Args:
            scores: full ones, as `predict` and `rank` give them.

        Raises:
            InputError: the checkpoint was not calibrated.
            NonFiniteError: a score is NaN.
        """
        calibration = self.config.calibration
        if calibration is None:
            raise InputError(
                "this checkpoint holds no calibration, so its scores say nothing about probabilities; fit one on "
                "candidate lists: mixencoder calibrate DATA --model DIR"
            )
        values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
        values = np.asarray(values, dtype=np.float64)
        if np.isnan(values).any():
            raise NonFiniteError("a score is NaN; expected scores of predict or rank")
        # tanh, unlike exp, does not overflow
        return 0.5 + 0.5 * np.tanh((values / calibration["temperature"] + calibration["bias"]) / 2)

    def _check_probabilities(self, score: str, activation_fn: Callable[[Tensor], Tensor] | None) -> None:
        """Refuse what has none before anything is scored."""
        self.probability(0.0)
        if score != "full" or activation_fn is not None:
            raise InputError("probabilities are those of full scores; expected no other score and no activation_fn")

    def _add_probabilities(self, rankings: Sequence[Sequence[dict[str, Any]]]) -> None:
        for ranking in rankings:
            values = self.probability([entry["score"] for entry in ranking])
            for entry, value in zip(ranking, values.tolist(), strict=True):
                entry["probability"] = value

    def _longest(self, role: str) -> int:
        """Tokens that the model can read of a text of this role, "query" or "document"."""
        return max_positions(self.config.backbone_config)

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        """Score pairs (R of them, in any order, at least one) of distinct token rows: (R,) or (R, num_labels)."""
        raise NotImplementedError

    def _score_all(self, queries: Sequence[str], documents: Sequence[str] | Any, request: Request) -> Tensor:
        """Ranking scores (B, N) of all queries for all documents, texts or encoded; neither is empty."""
        raise NotImplementedError

    def _check_score(self, score: str) -> None:
        if score not in self.score_terms:
            raise InputError(f"score is {score!r}; expected one of {', '.join(self.score_terms)}")


class EncodingEngine(Engine):
    """An engine whose queries and documents are encoded apart, documents ahead of time if wanted."""

    def __init__(self, model: HeadedModel, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._passes = EncoderPasses(model.backbone, tokenizer.pad_token_id or 0)

    def encode_query(
        self, texts: str | Sequence[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> Any:
        """Encode queries once, for any number of candidates.

        Raises:
            InputError: a text is not a string or holds no token.
        """
        texts = as_list(texts, "query")
        if not texts:
            raise InputError("query is empty; expected at least one text")
        return self._encode_queries(self.read_query(texts), batch_size, show_progress_bar)

    def encode_document(
        self, texts: str | Sequence[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> Any:
        """Encode candidates ahead of time, on the model's device, in its dtype; equal texts are encoded once.

        Raises:
            InputError: a text is not a string or holds no token.
        """
        rows, place = unique(self.read_document(as_list(texts, "document")))
        return self._encode_documents(rows, batch_size, show_progress_bar)[place.to(self.device)]

    def interact(self, query_state: Any, candidates: Any, *, score: str = "full") -> Tensor:
        """Ranking scores (B, N) float32 of B encoded queries for N encoded candidates: the hot path.

        Args:
            query_state: of `encode_query`.
            candidates: of `encode_document`.
            score: "full", or one term of it, of `score_terms`.

        Raises:
            InputError: the model has no ranking head or no such score, or candidates have another shape.
            NonFiniteError: a score is NaN or infinite.
        """
        raise NotImplementedError

    def _score_all(self, queries: Sequence[str], documents: Sequence[str] | Any, request: Request) -> Tensor:
        options = {"batch_size": request.batch_size, "show_progress_bar": request.show_progress_bar}
        query_state = self.encode_query(queries, **options)
        if not isinstance(documents, self.encoded_types):
            documents = self.encode_document(documents, **options)
        return self.interact(query_state, documents, score=request.score)

    def _encode_queries(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> Any:
        """Encode token rows of queries, at least one."""
        raise NotImplementedError

    def _encode_documents(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> Any:
        """Encode token rows of documents; what is returned can be indexed by a tensor of row numbers."""
        raise NotImplementedError

    def _encode(
        self,
        rows: Sequence[Sequence[int]],
        encode: Callable[[Tensor, Tensor], Any],
        batch_size: int,
        show_progress_bar: bool | None,
        name: str,
        *,
        alone: bool = False,
    ) -> Iterator[tuple[list[int], Any]]:
        """Encode texts in passes (`mixencoder.passes`); yields the numbers of a pass's texts and what was made of them.

        Results may hold padding behind a text's tokens, and, if they are no tensors, rows beyond the pass's texts.
        """
        batch_size = positive_integer(batch_size, "batch_size")
        options = {"batch_size": batch_size, "device": self.device, "alone": alone}
        with progress_bar(len(rows), name, "text", show_progress_bar) as bar:
            for numbers, encoded in self._passes.run(rows, encode, **options):
                yield numbers, encoded[: len(numbers)] if isinstance(encoded, Tensor) else encoded
                bar.update(len(numbers))


def unique(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], Tensor]:
    """Return distinct token rows in order of appearance, and for every row its number among them."""
    numbers: dict[tuple[int, ...], int] = {}
    place = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), torch.tensor(place, dtype=torch.int64)
