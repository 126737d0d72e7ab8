"""Ranking the documents of an index for a model: all of them, or some by their ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.inputs import as_list, positive_integer_or_none
from mixencoder.base.results import Activation, RankResult, activated, document_names, entries
from mixencoder.errors import DuplicateIdError, InputError
from mixencoder.index import CandidateIndex, Chunk, Snapshot
from mixencoder.index.messages import quoted_ids
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.progress import NoProgress, ProgressBar, progress_bar
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import Rows, RowSource, StreamRanker
from mixencoder.ranking.weights_version import weights_version
from mixkernels import TopK

CHUNK_ROWS = 4096
"""Rows read from an index at once."""


class IndexRanker:
    """Ranks indexes for one model; keeps what it prepared of the weights as long as these stay as they are.

    Args:
        model: with a ranking head.
        identity: what indexes of this model must have been made by.
    """

    def __init__(self, model: MixEncoderModel, identity: ModelIdentity) -> None:
        self._model, self._identity = model, identity
        self._version: int | None = None
        self._rankers: dict[tuple[str, str, str], StreamRanker] = {}

    def rank(
        self,
        states: Sequence[QueryState],
        index: CandidateIndex | Snapshot,
        top_k: int | None,
        *,
        ids: Iterable[str] | Iterable[Iterable[str]] | None,
        show_progress_bar: bool | None,
        prefilter: int | None,
        return_documents: bool,
        activation_fn: Activation | None,
        score: str,
        products: str,
    ) -> list[list[RankResult]]:
        """Rank for every query (each a state of its own, B = 1), as `MixEncoder.rank` promises."""
        top_k = positive_integer_or_none(top_k, "top_k")
        prefilter = positive_integer_or_none(prefilter, "prefilter")
        groups = _groups(states, ids)
        version, identity = weights_version(self._model), self._identity
        view = index if isinstance(index, Snapshot) else index.snapshot()
        manifest = view.manifest
        # an engine that reads shorter documents may rank what another one of the same model read
        expected = {**manifest.fingerprint, "name": identity.name, **identity.remembered_parts(version)}
        manifest.check_fingerprint("the index", expected)
        if return_documents and not manifest.store_text:
            raise InputError("return_documents needs texts, but the index keeps none (store_text=False)")
        ranker = self._ranker(version, manifest.settings, products)
        options: dict[str, Any] = {"score": score, "prefilter": prefilter, "repeats": view.rows > len(view)}

        def rank(some: Sequence[QueryState], names: Sequence[str] | None) -> TopK:
            places = None if names is None else _places(view, names)
            total = view.rows if places is None else len(places)
            with progress_bar(total, "Candidates", "row", show_progress_bar) as bar:
                return ranker.rank(some, _ViewRows(view, places, bar), top_k, **options)

        return [
            _entries(view, row, places, return_documents)
            for best in [rank(some, names) for some, names in groups]
            for row, places in zip(activated(best.scores, activation_fn), best.ids, strict=True)
        ]

    def _ranker(self, version: int, settings: Mapping[str, str], products: str) -> StreamRanker:
        rankers = self._rankers if version == self._version else {}
        key = settings["layout"], settings["precision"], products
        if key not in rankers:
            record_format = RecordFormat(self._model, settings["layout"], settings["precision"])
            rankers[key] = StreamRanker(self._model, record_format, products=products)
        self._rankers, self._version = rankers, version
        return rankers[key]


class _ViewRows(RowSource):
    """Rows of a view, some thousand at once: all of them, straight from the map, or those of some documents.

    Args:
        view: the documents.
        positions: (n,), which of them; None for all.
        bar: told of the rows as they are asked for, or, of some documents, of these.
    """

    def __init__(self, view: Snapshot, positions: np.ndarray | None, bar: ProgressBar) -> None:
        self._view, self._positions, self._bar = view, positions, bar

    def __iter__(self) -> Iterator[Rows]:
        for count, (positions, fields) in self._chunks():
            yield torch.from_numpy(positions), fields
            self._bar.update(count)

    def select(self, positions: Tensor) -> Iterable[Rows]:
        """As `RowSource.select`."""
        # these were counted when they were read first
        return _ViewRows(self._view, positions.numpy(), NoProgress())

    def _chunks(self) -> Iterator[tuple[int, Chunk]]:
        if self._positions is None:
            for chunk in self._view.chunks(CHUNK_ROWS):
                yield len(chunk.positions), chunk
            return
        for first in range(0, len(self._positions), CHUNK_ROWS):
            part = self._positions[first : first + CHUNK_ROWS]
            yield len(part), self._view.gather(part)


def _entries(view: Snapshot, scores: Tensor, places: Tensor, return_documents: bool) -> list[RankResult]:
    """Return the entries of one ranking.

    Raises:
        InputError: texts are wanted, and a document was added as an embedding without one.
    """
    names, texts = view.ids(places), view.texts(places) if return_documents else None
    kept = None if texts is None else [text for text in texts if text is not None]
    if texts is not None and kept is not None and len(kept) < len(texts):
        lacking = [name for name, text in zip(names, texts, strict=True) if text is None]
        raise InputError(
            f"return_documents needs texts, but the index keeps none of {quoted_ids(lacking)}, "
            "added as embeddings alone"
        )
    return entries(scores, places.numpy(), names, kept)


def _groups(
    states: Sequence[QueryState], ids: Iterable[Any] | None
) -> list[tuple[Sequence[QueryState], list[str] | None]]:
    """Return the queries that are ranked for together, with the ids of the documents to rank; None for all.

    Raises:
        InputError: ids are neither one list of strings nor one for each query.
    """
    if ids is None:
        return [(states, None)]
    listed: list[Any] = document_names(ids) if isinstance(ids, str) else as_list(ids, "ids")
    if not any(map(_is_list, listed)):
        return [(states, document_names(listed))]
    for number, names in enumerate(listed):
        if not _is_list(names):
            raise InputError(f"ids {number} is {names!r}; expected a list of strings, as others are, for each query")
    if len(listed) != len(states):
        raise InputError(f"ids holds {len(listed)} lists for {len(states)} queries; expected one for each")
    return [([state], document_names(names)) for state, names in zip(states, listed, strict=True)]


def _is_list(names: Any) -> bool:
    return not isinstance(names, str | bytes) and isinstance(names, Iterable)


def _places(view: Snapshot, ids: Sequence[str]) -> np.ndarray:
    """Return the places of some documents.

    Raises:
        UnknownIdError, DuplicateIdError: the index holds no such document, or one is named twice.
    """
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = [name for name in ids if name in seen or seen.add(name)]
        raise DuplicateIdError(f"ids names {quoted_ids(twice)} more than once; expected each document once")
    return view.positions(ids)
