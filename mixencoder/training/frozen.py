"""Encode the texts of the training data once, by an encoder that is not trained (``freeze_encoder``)."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixencoder.base.encoder_passes import EncoderPasses
from mixencoder.base.inference_context import inference_context
from mixencoder.base.tokenization import TextEncoder
from mixencoder.data.sources import Source
from mixencoder.errors import NonFiniteError
from mixencoder.fast import MixEncoder
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.progress import progress_bar

logger = logging.getLogger(__name__)

_PASS_TEXTS = 32


class StoredDocuments(NamedTuple):
    """Context embeddings that exist already."""

    numbers: dict[str, int]
    """Name of a document -> its row."""
    contexts: Tensor
    """(N, k, d), in the model's dtype."""


class FrozenEncodings:
    """Encodings of all queries and documents of the training data, in memory.

    Calling it makes the inputs of a batch, as `mixencoder.training.batches.TokenInputs` does for an encoder that is
    trained. Keys and values of queries are kept in float16, the rest in the model's dtype.

    Args:
        model: its encoder makes the encodings.
        read_query, read_document: tokenise and truncate.
        sources: the data.
        documents: those of an index, whose ids the data name; None: the data hold texts, which are encoded.

    Raises:
        NonFiniteError: the model's result is NaN or infinite.
    """

    def __init__(
        self,
        model: MixEncoderModel,
        read_query: TextEncoder,
        read_document: TextEncoder,
        sources: Sequence[Source],
        documents: StoredDocuments | None = None,
    ) -> None:
        examples = [example for source in sources for example in source.examples]
        self._model = model
        self._passes = EncoderPasses(model, read_query.tokenizer.pad_token_id or 0)
        self._queries = {text: number for number, text in enumerate(dict.fromkeys(e.query for e in examples))}
        with inference_context(model):
            self._encode_queries(read_query(list(self._queries)))
            if documents is None:
                texts = dict.fromkeys(text for e in examples for text in (*e.positives, *e.negatives))
                self._documents = {text: number for number, text in enumerate(texts)}
                self._contexts = self._encode_documents(read_document(list(texts)))
            else:
                self._documents, self._contexts = documents
        logger.info(
            "encoded %d queries and %d documents once: %.1f GB in memory",
            len(self._queries),
            len(self._documents),
            self.nbytes / 1e9,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all encodings."""
        tensors = [*self._keys, *self._values, self._contexts, self._pooled, self._first]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
        """Return arguments of `MixEncoderModel.forward` for queries and documents of the data."""
        rows = [self._queries[text] for text in queries]
        spans = [(self._offsets[row], self._offsets[row + 1]) for row in rows]
        dtype = self._contexts.dtype

        def padded(tokens: Tensor) -> Tensor:
            parts = [tokens[first:last].to(dtype) for first, last in spans]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        state = QueryState(
            tuple(map(padded, self._keys)),
            tuple(map(padded, self._values)),
            torch.tensor([last - first for first, last in spans]),
            None if self._pooled is None else self._pooled[rows],
            None if self._first is None else self._first[rows],
        )
        contexts = self._contexts[[self._documents[text] for text in documents]]
        # a mapping, whose tensors a trainer moves to the model's device
        return {"query_state": dict(vars(state)), "document_contexts": contexts}

    def _encode_queries(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0).tolist()
        self._offsets = [0, *ends]
        layers = range(len(self._model.interaction))
        keys: list[Tensor | None] = [None for _ in layers]
        values: list[Tensor | None] = [None for _ in layers]
        vectors: dict[str, Tensor | None] = {"pooled": None, "first": None}
        for numbers, state in self._run(rows, self._model.read_query, "Queries", alone=True):
            for kept, parts in ((keys, state.keys), (values, state.values)):
                for layer in layers:
                    part = parts[layer].cpu()
                    tokens = kept[layer] = _room(kept[layer], ends[-1], part[0], torch.float16)
                    for row, number in enumerate(numbers):
                        tokens[self._offsets[number] : ends[number]] = part[row, : len(rows[number])]
            for name in vectors:
                if (found := getattr(state, name)) is not None:
                    kept_vectors = vectors[name] = _room(vectors[name], len(rows), found, found.dtype)
                    kept_vectors[numbers] = found[: len(numbers)].cpu()
        self._keys, self._values = [_finite(part) for part in keys], [_finite(part) for part in values]
        self._pooled, self._first = vectors["pooled"], vectors["first"]

    def _encode_documents(self, rows: Sequence[Sequence[int]]) -> Tensor:
        contexts = torch.empty(len(rows), *self._model.context_shape, dtype=self._model.dtype)
        for numbers, part in self._run(rows, self._model.encode_document, "Documents", alone=False):
            contexts[numbers] = part[: len(numbers)].cpu()
        return _finite(contexts)

    def _run(self, rows: Sequence[Sequence[int]], encode: Any, name: str, *, alone: bool) -> Iterator[Any]:
        options = {"batch_size": _PASS_TEXTS, "device": self._model.device, "alone": alone}
        with progress_bar(len(rows), name, "text", None) as bar:
            for numbers, encoded in self._passes.run(rows, encode, **options):
                yield numbers, encoded
                bar.update(len(numbers))


def _room(kept: Tensor | None, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `kept`, or room for rows that are shaped as those of `like`."""
    return torch.empty(rows, *like.shape[1:], dtype=dtype) if kept is None else kept


def _finite(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "there is at least one text"
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            "the frozen encoder gives numbers that are NaN, infinite or beyond float16; expected a working encoder"
        )
    return tensor


def stored_documents(engine: MixEncoder, path: str | Path, sources: Sequence[Source]) -> StoredDocuments:
    """Read the embeddings of the documents that the data name by id out of an index.

    Raises:
        UnknownIdError: the index holds no such document.
        IndexMismatchError, IndexStateError, IndexDamagedError: the index cannot be used with this model.
    """
    examples = [example for source in sources for example in source.examples]
    ids = list(dict.fromkeys(name for e in examples for name in (*e.positives, *e.negatives)))
    with engine.open_index(path, read_only=True) as index:
        return StoredDocuments({name: row for row, name in enumerate(ids)}, engine.read_embeddings(index, ids))
