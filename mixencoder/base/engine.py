"""What users call of every architecture: `Engine` predicts and ranks with a model and a tokenizer.

How pairs are scored is up to those that derive from it (`mixencoder.fast.MixEncoder`, `mixencoder.peers`); engines that
encode documents ahead of time derive from `mixencoder.base.encoding.EncodingEngine`.
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
    """How to score, as `Engine.predict` and `Engine.rank` were asked."""

    head: str
    score: str
    batch_size: int
    show_progress_bar: bool | None


class Engine(ModelHolder):
    """Predict and rank texts with a model.

    Whatever mode the model is in, inference runs in evaluation mode, without gradients and outside of a caller's
    autocast, and gives the mode back afterwards.

    Attributes:
        model, tokenizer, read_query, read_document: as in `ModelHolder`.
        score_terms: what `predict` and `rank` accept as ``score``: the whole, and single terms where there are any.
        encoded_types: what `rank` accepts as documents beside texts.
        reads_jointly: whether every pair takes a pass of its own through backbone layers.
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
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        score: str = "full",
    ) -> np.ndarray | list[Tensor] | Tensor:
        """Score (query, document) pairs; equal texts are encoded once.

        Args:
            pairs: (query, document) texts, in anything that gives them in an order; one pair alone gives one result.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if the logger "mixencoder" is at INFO or below.
            head: "ranking" or "classification"; None takes the configuration's default.
            activation_fn: applied to the logits, a row a pair, for example ``torch.sigmoid``; returns a tensor or an
                array. None leaves them as they are.
            convert_to_numpy: return a numpy array, else a list of tensors.
            convert_to_tensor: return one tensor; wins over convert_to_numpy.
            score: which part of a ranking score, of `score_terms`.

        Returns:
            float32 scores (n,) for ranking, logits (n, num_labels) for classification.

        Raises:
            InputError: a pair is not two strings, or the model has no such head or score.
            ForkedProcessError: this process was forked from one that computes with threads.
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
                    f"activation_fn made {tuple(out.shape)} of {len(listed)} pairs; expected a row for each of them"
                )
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
            documents: texts, in anything that gives them in an order, or what `encode_document` made of them where the
                model has that method.
            top_k: how many to return; None returns all.
            ids: a name of each document, returned as "id".
            return_documents: also return each document's text.
            batch_size, show_progress_bar, score: as in `predict`.
            activation_fn: applied to the scores that are returned (B, n), best first, after the cut to top_k; returns
                as many numbers. It does not change the order.
            return_probabilities: also return what `probability` makes of each score.

        Returns:
            A list of `RankResult` a query: ``{"corpus_id": int, "score": float, "text": str?, "id": str?,
            "probability": float?}``.

        Raises:
            InputError: no query or no document, a text that is not a string, or a bad option.
            NonFiniteError: a score is NaN or infinite.
            ForkedProcessError: this process was forked from one that computes with threads.
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
        best, places = best_first(self._score_all(queries, documents, request), top_k)
        rankings = [
            entries(
                row,
                numbers,
                None if names is None else [names[number] for number in numbers],
                [documents[number] for number in numbers] if return_documents else None,
            )
            for row, numbers in zip(activated(best, activation_fn), places, strict=True)
        ]
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

    def _check_probabilities(self, score: str, activation_fn: Activation | None) -> None:
        """Refuse what has none before anything is scored."""
        self.probability(0.0)
        if score != "full" or activation_fn is not None:
            raise InputError("probabilities are those of full scores; expected no other score and no activation_fn")

    def _add_probabilities(self, rankings: Sequence[Sequence[RankResult]]) -> None:
        for ranking in rankings:
            values = self.probability([entry["score"] for entry in ranking])
            for entry, value in zip(ranking, values.tolist(), strict=True):
                entry["probability"] = value

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
