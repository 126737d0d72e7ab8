"""`create_app(rank_stored=...)`: candidates of the index are ranked elsewhere, the rest as ever."""

import pytest

from tests.serving.cases import DOCUMENTS, IDS, METADATA, OTHER_QUERY, QUERY, expected


@pytest.fixture
def elsewhere(model, open_index, stored):
    """Return a client, the calls that were ranked elsewhere, and a list of errors to raise there."""
    from fastapi.testclient import TestClient

    from mixencoder.serving.app import create_app
    from mixencoder.serving.settings import ServeConfig

    index, calls, errors = open_index(stored, read_only=True), [], []

    def rank_stored(engine, queries, top_k, ids):
        calls.append((queries, top_k, ids))
        if errors:
            raise errors[0]
        return engine.rank(queries, index, top_k, ids=ids)

    app = create_app(ServeConfig(), model, index, rank_stored=rank_stored)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, calls, errors


def test_the_index_is_ranked_by_the_function(elsewhere, model, client):
    found, calls, _ = elsewhere
    body = {"queries": [QUERY, OTHER_QUERY], "ids": "all", "top_k": 3, "return_texts": True}
    assert found.post("/v1/rank", json=body).json() == client.post("/v1/rank", json=body).json()
    assert calls == [([QUERY, OTHER_QUERY], 3, None)]
    body = {"query": QUERY, "ids": IDS[:2]}
    answer = found.post("/rerank", json=body).json()
    assert answer == client.post("/rerank", json=body).json()
    assert calls[1:] == [([QUERY], None, IDS[:2])]
    assert {hit["id"]: hit["metadata"] for hit in answer} == dict(zip(IDS[:2], METADATA[:2], strict=True))
    assert found.post("/rerank", json={"query": QUERY, "ids": ["nobody"]}).status_code == 404
    # texts are the server's own
    answer = found.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}).json()
    assert [(hit["index"], hit["score"]) for hit in answer] == expected(model, QUERY)
    assert len(calls) == 3


def test_its_error_is_the_answer(elsewhere):
    from mixencoder.serving.errors import RequestError

    found, _, errors = elsewhere
    errors.append(RequestError(503, "unhealthy", "a shard did not answer", {"Retry-After": "1"}))
    for ids in ("all", IDS[:1]):
        answer = found.post("/rerank", json={"query": QUERY, "ids": ids})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["error"] == "a shard did not answer"
    assert found.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}).status_code == 200
    errors.clear()
    assert found.post("/rerank", json={"query": QUERY, "ids": "all"}).status_code == 200
