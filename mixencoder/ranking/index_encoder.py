"""Create, fill, open, copy and estimate indexes for a model. `mixencoder.fast` is the caller.

`mixencoder.index` stores rows and knows no model. This file connects the two: it gives an index the functions that turn
texts into rows, and the fingerprint by which an index made by another model is rejected (`fingerprint`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixencoder.base.inference_context import inference_context
from mixencoder.base.inputs import local_path
from mixencoder.base.tokenization import TextEncoder
from mixencoder.base.weights_version import weights_version
from mixencoder.errors import IndexDamagedError, IndexMismatchError, InputError
from mixencoder.index import CandidateIndex, Encoded, ShardedIndex, Snapshot
from mixencoder.index.candidate_index import BuildEstimate
from mixencoder.index.manifest import Manifest
from mixencoder.index.shard_list import shard_paths
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.fingerprint import DOCUMENT_TOKENS, IndexMatch, match_index, part_names, stores_embeddings
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.record_format import RecordFormat

OVERFLOWS = ("truncate", "chunk", "error")
"""For documents that are longer than the model's limit: cut them, split them into several rows, or raise."""
_EMBEDDINGS = ("context", "context_scale")
"""Fields of E_0."""
_READ_DOCUMENTS = 4096
"""Documents read at once."""
_TIMED_TEXTS = 64
"""Texts that an estimate encodes to measure the time."""


class EncodeRows(Protocol):
    """As `MixEncoder.encode_rows`."""

    def __call__(self, rows: Sequence[Sequence[int]], *, batch_size: int) -> Tensor:
        """Encode token ids, special tokens included: (N, k, d)."""


class DocumentEncoder(NamedTuple):
    """The parts of an engine that an index uses."""

    model: MixEncoderModel
    """Its weights must not change while an index uses it."""
    identity: ModelIdentity
    read: TextEncoder
    """Turns documents into token ids, within the engine's limit of document tokens."""
    encode_rows: EncodeRows
    """Turns token ids into context embeddings (N, k, d)."""

    def match(self, manifest: Manifest, *, version: int | None = None) -> IndexMatch:
        """Compare an index with the model and its limit of document tokens; version as in `match_index`."""
        limit = self.read.max_length
        return match_index(self.model, self.identity, manifest, version=version, document_tokens=limit)


