"""Haystack: `MixEncoderRanker`, a ranker component that pipelines can save and load."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from mixencoder.integrations.shared import Reranker, missing

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise missing("haystack-ai", error) from error


@component
class MixEncoderRanker:
    """Keep the best of the documents, best first, each with its score. The given documents stay as they are.

    Args:
        model: the directory or hub id of a checkpoint, or None for the bundled default; loaded at `warm_up`.
        top_k: how many to keep; None keeps all.
        index: the folder of an index of the documents, by their ids; None encodes their texts in every call.
        device, dtype: as in `MixEncoder.from_pretrained`; names, so that a pipeline can be saved.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        top_k: int | None = 10,
        *,
        index: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.model, self.top_k, self.index, self.device, self.dtype = model, top_k, index, device, dtype
        self._reranker: Reranker | None = None

    def warm_up(self) -> None:
        """Load the model, once."""
        self._warm()

    def to_dict(self) -> dict[str, Any]:
        """Return this component as a pipeline saves it."""
        paths = {name: None if value is None else str(value) for name, value in self._names().items()}
        return default_to_dict(self, top_k=self.top_k, **paths)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MixEncoderRanker":
        """Make a component from what `to_dict` returned."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Rank documents; one without text is read as "".

        Args:
            query: a text.
            documents: to rank.
            top_k: None takes that of the component.
        """
        texts, ids = [document.content or "" for document in documents], [document.id for document in documents]
        best = self._warm().order(query, texts, ids, self.top_k if top_k is None else top_k)
        return {
            "documents": [dataclasses.replace(documents[position], score=score) for position, score in best],
        }

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """As `run`, in a thread."""
        return await asyncio.to_thread(self.run, query, documents, top_k)

    def _names(self) -> dict[str, Any]:
        return {"model": self.model, "index": self.index, "device": self.device, "dtype": self.dtype}

    def _warm(self) -> Reranker:
        if self._reranker is None:
            self._reranker = Reranker(**self._names())
        return self._reranker
