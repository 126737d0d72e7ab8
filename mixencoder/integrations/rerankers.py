"""The package rerankers: `MixEncoderRanker`, one of its rankers."""

import copy
from collections.abc import Sequence
from typing import Any

from mixencoder.integrations.shared import Index, Model, Reranker, missing

try:
    from rerankers.documents import Document
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result
except ImportError as error:
    raise missing("rerankers", error) from error


class MixEncoderRanker(BaseRanker):
    """Rank documents as the rankers of rerankers do. Given `Document` objects stay as they are.

    `rank_async` and `as_langchain_compressor` are those of the package.

    Args:
        model_name_or_path: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        verbose: not used; nothing is printed.
        index: an index of the documents, by their doc_ids as strings, or its folder.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    ranking_type = "pointwise"

    def __init__(
        self, model_name_or_path: Model = None, verbose: int = 1, *, index: Index = None, **options: Any
    ) -> None:
        self.verbose = verbose
        self._reranker = Reranker(model_name_or_path, index, **options)

    def score(self, query: str, doc: str) -> float:
        """Return the score of a pair."""
        return float(self._reranker.engine.predict((query, doc), head="ranking"))

    def rank(
        self,
        query: str,
        docs: str | Document | Sequence[str | Document],
        doc_ids: Sequence[str | int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> RankedResults:
        """Return all documents, best first.

        Args:
            query: a text.
            docs: texts or documents, or one of them.
            doc_ids, metadata: one for each document; None takes those of the documents, or positions and {}.
        """
        listed = [docs] if isinstance(docs, str | Document) else list(docs)
        made = [_copied(document, position) for position, document in enumerate(listed)]
        for name, values in (("doc_id", doc_ids), ("metadata", metadata)):
            if values is not None:
                for document, value in zip(made, values, strict=True):
                    setattr(document, name, value)
        ids = [None if document.doc_id is None else str(document.doc_id) for document in made]
        ordered = self._reranker.order(query, [document.text for document in made], ids)
        results = [
            Result(document=made[position], score=score, rank=rank)
            for rank, (position, score) in enumerate(ordered, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)


def _copied(document: str | Document, position: int) -> Document:
    if isinstance(document, str):
        return Document(document, doc_id=position)
    copied = copy.copy(document)
    copied.metadata = dict(document.metadata)
    if copied.doc_id is None:
        copied.doc_id = position
    return copied
