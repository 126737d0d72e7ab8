"""Rank the documents of an index for a model's queries: all of them, or those with given ids."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import as_list, positive_integer_or_none
from mixencoder.base.results import Activation, RankResult, activated, document_names, entries
from mixencoder.base.weights_version import KeptForWeights, version_in_call
from mixencoder.errors import DuplicateIdError, InputError
from mixencoder.first_stage import FirstStage, VectorIndex
from mixencoder.first_stage.protocol import chosen_positions
from mixencoder.index import CandidateIndex, Chunk, Snapshot
from mixencoder.index.messages import quoted_ids
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.progress import NoProgress, ProgressBar, progress_bar
from mixencoder.ranking.fingerprint import match_index
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.prefilter import check_first_stage, check_prefilter, chosen_prefilter
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import Rows, RowSource, StreamRanker
from mixkernels import TopK

CHUNK_ROWS = 4096
"""Rows read from an index at once."""


class IndexRanker:
    """Ranks the documents of indexes with one model. Safe to use from several threads.

    Rankers, which hold prepared weights, are kept until the weights change.

    Args:
        model: with a ranking head.
        identity: of the model; an index of another encoder is rejected.
    """

    def __init__(self, model: MixEncoderModel, identity: ModelIdentity) -> None:
        self._model, self._identity = model, identity
        # by what is read of a candidate, precision and products
        self._rankers: KeptForWeights[dict[tuple[tuple[str, ...], str, str], StreamRanker]] = KeptForWeights()

    def rank(
        self,
        states: Sequence[QueryState],
        index: CandidateIndex | Snapshot,
        top_k: int | None,
        *,
        ids: Iterable[str] | Iterable[Iterable[str]] | None,
        show_progress_bar: bool | None,
        prefilter: int | str | None,
        first_stage: FirstStage | None,
        return_documents: bool,
        activation_fn: Activation | None,
        score: str,
        products: str,
    ) -> list[list[RankResult]]:
        """Rank for every query, given as one state each (B = 1); arguments, results and errors of `MixEncoder.rank`."""
        top_k = positive_integer_or_none(top_k, "top_k")
        prefilter = check_prefilter(prefilter)
        groups = _groups(states, ids)
        version = version_in_call(self._model)
        view = index if isinstance(index, Snapshot) else index.snapshot()
        # only the model counts: engines may differ in their limit of document tokens
        match = match_index(self._model, self._identity, view.manifest, version=version)
        match.check_ranking("the index")
        if return_documents and not view.manifest.store_text:
            raise InputError("return_documents needs texts, but the index stores none (store_text=False)")
        ranker = self._ranker(version, match.record_format(), products)
        options: dict[str, Any] = {"score": score, "repeats": view.rows > len(view)}
        has_dual = self._model.config.dual_term
        if first_stage is not None:
            given = {"score": score, "has_ids": ids is not None, "has_dual": has_dual}
            check_first_stage(first_stage, prefilter, top_k, **given)
            if isinstance(first_stage, VectorIndex):
                first_stage.check(view)

        def rank_group(queries: Sequence[QueryState], names: Sequence[str] | None) -> list[TopK]:
            positions = None if names is None else _positions(view, names)
            total = view.rows if positions is None else len(positions)
            documents = len(view if positions is None else positions)
            kept = chosen_prefilter(prefilter, documents, top_k, score=score, has_dual=has_dual)
            if first_stage is not None and kept is not None and kept < documents:
                choose = partial(chosen_positions, first_stage, count=kept, documents=documents)
                return ranker.rank_chosen(queries, _ViewRows(view, None, NoProgress()), choose, top_k, **options)
            with progress_bar(total, "Candidates", "row", show_progress_bar) as bar:
                return [ranker.rank(queries, _ViewRows(view, positions, bar), top_k, prefilter=kept, **options)]

        return [
            _entries(view, scores, positions, return_documents)
            for best in [best for queries, names in groups for best in rank_group(queries, names)]
            for scores, positions in zip(activated(best.scores, activation_fn), best.ids, strict=True)
        ]

    def _ranker(self, version: int, record_format: RecordFormat, products: str) -> StreamRanker:
        rankers = self._rankers.get(version, dict)
        key = tuple(record_format.parts), record_format.precision, products
        if key not in rankers:
            rankers[key] = StreamRanker(self._model, record_format, products=products)
        return rankers[key]


class _ViewRows(RowSource):
    """Rows of a view in chunks of `CHUNK_ROWS`: all of them, not copied where possible, or those of given documents.

    Args:
        view: the documents.
        positions: (n,), the documents to read; None reads all.
        bar: counts rows as they are read; with positions it counts documents.
    """

    def __init__(self, view: Snapshot, positions: np.ndarray | None, bar: ProgressBar) -> None:
        self._view, self._positions, self._bar = view, positions, bar

    def __iter__(self) -> Iterator[Rows]:
        for count, (positions, fields) in self._chunks():
            yield torch.from_numpy(positions), fields
            self._bar.update(count)

    def select(self, positions: Tensor) -> Iterable[Rows]:
        """As `RowSource.select`."""
        # the bar counted these when they were first read
        return _ViewRows(self._view, positions.numpy(), NoProgress())

    def _chunks(self) -> Iterator[tuple[int, Chunk]]:
        if self._positions is None:
            for chunk in self._view.chunks(CHUNK_ROWS):
                yield len(chunk.positions), chunk
            return
        for first in range(0, len(self._positions), CHUNK_ROWS):
            part = self._positions[first : first + CHUNK_ROWS]
            yield len(part), self._view.gather(part)


def _entries(view: Snapshot, scores: Tensor, positions: Tensor, return_documents: bool) -> list[RankResult]:
    """Return the entries of one ranking.

    Raises:
        InputError: texts are wanted, but a document was added as an embedding without a text.
    """
    names, texts = view.ids(positions), view.texts(positions) if return_documents else None
    stored = None if texts is None else [text for text in texts if text is not None]
    if texts is not None and stored is not None and len(stored) < len(texts):
        lacking = [name for name, text in zip(names, texts, strict=True) if text is None]
        raise InputError(
            f"return_documents needs texts, but the index stores none of {quoted_ids(lacking)}: only embeddings were "
            "added"
        )
    return entries(scores, positions.numpy(), names, stored)


def _groups(
    states: Sequence[QueryState], ids: Iterable[Any] | None
) -> list[tuple[Sequence[QueryState], list[str] | None]]:
    """Return groups of queries that rank the same documents, each with the documents' ids; None means all documents.

    Raises:
        InputError: ids is neither a list of strings nor a list of such lists, one for each query.
    """
    if ids is None:
        return [(states, None)]
    listed: list[Any] = document_names(ids) if isinstance(ids, str) else as_list(ids, "ids")
    if not any(map(_is_list, listed)):
        return [(states, document_names(listed))]
    for number, names in enumerate(listed):
        if not _is_list(names):
            raise InputError(f"ids[{number}] is {names!r}, but others are lists; expected a list of ids for each query")
    if len(listed) != len(states):
        raise InputError(f"ids holds {len(listed)} lists for {len(states)} queries; expected one list for each query")
    return [([state], document_names(names)) for state, names in zip(states, listed, strict=True)]


def _is_list(names: Any) -> bool:
    return not isinstance(names, str | bytes) and isinstance(names, Iterable)


def _positions(view: Snapshot, ids: Sequence[str]) -> np.ndarray:
    """Return the positions of documents by id.

    Raises:
        UnknownIdError: the index holds no such document.
        DuplicateIdError: an id occurs twice.
    """
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [name for name in ids if name in seen or seen.add(name)]
        raise DuplicateIdError(f"ids names {quoted_ids(twice)} more than once; expected each document once")
    return view.positions(ids)
