"""The package rerankers ranks with our ranker."""

import asyncio
import copy

import pytest

pytest.importorskip("rerankers", reason="rerankers is not installed")

from rerankers import Document
from rerankers.models.ranker import BaseRanker

from mixencoder.integrations.rerankers import MixEncoderRanker
from tests.integrations.texts import QUERY, TEXTS


def test_texts_are_ranked_and_scored(model, checkpoint):
    ranker = MixEncoderRanker(checkpoint)
    assert isinstance(ranker, BaseRanker)
    results = ranker.rank(QUERY, TEXTS, doc_ids=["a", "b", "c", "d"], metadata=[{"n": n} for n in range(4)])
    expected = model.rank(QUERY, TEXTS, ids=["a", "b", "c", "d"])
    assert [(found.doc_id, found.score) for found in results] == [(entry["id"], entry["score"]) for entry in expected]
    assert [found.rank for found in results] == [1, 2, 3, 4]
    assert [found.metadata["n"] for found in results] == [entry["corpus_id"] for entry in expected]
    assert results.top_k(1)[0].text == TEXTS[expected[0]["corpus_id"]]
    assert results.get_score_by_docid("c") == ranker.score(QUERY, TEXTS[2])
    assert results.query == QUERY


def test_given_documents_stay_as_they_are(model):
    ranker = MixEncoderRanker(model)
    documents = [Document(text, doc_id=n, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    documents[3].doc_id = None
    before = [copy.deepcopy(vars(document)) for document in documents]
    results = ranker.rank(QUERY, documents, doc_ids=["a", "b", "c", "d"])
    results[0].document.metadata["new"] = 1
    assert [vars(document) for document in documents] == before
    assert sorted(found.doc_id for found in results) == ["a", "b", "c", "d"]
    assert {found.doc_id for found in ranker.rank(QUERY, documents)} == {0, 1, 2, 3}
    assert [found.doc_id for found in ranker.rank(QUERY, TEXTS[0])] == [0]


def test_async_gives_the_same(model):
    ranker = MixEncoderRanker(model)
    results = asyncio.run(ranker.rank_async(QUERY, TEXTS))
    assert [(found.doc_id, found.score) for found in results] == [
        (found.doc_id, found.score) for found in ranker.rank(QUERY, TEXTS)
    ]


def test_documents_of_an_index_are_ranked_without_their_texts(model):
    index = model.index(TEXTS, ["0", "1", "2", "3"], precision="float32")
    blank = [Document("", doc_id=n) for n in range(4)]
    stored = MixEncoderRanker(model, index=index).rank(QUERY, blank)
    assert [found.doc_id for found in stored] == [found.doc_id for found in MixEncoderRanker(model).rank(QUERY, TEXTS)]
