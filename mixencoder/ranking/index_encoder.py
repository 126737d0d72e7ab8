"""Create, fill, open and estimate indexes for a model. `mixencoder.fast` is the caller.

`mixencoder.index` stores rows and knows no model. This file connects the two: it gives an index the functions that turn
texts into rows, and the fingerprint by which an index made by another model is rejected.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mixencoder.base.inference_context import inference_context
from mixencoder.base.tokenization import TextEncoder
from mixencoder.errors import IndexDamagedError, InputError
from mixencoder.index import CandidateIndex, Encoded
from mixencoder.index.candidate_index import BuildEstimate
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.record_format import RecordFormat

OVERFLOWS = ("truncate", "chunk", "error")
"""For documents that are longer than the model's limit: cut them, split them into several rows, or raise."""
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
            fingerprint(self._encoder),
            encode=self.encode,
            project=self.project,
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
        """Turn given context embeddings (N, k, d) into stored rows."""
        with inference_context(self._encoder.model):
            return self.record_format.encode(torch.as_tensor(embeddings))

    def silence_warnings(self) -> None:
        """Give no warnings of texts that are cut or have no tokens."""
        self._encoder = self._encoder._replace(read=self._encoder.read.quiet())


def open_index(
    encoder: DocumentEncoder, path: str | Path, *, read_only: bool, check_sizes: bool, verify: bool
) -> CandidateIndex:
    """Open an index that was made with this model.

    Raises:
        IndexMismatchError: it was made with another model or other settings; the message names both.
        IndexStateError: there is no index, or it is unfinished.
        IndexDamagedError: the index is damaged.
    """
    options: dict[str, Any] = {"read_only": read_only, "check_sizes": check_sizes}
    made_by = fingerprint(encoder)
    with CandidateIndex.open(path, made_by, **options) as index:
        settings = index.settings
    known = ("precision", "layout", "on_overflow")
    if set(settings) != set(known):
        raise IndexDamagedError(f"{path} has the settings {', '.join(settings) or 'none'}; expected {', '.join(known)}")
    adapter = IndexAdapter(encoder, **settings)
    options["verify"] = verify
    return CandidateIndex.open(path, made_by, encode=adapter.encode, project=adapter.project, **options)


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


def fingerprint(encoder: DocumentEncoder) -> dict[str, str]:
    """Return an index's fingerprint: the model, and its limit of document tokens."""
    identity = encoder.identity
    return {"name": identity.name, **identity.parts(), "document tokens": str(encoder.read.max_length)}
