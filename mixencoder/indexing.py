"""From a `MixEncoder` to its candidate indexes: what an index needs of a model, and ranking over one.

`mixencoder.index` stores rows and knows no model; here a model says how texts become rows, what it is, so that no other
model's rows are read with it, and how rows are ranked. `mixencoder.fast` calls this.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.identity import ModelIdentity
from mixencoder.index import CandidateIndex, Chunk, Encoded, Snapshot
from mixencoder.inputs import as_list, positive_integer_or_none
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.progress import NoProgress, ProgressBar, progress_bar
from mixencoder.query_cache import weights_version
from mixencoder.records import RecordFormat
from mixencoder.results import Activation, RankResult, activated, document_names, entries
from mixencoder.storage.errors import DuplicateIdError, IndexDamagedError, naming
from mixencoder.streaming import Rows, RowSource, StreamRanker
from mixencoder.surroundings import surroundings
from mixkernels import TopK

if TYPE_CHECKING:
    from mixencoder.fast import MixEncoder

OVERFLOWS = ("truncate", "chunk", "error")
"""What becomes of documents that are longer than the model reads: cut, split into several rows, or refused."""
CHUNK_ROWS = 4096
"""Rows read from an index at once."""
_TIMED_TEXTS = 64
"""Texts of typical length that an estimate encodes to tell the time."""


class BuildEstimate(NamedTuple):
    """What building an index will take; made before any work by `estimate_index`."""

    documents: int
    array_bytes: int
    """Of the array files: exactly with one row a document; extrapolated from some of the texts where long ones are
    split into several."""
    catalogue_bytes: int
    """Of ids and texts, roughly."""
    seconds: float
    """Extrapolated from encoding some of the texts here and now."""


class IndexAdapter:
    """What indexes need of one engine.

    Args:
        engine: the model; its weights must stay as they are.
        precision, layout: how candidates are stored, of `mixencoder.records`.
        on_overflow: of `OVERFLOWS`.

    Raises:
        InputError: there is no such precision, layout or overflow, or the model has no ranking head.
    """

    def __init__(self, engine: "MixEncoder", precision: str, layout: str, on_overflow: str) -> None:
        engine.model.check_head("ranking")
        self._reader = engine.read_document
        if on_overflow not in OVERFLOWS:
            raise InputError(f"on_overflow is {on_overflow!r}; expected one of {', '.join(OVERFLOWS)}")
        self._engine, self._on_overflow = engine, on_overflow
        self.record_format = RecordFormat(engine.model, layout, precision)
        self.settings = {"precision": precision, "layout": layout, "on_overflow": on_overflow}

    def create(self, path: str | Path | None, *, store_text: bool) -> CandidateIndex:
        """Make an index for `CandidateIndex.build` to fill."""
        return CandidateIndex.create(
            path,
            self.record_format.schema,
            fingerprint(self._engine),
            encode=self.encode,
            project=self.project,
            settings=self.settings,
            store_text=store_text,
        )

    def encode(self, texts: Sequence[str], *, batch_size: int) -> Encoded:
        """Turn texts into stored rows, as `mixencoder.storage.writer.Encode` asks for."""
        windows = self._reader.windows(
            texts, on_overflow=self._on_overflow, advice=' (on_overflow="chunk" keeps all of them)'
        )
        with surroundings(self._engine.model):
            context = self._engine.encode_rows([row for rows in windows.rows for row in rows], batch_size=batch_size)
            return Encoded(self.record_format.encode(context), [len(rows) for rows in windows.rows], windows.cut)

    def project(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Turn given context embeddings (N, k, d) into stored rows."""
        with surroundings(self._engine.model):
            return self.record_format.encode(torch.as_tensor(embeddings))

    def warn_of_nothing(self) -> None:
        """Leave out the warnings of texts that are cut or hold no token."""
        self._reader = self._reader.quiet()


def open_index(
    engine: "MixEncoder", path: str | Path, *, read_only: bool, check_sizes: bool, verify: bool
) -> CandidateIndex:
    """Open an index that this model made.

    Raises:
        IndexMismatchError: another model, or other settings, made it; the message names both.
        IndexStateError, IndexDamagedError: there is none, or it is unfinished or damaged.
    """
    options: dict[str, Any] = {"read_only": read_only, "check_sizes": check_sizes}
    made_by = fingerprint(engine)
    with CandidateIndex.open(path, made_by, **options) as index:
        settings = index.settings
    known = ("precision", "layout", "on_overflow")
    if set(settings) != set(known):
        raise IndexDamagedError(f"{path} has the settings {', '.join(settings) or 'none'}; expected {', '.join(known)}")
    adapter = IndexAdapter(engine, **settings)
    options["verify"] = verify
    return CandidateIndex.open(path, made_by, encode=adapter.encode, project=adapter.project, **options)


def estimate_index(
    engine: "MixEncoder", documents: Sequence[str], *, precision: str, layout: str, on_overflow: str, batch_size: int
) -> BuildEstimate:
    """Tell what an index of documents will take, before any work but encoding a few of them.

    Raises:
        InputError: there is no document, or an option or a text cannot be used.
    """
    if not documents:
        raise InputError("documents is empty; expected at least one text")
    adapter = IndexAdapter(engine, precision, layout, on_overflow)
    # the building itself tells what it cuts
    adapter.warn_of_nothing()
    # spread over all, since documents may come by length
    sample = [documents[number * len(documents) // _TIMED_TEXTS] for number in range(_TIMED_TEXTS)]
    sample = sample if len(documents) > _TIMED_TEXTS else list(documents)
    # the first pass of a process is slower than those that follow
    adapter.encode(sample[:1], batch_size=batch_size)
    start = time.perf_counter()
    rows = sum(adapter.encode(sample, batch_size=batch_size).row_counts)
    seconds = (time.perf_counter() - start) * len(documents) / len(sample)
    text_bytes = sum(len(text.encode()) for text in documents) // len(documents)
    schema = adapter.record_format.schema
    catalogue = CandidateIndex.estimate(schema, len(documents), text_bytes=text_bytes).catalogue
    array_bytes = round(len(documents) * rows / len(sample)) * schema.row_bytes
    return BuildEstimate(len(documents), array_bytes, catalogue, seconds)


def fingerprint(engine: "MixEncoder") -> dict[str, str]:
    """Return what tells the rows of an engine from another's: its model, and how it cuts documents."""
    identity = engine.identity
    return {"name": identity.name, **identity.parts(), "document tokens": str(engine.read_document.max_length)}


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
            f"return_documents needs texts, but the index keeps none of {naming(lacking)}, added as embeddings alone"
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
        raise DuplicateIdError(f"ids names {naming(twice)} more than once; expected each document once")
    return view.positions(ids)
