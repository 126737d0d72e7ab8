"""`Engine`: what users call of every architecture, `predict` and `rank` with a model and a tokenizer.

Subclasses define how pairs are scored (`mixencoder.fast.MixEncoder`, `mixencoder.peers`). Engines that encode documents
ahead of time derive from `mixencoder.base.encoding.EncodingEngine`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inference_context import inference
from mixencoder.base.inputs import as_list, check_documents, positive_integer, positive_integer_or_none, read_pairs
from mixencoder.base.model_holder import ModelHolder
from mixencoder.base.results import (
    Activation,
    RankResult,
    activated,
    as_numbers,
    best_first,
    document_names,
    entries,
)
from mixencoder.base.scores import Pairs, unique
from mixencoder.errors import InputError, NonFiniteError


class Request(NamedTuple):
    """The options of `Engine.predict` and `Engine.rank` on how to score."""

    head: str
    score: str
    batch_size: int
    show_progress_bar: bool | None


class Engine(ModelHolder):
    """Predict and rank texts with a model.

    Inference runs in evaluation mode, without gradients and without a caller's autocast; afterwards the model is in the
    mode it was in before.

    Attributes:
        model, tokenizer, read_query, read_document: as in `ModelHolder`.
        score_terms: the values of ``score`` in `predict` and `rank`: "full", and single terms if there are any.
        encoded_types: types of encoded documents that `rank` accepts besides texts.
        reads_jointly: whether every pair needs its own pass through backbone layers.
    """

    score_terms: tuple[str, ...] = ("full",)
    encoded_types: tuple[type, ...] = ()
    reads_jointly: bool = False

    @overload
    def predict(
        self,
        pairs: Iterable[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Activation | None = ...,
        apply_softmax: bool = ...,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        score: str = ...,
    ) -> np.ndarray: ...

    @overload
    def predict(
        self,
        pairs: Iterable[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Activation | None = ...,
        apply_softmax: bool = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: Literal[True],
        score: str = ...,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        pairs: Iterable[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        head: str | None = ...,
        activation_fn: Activation | None = ...,
        apply_softmax: bool = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        score: str = ...,
    ) -> np.ndarray | list[Tensor] | Tensor: ...

    @inference
    def predict(
        self,
        pairs: Iterable[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        head: str | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        score: str = "full",
    ) -> np.ndarray | list[Tensor] | Tensor:
        """Score (query, document) pairs; equal texts are encoded once.

        Args:
            pairs: (query, document) texts in any ordered iterable; a single pair gives a single result.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if the logger "mixencoder" is at INFO or below.
            head: "ranking" or "classification"; None takes the configuration's default.
            activation_fn: applied to the scores or logits, one row per pair, for example ``torch.sigmoid``; returns a
                tensor or an array with the same number of rows. None changes nothing.
            apply_softmax: turn the logits of classes, after activation_fn, into probabilities that add up to one; the
                ranking head's scores stay as they are.
            convert_to_numpy: return a numpy array, else a list of tensors.
            convert_to_tensor: return one tensor; wins over convert_to_numpy.
            score: the part of the ranking score to return, one of `score_terms`.

        Returns:
            float32 scores (n,) for ranking, logits (n, num_labels) for classification.

        Raises:
            InputError: a pair is not two strings, or the model has no such head or score.
            ForkedProcessError: this process was forked from one that had computed with threads.
            NonFiniteError: a score is NaN or infinite.
        """
        head = self.model.check_head(head)
        self._check_score(score)
        request = Request(head, score, positive_integer(batch_size, "batch_size"), show_progress_bar)
        listed, single = read_pairs(pairs)
        if not listed:
            out = torch.empty((0,) if head == "ranking" else (0, self.config.num_classes), dtype=torch.float32)
        else:
            queries, query_of = unique(self.read_query([query for query, _ in listed]))
            documents, document_of = unique(self.read_document([document for _, document in listed]))
            out = self._score_pairs(queries, documents, Pairs(query_of, document_of), request)
        if activation_fn is not None:
            out = as_numbers(activation_fn(out))
            if out.shape[:1] != (len(listed),):
                raise InputError(
                    f"activation_fn returned the shape {tuple(out.shape)} for {len(listed)} pairs; expected one row "
                    "for each pair"
                )
        if apply_softmax and out.dim() > 1:
            out = out.float().softmax(dim=-1)
        if single:
            out = out[0]
        if convert_to_tensor:
            return out
        return out.cpu().numpy() if convert_to_numpy else (out if single else list(out))

    @overload
    def rank(
        self,
        query: str,
        documents: Iterable[str] | Any,
        top_k: int | None = ...,
        *,
        ids: Iterable[str] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Activation | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
    ) -> list[RankResult]: ...

    @overload
    def rank(
        self,
        query: Iterable[str],
        documents: Iterable[str] | Any,
        top_k: int | None = ...,
        *,
        ids: Iterable[str] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Activation | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
    ) -> list[list[RankResult]]: ...

    @inference
    def rank(
        self,
        query: str | Iterable[str],
        documents: Iterable[str] | Any,
        top_k: int | None = None,
        *,
        ids: Iterable[str] | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        score: str = "full",
        return_probabilities: bool = False,
    ) -> list[RankResult] | list[list[RankResult]]:
        """Rank documents for a query, best first, ties to the lower corpus_id.

        Args:
            query: one text, or several, which give a list of rankings.
            documents: texts in any ordered iterable, or the result of `encode_document` if the model has that method.
            top_k: how many to return; None returns all.
            ids: a name for each document, returned as "id".
            return_documents: also return each document's text.
            batch_size, show_progress_bar, score: as in `predict`.
            activation_fn: applied to the returned scores (B, n), best first, after the cut to top_k; keeps their
                shape. It does not change the order.
            return_probabilities: also return the `probability` of each score.

        Returns:
            For each query a list of `RankResult`: ``{"corpus_id": int, "score": float, "text": str?, "id": str?,
            "probability": float?}``.

        Raises:
            InputError: there is no query or no document, a text is not a string, or an option is invalid.
            NonFiniteError: a score is NaN or infinite.
            ForkedProcessError: this process was forked from one that had computed with threads.
        """
        self.model.check_head("ranking")
        self._check_score(score)
        if return_probabilities:
            self._check_probabilities(score, activation_fn)
        request = Request("ranking", score, positive_integer(batch_size, "batch_size"), show_progress_bar)
        top_k = positive_integer_or_none(top_k, "top_k")
        encoded = isinstance(documents, self.encoded_types)
        if not encoded:
            documents = list(check_documents(documents))
        if len(documents) == 0:
            raise InputError("documents is empty; expected at least one candidate to rank")
        if return_documents and encoded:
            raise InputError("return_documents needs texts, but documents are encoded")
        names = None if ids is None else document_names(ids)
        if names is not None and len(names) != len(documents):
            raise InputError(f"ids names {len(names)} documents but there are {len(documents)}")
        queries = as_list(query, "query")
        if not queries:
            raise InputError("query is empty; expected at least one text")
        best, positions = best_first(self._score_all(queries, documents, request), top_k)
        rankings = [
            entries(
                row,
                found,
                None if names is None else [names[position] for position in found],
                [documents[position] for position in found] if return_documents else None,
            )
            for row, found in zip(activated(best, activation_fn), positions, strict=True)
        ]
        if return_probabilities:
            self._add_probabilities(rankings)
        return rankings[0] if isinstance(query, str) else rankings

    def probability(self, scores: np.ndarray | Tensor | Sequence[float] | float) -> np.ndarray:
        """Turn ranking scores into probabilities that a document is right, float64 of the same shape.

        The formula ``sigmoid(score / temperature + bias)`` was fitted by ``mixencoder calibrate`` on candidate lists.
        The probabilities hold for lists with a similar share of right documents.

        Args:
            scores: full scores, as `predict` and `rank` return them.

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

    def _check_probabilities(self, score: str, activation_fn: Activation | None) -> None:
        """Raise before scoring if probabilities cannot be computed."""
        self.probability(0.0)
        if score != "full" or activation_fn is not None:
            raise InputError('return_probabilities needs full scores; expected score="full" and no activation_fn')

    def _add_probabilities(self, rankings: Sequence[Sequence[RankResult]]) -> None:
        for ranking in rankings:
            values = self.probability([entry["score"] for entry in ranking])
            for entry, value in zip(ranking, values.tolist(), strict=True):
                entry["probability"] = value

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        """Score R >= 1 pairs of distinct token rows, in any order: (R,) scores or (R, num_labels) logits."""
        raise NotImplementedError

    def _score_all(self, queries: Sequence[str], documents: Sequence[str] | Any, request: Request) -> Tensor:
        """Return ranking scores (B, N) of all queries for all documents, texts or encoded; neither is empty."""
        raise NotImplementedError

    def _check_score(self, score: str) -> None:
        if score not in self.score_terms:
            raise InputError(f"score is {score!r}; expected one of {', '.join(self.score_terms)}")
