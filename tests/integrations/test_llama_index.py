"""LlamaIndex ranks nodes with our postprocessor."""

import asyncio

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from mixencoder.integrations.llama_index import MixEncoderRerank
from tests.integrations.texts import QUERY, TEXTS


@pytest.fixture
def nodes():
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{n}", metadata={"dog": n}), score=1.0 - n / 10)
        for n, text in enumerate(TEXTS)
    ]


def state(nodes):
    return [(found.score, found.node.node_id, dict(found.node.metadata)) for found in nodes]


def test_the_best_nodes_are_kept(model, nodes, checkpoint):
    rerank = MixEncoderRerank(checkpoint, top_n=2)
    assert isinstance(rerank, BaseNodePostprocessor)
    before = state(nodes)
    best = rerank.postprocess_nodes(nodes, query_str=QUERY)
    assert state(nodes) == before
    expected = model.rank(QUERY, [found.node.get_content(metadata_mode=MetadataMode.EMBED) for found in nodes], 2)
    assert [found.node.node_id for found in best] == [f"n{entry['corpus_id']}" for entry in expected]
    assert [found.score for found in best] == [entry["score"] for entry in expected]
    assert [found.node.metadata["dog"] for found in best] == [entry["corpus_id"] for entry in expected]
    assert rerank.postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ValueError, match="there is no query"):
        rerank.postprocess_nodes(nodes)


def test_async_gives_the_same(model, nodes):
    rerank = MixEncoderRerank(model, top_n=3)
    best = asyncio.run(rerank.apostprocess_nodes(nodes, query_bundle=QueryBundle(QUERY)))
    assert state(best) == state(rerank.postprocess_nodes(nodes, query_str=QUERY))


def test_the_retrieval_score_can_be_kept(model, nodes):
    before = state(nodes)
    best = MixEncoderRerank(model, top_n=4, keep_retrieval_score=True).postprocess_nodes(nodes, query_str=QUERY)
    assert state(nodes) == before
    for found in best:
        number = found.node.metadata["dog"]
        assert found.node.metadata["retrieval_score"] == 1.0 - number / 10
        assert found.node.text == TEXTS[number]


def test_nodes_of_an_index_are_ranked_without_their_texts(model, nodes):
    texts = [found.node.get_content(metadata_mode=MetadataMode.EMBED) for found in nodes]
    index = model.index(texts, [found.node.node_id for found in nodes], precision="float32")
    blank = [NodeWithScore(node=TextNode(text="", id_=found.node.node_id)) for found in nodes]
    stored = MixEncoderRerank(model, index=index, top_n=4).postprocess_nodes(blank, query_str=QUERY)
    from_texts = MixEncoderRerank(model, top_n=4).postprocess_nodes(nodes, query_str=QUERY)
    assert [found.node.node_id for found in stored] == [found.node.node_id for found in from_texts]


def test_settings_can_be_written_down(model):
    fields = MixEncoderRerank(model, top_n=5).to_dict()
    assert fields["top_n"] == 5
    assert fields["class_name"] == "MixEncoderRerank"
