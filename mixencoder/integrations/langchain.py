"""LangChain: `MixEncoderCrossEncoder` scores pairs, `MixEncoderCompressor` reranks retrieved documents."""

from collections.abc import Sequence
from typing import Any

from mixencoder.integrations.shared import Index, Model, Reranker, engine_of, missing

try:
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import ConfigDict, PrivateAttr
except ImportError as error:
    raise missing("langchain-core", error) from error


class MixEncoderCrossEncoder(BaseCrossEncoder):
    """Score pairs of texts, for example for LangChain's ``CrossEncoderReranker``; equal texts are encoded once.

    Args:
        model: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    def __init__(self, model: Model = None, **options: Any) -> None:
        self.engine = engine_of(model, **options)

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Return the score of each (query, document) pair."""
        return self.engine.predict(text_pairs, head="ranking").tolist()


class MixEncoderCompressor(BaseDocumentCompressor):
    """Keep the best of the retrieved documents, best first, each with its score in ``metadata["relevance_score"]``.

    The given documents stay as they are. `acompress_documents` runs in a thread.

    Args:
        model: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        index: an index of the documents, by their ids, or its folder; None encodes their texts in every call.
        top_n: how many to keep; None keeps all.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    model_config = ConfigDict(extra="forbid")

    top_n: int | None = 3
    _reranker: Reranker = PrivateAttr()

    def __init__(self, model: Model = None, *, index: Index = None, top_n: int | None = 3, **options: Any) -> None:
        super().__init__(top_n=top_n)
        self._reranker = Reranker(model, index, **options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: object = None
    ) -> Sequence[Document]:
        """Return copies of the best documents; callbacks are not used."""
        texts, ids = [document.page_content for document in documents], [document.id for document in documents]
        return [
            documents[position].model_copy(
                update={"metadata": {**documents[position].metadata, "relevance_score": score}}
            )
            for position, score in self._reranker.order(query, texts, ids, self.top_n)
        ]
