"""From a `MixEncoder` to its candidate indexes: what an index needs of a model, and ranking over one.

`mixencoder.index` stores rows and knows no model; here a model says how texts become rows, what it is, so that no other
model's rows are read with it, and how rows are ranked. `mixencoder.fast` calls this.
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
"""What becomes of documents that are longer than the model reads: cut, split into several rows, or refused."""
_TIMED_TEXTS = 64
"""Texts of typical length that an estimate encodes to tell the time."""


class EncodeRows(Protocol):
    """As `MixEncoder.encode_rows`."""

    def __call__(self, rows: Sequence[Sequence[int]], *, batch_size: int) -> Tensor:
        """Encode token ids, special tokens included: (N, k, d)."""


class DocumentEncoder(NamedTuple):
    """What an index needs of an engine."""

    model: MixEncoderModel
    """Its weights must stay as they are."""
    identity: ModelIdentity
    read: TextEncoder
    """From texts to token ids, as the engine cuts documents."""
    encode_rows: EncodeRows
    """From token ids to context embeddings (N, k, d)."""


class IndexAdapter:
    """How one model fills and reads indexes of one format.

    Args:
        encoder: of the documents.
        precision, layout: how candidates are stored, of `mixencoder.ranking.record_format`.
        on_overflow: of `OVERFLOWS`.

    Raises:
        InputError: there is no such precision, layout or overflow, or the model has no ranking head.
    """

    def __init__(self, encoder: DocumentEncoder, precision: str, layout: str, on_overflow: str) -> None:
        encoder.model.check_head("ranking")
        if on_overflow not in OVERFLOWS:
            raise InputError(f"on_overflow is {on_overflow!r}; expected one of {', '.join(OVERFLOWS)}")
        self._encoder, self._on_overflow = encoder, on_overflow
        self.record_format = RecordFormat(encoder.model, layout, precision)
        self.settings = {"precision": precision, "layout": layout, "on_overflow": on_overflow}

    def create(self, path: str | Path | None, *, store_text: bool) -> CandidateIndex:
        """Make an index for `CandidateIndex.build` to fill."""
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
        """Turn texts into stored rows, as `mixencoder.index.writer.Encode` asks for."""
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

    def warn_of_nothing(self) -> None:
        """Leave out the warnings of texts that are cut or hold no token."""
        self._encoder = self._encoder._replace(read=self._encoder.read.quiet())


def open_index(
    encoder: DocumentEncoder, path: str | Path, *, read_only: bool, check_sizes: bool, verify: bool
) -> CandidateIndex:
    """Open an index that this model made.

    Raises:
        IndexMismatchError: another model, or other settings, made it; the message names both.
        IndexStateError, IndexDamagedError: there is none, or it is unfinished or damaged.
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
    """Tell what an index of documents will take, before any work but encoding a few of them.

    Raises:
        InputError: there is no document, or an option or a text cannot be used.
    """
    if not documents:
        raise InputError("documents is empty; expected at least one text")
    adapter = IndexAdapter(encoder, precision, layout, on_overflow)
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


def fingerprint(encoder: DocumentEncoder) -> dict[str, str]:
    """Return what tells the rows of a model from another's: the model, and how documents are cut for it."""
    identity = encoder.identity
    return {"name": identity.name, **identity.parts(), "document tokens": str(encoder.read.max_length)}
