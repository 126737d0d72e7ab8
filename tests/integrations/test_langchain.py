"""LangChain ranks with our adapters: the real interfaces, in retrievers' order of calls."""

import asyncio
import copy

import pytest

from mixencoder import InputError, UnknownIdError

pytest.importorskip("langchain_core", reason="langchain-core is not installed")

from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda

from mixencoder.integrations.langchain import MixEncoderCompressor, MixEncoderCrossEncoder
from tests.integrations.texts import QUERY, TEXTS


@pytest.fixture
def documents():
    return [Document(text, id=f"d{n}", metadata={"source": n}) for n, text in enumerate(TEXTS)]


def test_pairs_are_scored_as_by_the_model(model, checkpoint):
    cross_encoder = MixEncoderCrossEncoder(checkpoint)
    assert isinstance(cross_encoder, BaseCrossEncoder)
    pairs = [(QUERY, text) for text in TEXTS]
    scores = cross_encoder.score(pairs)
    assert scores == model.predict(pairs).tolist()
    assert all(type(score) is float for score in scores)
    assert cross_encoder.score([]) == []


def test_the_best_documents_are_kept_with_scores_and_metadata(model, documents):
    compressor = MixEncoderCompressor(model, top_n=2)
    assert isinstance(compressor, BaseDocumentCompressor)
    before = copy.deepcopy(documents)
    best = compressor.compress_documents(documents, QUERY)
    assert documents == before
    expected = model.rank(QUERY, TEXTS, top_k=2)
    assert [document.page_content for document in best] == [TEXTS[entry["corpus_id"]] for entry in expected]
    for document, entry in zip(best, expected, strict=True):
        assert document.id == f"d{entry['corpus_id']}"
        assert document.metadata == {"source": entry["corpus_id"], "relevance_score": entry["score"]}
    assert len(MixEncoderCompressor(model, top_n=None).compress_documents(documents, QUERY)) == len(TEXTS)
    assert compressor.compress_documents([], QUERY) == []


def test_async_and_runnables_give_the_same(model, documents):
    compressor = MixEncoderCompressor(model, top_n=3)
    best = compressor.compress_documents(documents, QUERY)
    assert asyncio.run(compressor.acompress_documents(documents, QUERY)) == best
    chain = RunnableLambda(lambda query: documents) | RunnableLambda(
        lambda found: compressor.compress_documents(found, QUERY)
    )
    assert chain.invoke(QUERY) == best


def test_documents_of_an_index_are_ranked_without_their_texts(model, documents, tmp_path):
    model.index(TEXTS, [document.id for document in documents], tmp_path / "index", precision="float32").close()
    from_texts = MixEncoderCompressor(model, top_n=None).compress_documents(documents, QUERY)
    blank = [document.model_copy(update={"page_content": ""}) for document in documents]
    # a retriever that joins several lists may find a document twice
    stored = MixEncoderCompressor(model, index=tmp_path / "index", top_n=None).compress_documents(
        [*blank, blank[0]], QUERY
    )
    assert list(dict.fromkeys(document.id for document in stored)) == [document.id for document in from_texts]
    assert len(stored) == len(documents) + 1
    with pytest.raises(UnknownIdError):
        MixEncoderCompressor(model, index=tmp_path / "index").compress_documents([Document("x", id="no")], QUERY)
    with pytest.raises(InputError, match="document 0 has no id"):
        MixEncoderCompressor(model, index=tmp_path / "index").compress_documents([Document("x")], QUERY)
