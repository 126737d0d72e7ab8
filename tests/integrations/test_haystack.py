"""Haystack ranks documents with our component, also in a pipeline that was saved."""

import asyncio
import copy
import warnings

import pytest

pytest.importorskip("haystack", reason="haystack-ai is not installed")

from haystack import Document, Pipeline

from mixencoder.integrations.haystack import MixEncoderRanker
from tests.integrations.texts import QUERY, TEXTS


@pytest.fixture
def documents():
    return [Document(id=f"d{n}", content=text, meta={"source": n}, score=0.5) for n, text in enumerate(TEXTS)]


def test_the_best_documents_are_kept_with_scores_and_meta(model, checkpoint, documents):
    before = copy.deepcopy(documents)
    with warnings.catch_warnings():
        # Haystack warns of documents that are changed in place
        warnings.simplefilter("error")
        best = MixEncoderRanker(checkpoint, top_k=2).run(QUERY, documents)["documents"]
    assert documents == before
    expected = model.rank(QUERY, TEXTS, top_k=2)
    assert [document.id for document in best] == [f"d{entry['corpus_id']}" for entry in expected]
    assert [document.score for document in best] == [entry["score"] for entry in expected]
    assert [document.meta for document in best] == [{"source": entry["corpus_id"]} for entry in expected]


def test_documents_without_text_and_empty_lists_are_no_error(checkpoint):
    ranker = MixEncoderRanker(checkpoint)
    assert ranker.run(QUERY, []) == {"documents": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ranker.run(QUERY, [Document(content=None, meta={"a": 1}), Document(content="rice")])
        assert len(found["documents"]) == 2


def test_top_k_of_a_call_has_priority(checkpoint, documents):
    ranker = MixEncoderRanker(checkpoint, top_k=3)
    assert len(ranker.run(QUERY, documents)["documents"]) == 3
    assert len(ranker.run(QUERY, documents, top_k=1)["documents"]) == 1


def test_a_pipeline_is_saved_loaded_and_run(checkpoint, documents):
    pipeline = Pipeline()
    pipeline.add_component("ranker", MixEncoderRanker(checkpoint, top_k=2, device="cpu", dtype="float32"))
    result = pipeline.run({"ranker": {"query": QUERY, "documents": documents}})
    loaded = Pipeline.loads(pipeline.dumps(), allowed_modules=["mixencoder.integrations.haystack"])
    assert loaded.run({"ranker": {"query": QUERY, "documents": documents}}) == result
    settings = pipeline.to_dict()["components"]["ranker"]["init_parameters"]
    assert settings == {"model": checkpoint, "top_k": 2, "index": None, "device": "cpu", "dtype": "float32"}
    assert MixEncoderRanker.from_dict(MixEncoderRanker(None).to_dict()).model is None


def test_async_gives_the_same(checkpoint, documents):
    ranker = MixEncoderRanker(checkpoint, top_k=3)
    assert asyncio.run(ranker.run_async(QUERY, documents)) == ranker.run(QUERY, documents)


def test_documents_of_an_index_are_ranked_without_their_texts(model, checkpoint, documents, tmp_path):
    path = tmp_path / "index"
    model.index(TEXTS, [document.id for document in documents], path, precision="float32").close()
    ranker = MixEncoderRanker(checkpoint, index=path)
    assert MixEncoderRanker.from_dict(ranker.to_dict()).index == str(path)
    stored = ranker.run(QUERY, [Document(id=document.id, content="") for document in documents])["documents"]
    from_texts = MixEncoderRanker(checkpoint).run(QUERY, documents)["documents"]
    assert [document.id for document in stored] == [document.id for document in from_texts]
