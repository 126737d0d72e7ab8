"""From a `MixEncoder` to its candidate indexes: what an index needs of a model, and ranking over one.

`mixencoder.index` stores rows and knows no model; here a model says how texts become rows, what it is, so that no other
model's rows are read with it, and how rows are ranked. `mixencoder.fast` calls this.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.identity import ModelIdentity
from mixencoder.index import CandidateIndex, Chunk, Encoded, Snapshot
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.query_cache import weights_version
from mixencoder.records import RecordFormat
from mixencoder.storage.errors import DuplicateIdError, naming
from mixencoder.streaming import Rows, RowSource, StreamRanker

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
        windows = self._engine.read_document.windows(texts, on_overflow=self._on_overflow)
        context = self._engine.encode_rows([row for rows in windows.rows for row in rows], batch_size=batch_size)
        return Encoded(self.record_format.encode(context), [len(rows) for rows in windows.rows], windows.cut)

    def project(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Turn given context embeddings (N, k, d) into stored rows."""
        return self.record_format.encode(torch.as_tensor(embeddings))


def open_index(engine: "MixEncoder", path: str | Path, *, read_only: bool, check_sizes: bool) -> CandidateIndex:
    """Open an index that this model made.

    Raises:
        IndexMismatchError: another model, or other settings, made it; the message names both.
        IndexStateError, IndexDamagedError: there is none, or it is unfinished or damaged.
    """
    options = {"read_only": read_only, "check_sizes": check_sizes}
    made_by = fingerprint(engine)
    with CandidateIndex.open(path, made_by, **options) as index:
        settings = index.settings
    adapter = IndexAdapter(engine, **settings)
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
        ids: Sequence[str] | Sequence[Sequence[str]] | None,
        prefilter: int | None,
        return_documents: bool,
        activation_fn: Callable[[Tensor], Tensor] | None,
        score: str,
        products: str,
    ) -> list[list[dict[str, Any]]]:
        """Rank for every query (each a state of its own, B = 1), as `MixEncoder.rank` promises."""
        version, identity = weights_version(self._model), self._identity
        view = index if isinstance(index, Snapshot) else index.snapshot()
        manifest = view.manifest
        # an engine that reads shorter documents may rank what another one of the same model read
        expected = {**manifest.fingerprint, "name": identity.name, **identity.remembered_parts(version)}
        manifest.check_fingerprint("the index", expected)
        ranker = self._ranker(version, manifest.settings, products)
        options = {"score": score, "prefilter": prefilter, "repeats": view.rows > len(view)}
        if ids is None:
            found = [ranker.rank(states, _ViewRows(view), top_k, **options)]
        elif all(isinstance(name, str) for name in ids):
            found = [ranker.rank(states, _ViewRows(view, _places(view, cast("Sequence[str]", ids))), top_k, **options)]
        else:
            if len(ids) != len(states):
                raise InputError(f"ids holds {len(ids)} lists for {len(states)} queries; expected one for each")
            found = [
                ranker.rank(state, _ViewRows(view, _places(view, names)), top_k, **options)
                for state, names in zip(states, ids, strict=True)
            ]
        rankings = []
        for best in found:
            scores = best.scores if activation_fn is None else activation_fn(best.scores)
            for row, places in zip(scores, best.ids, strict=True):
                texts = view.texts(places) if return_documents else None
                names = view.ids(places)
                rankings.append([
                    {"corpus_id": place, "score": value}
                    | ({} if texts is None else {"text": texts[rank]})
                    | {"id": names[rank]}
                    for rank, (place, value) in enumerate(zip(places.tolist(), row.tolist(), strict=True))
                ])  # fmt: skip
        return rankings

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
    """

    def __init__(self, view: Snapshot, positions: np.ndarray | None = None) -> None:
        self._view, self._positions = view, positions

    def __iter__(self) -> Iterator[Rows]:
        for positions, fields in self._chunks():
            yield torch.from_numpy(positions), fields

    def select(self, positions: Tensor) -> Iterable[Rows]:
        """As `RowSource.select`."""
        return _ViewRows(self._view, positions.numpy())

    def _chunks(self) -> Iterator[Chunk]:
        if self._positions is None:
            yield from self._view.chunks(CHUNK_ROWS)
            return
        for first in range(0, len(self._positions), CHUNK_ROWS):
            yield self._view.gather(self._positions[first : first + CHUNK_ROWS])


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