class IndexAdapter:
    """The functions with which an index turns texts and embeddings into stored rows, for one model and one format.

    Args:
        encoder: encodes the documents.
        precision, layout: how candidates are stored, as in `mixencoder.ranking.record_format`.
        on_overflow: one of `OVERFLOWS`.

    Raises:
        InputError: precision, layout or on_overflow is unknown, or the model has no ranking head.
    """

    def __init__(self, encoder: DocumentEncoder, precision: str, layout: str, on_overflow: str) -> None:
        encoder.model.check_head("ranking")
        if on_overflow not in OVERFLOWS:
            raise InputError(f"on_overflow is {on_overflow!r}; expected one of {', '.join(OVERFLOWS)}")
        self._encoder, self._on_overflow = encoder, on_overflow
        self.record_format = RecordFormat(encoder.model, layout, precision)
        self.settings = {"precision": precision, "layout": layout, "on_overflow": on_overflow}

    def create(self, path: str | Path | None, *, store_text: bool) -> CandidateIndex:
        """Create an empty index, to be filled by `CandidateIndex.build`."""
        return CandidateIndex.create(
            path,
            self.record_format.schema,
            self._fingerprint(),
            encode=self.encode,
            project=self.project,
            check_adding=self.check_adding,
            settings=self.settings,
            store_text=store_text,
        )

    def encode(self, texts: Sequence[str], *, batch_size: int) -> Encoded:
        """Turn texts into stored rows; an `mixencoder.index.writer.Encode`."""
        windows = self._encoder.read.windows(
            texts, on_overflow=self._on_overflow, advice=' (on_overflow="chunk" keeps all of them)'
        )
        with inference_context(self._encoder.model):
            context = self._encoder.encode_rows([row for rows in windows.rows for row in rows], batch_size=batch_size)
            return Encoded(self.record_format.encode(context), [len(rows) for rows in windows.rows], windows.cut)

    def project(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Turn given context embeddings (N, k, d), with k = 1 also (N, d), into stored rows.

        Raises:
            InputError: an embedding is zero, so that it cannot be scaled to the length that the model expects.
        """
        model, context = self._encoder.model, embeddings
        if context.dim() == 2 and model.context_shape[0] == 1:
            context = context.unsqueeze(1)
        if model.config.context_norm is not None and not context.flatten(1).any(dim=1).all():
            raise InputError(
                f"an embedding is zero, and cannot be scaled to the length {model.config.context_norm:.4g} of this "
                "model's context embeddings; expected vectors of texts"
            )
        with inference_context(model):
            return self.record_format.encode(model.scaled_contexts(context))

    def check_adding(self, what: str, manifest: Manifest) -> None:
        """Raise if what `encode` and `project` make does not belong in an index; a `CheckAdding`."""
        self._encoder.match(manifest, version=weights_version(self._encoder.model)).check_adding(what)

    def converted(self, stored: RecordFormat, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn rows stored in another format, which has E_0, into rows of this one."""
        model, rows = self._encoder.model, len(fields["context"])
        with inference_context(model):
            context = torch.empty(rows, *model.context_shape, dtype=model.dtype, device="cpu")
            stored.read(fields, 0, rows, {"context": context}, 0)
            found = self.record_format.encode(context)
        if stored.precision == self.record_format.precision:
            # int8 numbers would not stay the same if they were scaled and rounded again
            found |= {name: field for name, field in fields.items() if name in found and name in _EMBEDDINGS}
        return found

    def silence_warnings(self) -> None:
        """Give no warnings of texts that are cut or have no tokens."""
        self._encoder = self._encoder._replace(read=self._encoder.read.quiet())

    def _fingerprint(self) -> dict[str, str]:
        """Return a new index's fingerprint: the model, and its limit of document tokens."""
        identity, parts = self._encoder.identity, part_names(self.record_format.layout)
        return {"name": identity.name, **identity.parts(parts), DOCUMENT_TOKENS: str(self._encoder.read.max_length)}


def open_index(
    encoder: DocumentEncoder,
    path: str | Path | Iterable[str | Path],
    *,
    read_only: bool,
    check_sizes: bool,
    verify: bool,
) -> CandidateIndex:
    """Open an index that this model can rank, or several as one.

    Raises:
        IndexMismatchError: it was made with another encoder or other settings; the message names both.
        IndexStateError: there is no index, or it is unfinished.
        IndexDamagedError: the index is damaged.
    """
    shards = shard_paths(path)
    if shards is None:
        assert isinstance(path, str | Path), "a list of paths is that of shards"
        return _open_single(encoder, path, read_only=read_only, check_sizes=check_sizes, verify=verify)
    options = {"read_only": True, "check_sizes": check_sizes, "verify": verify}
    opened = [_open_single(encoder, shard, **options) for shard in shards]
    return ShardedIndex(opened, local_path(path) if isinstance(path, str | Path) else None)


def _open_single(
    encoder: DocumentEncoder, path: str | Path, *, read_only: bool, check_sizes: bool, verify: bool
) -> CandidateIndex:
    manifest = CandidateIndex.read_manifest(path)
    encoder.match(manifest).check_ranking(str(path))
    settings, known = manifest.settings, ("precision", "layout", "on_overflow")
    if set(settings) != set(known):
        raise IndexDamagedError(f"{path} has the settings {', '.join(settings) or 'none'}; expected {', '.join(known)}")
    adapter = IndexAdapter(encoder, **settings)
    functions = {"encode": adapter.encode, "project": adapter.project, "check_adding": adapter.check_adding}
    options = {"read_only": read_only, "check_sizes": check_sizes, "verify": verify}
    return CandidateIndex.open(path, manifest.fingerprint, **functions, **options)


def project_index(
    encoder: DocumentEncoder,
    index: CandidateIndex,
    path: str | Path | None,
    *,
    precision: str | None,
    layout: str,
    show_progress_bar: bool | None,
) -> CandidateIndex:
    """Copy an index of the same encoder with this model's projections; see `MixEncoder.project_index`."""
    if not isinstance(index, CandidateIndex):
        raise InputError(f"index is a {type(index).__name__}; expected an index, as open_index() returns it")
    source = index.snapshot()
    manifest, name = source.manifest, "the index" if index.path is None else str(index.path)
    encoder.match(manifest).check_ranking(name)
    settings = manifest.settings
    _check_embeddings(name, manifest)
    if not (report := index.verify()).ok:
        raise IndexDamagedError(f"{name} is damaged; nothing was copied: {report.damages[0]}")
    precision = settings["precision"] if precision is None else precision
    adapter = IndexAdapter(encoder, precision, layout, settings["on_overflow"])
    stored = RecordFormat(encoder.model, "compact", settings["precision"])
    made = adapter.create(path, store_text=manifest.store_text)
    made.build_from(source, partial(adapter.converted, stored), show_progress_bar=show_progress_bar)
    return made


def read_embeddings(encoder: DocumentEncoder, index: CandidateIndex | Snapshot, ids: Sequence[str]) -> Tensor:
    """Read the context embeddings (n, k, d) of documents out of an index of the same encoder, in the model's dtype.

    Raises:
        IndexMismatchError: another encoder made the index, or it stores no context embeddings.
        UnknownIdError: there is no such document.
        InputError: a document has several rows (on_overflow="chunk").
    """
    model, view = encoder.model, index if isinstance(index, Snapshot) else index.snapshot()
    manifest = view.manifest
    encoder.match(manifest, version=weights_version(model)).check_ranking("the index")
    _check_embeddings("the index", manifest)
    stored = RecordFormat(model, "compact", manifest.settings["precision"])
    positions = view.positions(ids)
    found = torch.empty(len(ids), *model.context_shape, dtype=model.dtype, device="cpu")
    for first in range(0, len(ids), _READ_DOCUMENTS):
        part = positions[first : first + _READ_DOCUMENTS]
        chunk = view.gather(part)
        if len(chunk.positions) > len(part):
            raise InputError(
                'a document of the index has several rows; expected an index without on_overflow="chunk", or other ids'
            )
        stored.read(chunk.fields, 0, len(part), {"context": found}, first)
    return found


def _check_embeddings(what: str, manifest: Manifest) -> None:
    if not stores_embeddings(manifest):
        raise IndexMismatchError(
            f"{what} stores only the mean of the context embeddings (its model does not update contexts); expected an "
            "index that stores all of them. Build a new index from the texts"
        )


def estimate_index(
    encoder: DocumentEncoder,
    documents: Sequence[str],
    *,
    precision: str,
    layout: str,
    on_overflow: str,
    batch_size: int,
) -> BuildEstimate:
    """Estimate the size of an index of documents and the time to build it, by encoding a few of them.

    Raises:
        InputError: documents is empty, or an option or a text cannot be used.
    """
    if not documents:
        raise InputError("documents is empty; expected at least one text")
    adapter = IndexAdapter(encoder, precision, layout, on_overflow)
    # the user gets the warnings when the index is built
    adapter.silence_warnings()
    # evenly spread, as documents may be sorted by length
    sample = [documents[number * len(documents) // _TIMED_TEXTS] for number in range(_TIMED_TEXTS)]
    sample = sample if len(documents) > _TIMED_TEXTS else list(documents)
    # warm up: the first pass of a process is slower than later ones
    adapter.encode(sample[:1], batch_size=batch_size)
    start = time.perf_counter()
    rows = sum(adapter.encode(sample, batch_size=batch_size).row_counts)
    seconds = (time.perf_counter() - start) * len(documents) / len(sample)
    text_bytes = sum(len(text.encode()) for text in documents) // len(documents)
    schema = adapter.record_format.schema
    catalogue = CandidateIndex.estimate(schema, len(documents), text_bytes=text_bytes).catalogue
    array_bytes = round(len(documents) * rows / len(sample)) * schema.row_bytes
    return BuildEstimate(len(documents), array_bytes, catalogue, seconds)
