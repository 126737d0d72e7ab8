"""LlamaIndex: `MixEncoderRerank`, a node postprocessor."""

from typing import Any

from mixencoder.integrations.shared import Index, Model, Reranker, missing, name_of

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing("llama-index-core", error) from error


class MixEncoderRerank(BaseNodePostprocessor):
    """Keep the nodes that fit a query best, best first. The given nodes stay as they are.

    A node is read as LlamaIndex reads it for embeddings, that is with its metadata. `apostprocess_nodes` runs in a
    thread.

    Args:
        model: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        index: an index of the nodes, by their ids, or its folder; None encodes their texts in every call.
        top_n: how many to keep.
        keep_retrieval_score: store a node's earlier score in ``metadata["retrieval_score"]``.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    model: str = Field(description="Name of the model.")
    top_n: int = Field(default=2, description="Number of nodes to return.")
    keep_retrieval_score: bool = Field(default=False, description="Whether to keep the earlier score in metadata.")
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: Model = None,
        *,
        index: Index = None,
        top_n: int = 2,
        keep_retrieval_score: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model=name_of(model) or "bundled", top_n=top_n, keep_retrieval_score=keep_retrieval_score)
        self._reranker = Reranker(model, index, **options)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex knows this class."""
        return "MixEncoderRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("there is no query; expected query_bundle or query_str")
        query = query_bundle.query_str
        payload = {EventPayload.NODES: nodes, EventPayload.MODEL_NAME: self.model, EventPayload.QUERY_STR: query}
        with self.callback_manager.event(
            CBEventType.RERANKING, payload={**payload, EventPayload.TOP_K: self.top_n}
        ) as event:
            texts = [found.node.get_content(metadata_mode=MetadataMode.EMBED) for found in nodes]
            ids = [found.node.node_id for found in nodes]
            best = [
                NodeWithScore(node=self._node(nodes[position]), score=score)
                for position, score in self._reranker.order(query, texts, ids, self.top_n)
            ]
            event.on_end(payload={EventPayload.NODES: best})
        return best

    def _node(self, found: NodeWithScore) -> Any:
        if not self.keep_retrieval_score:
            return found.node
        return found.node.model_copy(update={"metadata": {**found.node.metadata, "retrieval_score": found.score}})
