"""What the adapters share: an engine by name, and the ranking of documents, by text or out of an index."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mixencoder.architectures import load_engine
from mixencoder.base.engine import Engine
from mixencoder.errors import InputError, MissingExtraError
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex, Snapshot

Model = Engine | str | Path | None
"""An engine, or the directory or hub id of a checkpoint; None is the bundled default."""
Index = CandidateIndex | Snapshot | str | Path | None
"""An index of the documents, or its folder; None encodes the documents' texts in every call."""


def missing(package: str, error: ImportError) -> MissingExtraError:
    """Return the error for a framework that is not installed."""
    return MissingExtraError(f"this adapter needs {package}: pip install {package} ({error})")


def engine_of(
    model: Model = None, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> Engine:
    """Return an engine as it is, or load the checkpoint of any architecture that a name says.

    Raises:
        CheckpointError, InputError: as `mixencoder.architectures.load_engine`.
    """
    return model if isinstance(model, Engine) else load_engine(model, device=device, dtype=dtype)


def name_of(model: Model) -> str | None:
    """Return the name of a model: its directory or hub id; None for the bundled default."""
    if isinstance(model, Engine):
        return getattr(model.config, "name_or_path", "") or type(model).__name__
    return None if model is None else str(model)


class Reranker:
    """Order the documents that a framework retrieved.

    Args:
        model: as in `Model`; device and dtype as in `MixEncoder.from_pretrained`.
        index: as in `Index`. Documents are then looked up by id, and their texts are not read.

    Raises:
        CheckpointError, InputError, IndexStateError, IndexMismatchError: model or index cannot be used.
    """

    def __init__(
        self,
        model: Model = None,
        index: Index = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        self.engine = engine_of(model, device=device, dtype=dtype)
        if index is not None and not isinstance(self.engine, MixEncoder):
            raise InputError(f"the model is a {type(self.engine).__name__}; an index needs a MixEncoder")
        if isinstance(index, str | Path):
            assert isinstance(self.engine, MixEncoder), "checked above"
            index = self.engine.open_index(index, read_only=True)
        self.index = index

    def order(
        self, query: str, texts: Sequence[str], ids: Sequence[str | None], top_k: int | None = None
    ) -> list[tuple[int, float]]:
        """Return positions and scores of documents, best first, ties to the lower position; [] if there are none.

        Args:
            query: a text.
            texts, ids: of the documents. Ids are read only with an index, where an id may occur several times.
            top_k: how many to return; None returns all.

        Raises:
            InputError: with an index, a document has no id.
            UnknownIdError: the index does not hold one of the ids.
        """
        if not texts:
            return []
        if self.index is None:
            return [(entry["corpus_id"], entry["score"]) for entry in self.engine.rank(query, texts, top_k)]
        positions: dict[str, list[int]] = {}
        for position, name in enumerate(ids):
            if name is None:
                raise InputError(f"document {position} has no id; expected one of the index")
            positions.setdefault(name, []).append(position)
        assert isinstance(self.engine, MixEncoder), "__init__ raises otherwise"
        ranking = self.engine.rank(query, self.index, ids=list(positions), prefilter=None)
        found = [(position, entry["score"]) for entry in ranking for position in positions[entry["id"]]]
        # a position of the index orders ties there, one of the list here
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))[:top_k]
