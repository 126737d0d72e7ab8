"""Every dialect's answer holds the model's own numbers, in the dialect's form."""

import math

import pytest

from mixencoder import MixEncoder
from tests.serving.cases import DOCUMENTS, IDS, METADATA, OTHER_QUERY, QUERY, expected


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("raw", [False, True])
def test_tei_ranks_texts(client, model, raw):
    found = ok(client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": raw}))
    assert [(rank["index"], rank["score"]) for rank in found] == expected(model, QUERY, raw=raw)
    assert set(found[0]) == {"index", "score"}


def test_tei_returns_texts_and_takes_all_its_fields(client):
    body = {"query": QUERY, "texts": DOCUMENTS, "return_text": True, "truncate": True, "truncation_direction": "Left"}
    for rank in ok(client.post("/rerank", json=body)):
        assert rank["text"] == DOCUMENTS[rank["index"]]


def test_tei_cuts_too_long_texts_where_it_is_told_to(client, model):
    # the tiny model reads 40 tokens
    ends = ["dog", "git commit", "paris"]
    texts = [" ".join(["water"] * 60 + [end]) for end in ends]
    right = ok(client.post("/rerank", json={"query": QUERY, "texts": texts, "raw_scores": True}))
    assert len({rank["score"] for rank in right}) == 1
    body = {"query": QUERY, "texts": texts, "raw_scores": True, "truncation_direction": "left"}
    left = ok(client.post("/rerank", json=body))
    kept = [" ".join(text.split()[-38:]) for text in texts]
    assert [(rank["index"], rank["score"]) for rank in left] == expected(model, QUERY, kept, raw=True)
    refused = client.post("/rerank", json={"query": QUERY, "texts": texts, "truncate": False})
    assert refused.status_code == 422
    assert refused.json()["error_type"] == "validation"
    assert "61 tokens" in refused.json()["error"]


@pytest.mark.parametrize(("path", "documents"), [("/v1/rerank", True), ("/v2/rerank", False), ("/rerank", True)])
def test_cohere_jina_and_vllm_rank_documents(client, model, path, documents):
    mixed = [DOCUMENTS[0], {"text": DOCUMENTS[1], "title": "not read"}, *DOCUMENTS[2:]]
    body = {"model": "mixencoder", "query": QUERY, "documents": mixed, "top_n": 3, "max_chunks_per_doc": 10}
    found = ok(client.post(path, json=body))
    results = [(result["index"], result["relevance_score"]) for result in found["results"]]
    assert results == expected(model, QUERY, top_k=3)
    texts = [result.get("document") for result in found["results"]]
    assert texts == [{"text": DOCUMENTS[index]} if documents else None for index, _ in results]
    assert found["id"]
    assert found["model"] == "mixencoder"
    tokens = len(model.read_query([QUERY])[0]) + sum(map(len, model.read_document(DOCUMENTS)))
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    assert found["meta"]["tokens"]["input_tokens"] == tokens
    assert found["meta"]["api_version"]["version"] == ("2" if path == "/v2/rerank" else "1")


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("wanted", [False, True])
def test_documents_are_returned_as_the_request_says(client, path, wanted):
    body = {"query": QUERY, "documents": DOCUMENTS, "return_documents": wanted}
    assert all(("document" in result) == wanted for result in ok(client.post(path, json=body))["results"])


@pytest.mark.parametrize("raw", [{"raw_scores": True}, {"use_activation": False}])
def test_raw_scores_are_those_of_the_model(client, model, raw):
    found = ok(client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, **raw}))
    results = [(result["index"], result["relevance_score"]) for result in found["results"]]
    assert results == expected(model, QUERY, raw=True)


@pytest.mark.filterwarnings("ignore:.*longer than 4 tokens")
def test_documents_are_read_as_far_as_the_request_says(client, model):
    found = ok(client.post("/v2/rerank", json={"query": QUERY, "documents": DOCUMENTS, "max_tokens_per_doc": 4}))
    results = [(result["index"], result["relevance_score"]) for result in found["results"]]
    assert results == expected(model.with_limits(max_document_length=4), QUERY)
    assert results != expected(model, QUERY)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
def test_vllm_scores_one_text_with_several(client, model, path, names):
    found = ok(client.post(path, json={"model": "mixencoder", names[0]: QUERY, names[1]: DOCUMENTS}))
    scores = dict(expected(model, QUERY))
    assert found["object"] == "list"
    assert found["data"] == [
        {"index": index, "object": "score", "score": scores[index]} for index in range(len(DOCUMENTS))
    ]
    assert ok(client.post(path, json={names[0]: QUERY, names[1]: DOCUMENTS[1]}))["data"][0]["score"] == scores[1]


def test_vllm_scores_pairs(client, model):
    body = {"text_1": [QUERY, OTHER_QUERY], "text_2": DOCUMENTS[1:3], "use_activation": False}
    found = [score["score"] for score in ok(client.post("/score", json=body))["data"]]
    assert found == model.predict(list(zip([QUERY, OTHER_QUERY], DOCUMENTS[1:3], strict=True))).tolist()


def test_several_queries_rank_the_same_documents(client, model):
    body = {"queries": [QUERY, OTHER_QUERY, QUERY], "documents": DOCUMENTS, "return_texts": True}
    found = ok(client.post("/v1/rank", json=body))["rankings"]
    for query, ranking in zip(body["queries"], found, strict=True):
        assert [(entry["index"], entry["score"]) for entry in ranking] == expected(model, query)
        assert all(entry["text"] == DOCUMENTS[entry["index"]] for entry in ranking)


def test_candidates_are_ranked_by_id(client, model, stored):
    ids = [IDS[2], IDS[0], IDS[1]]
    with model.open_index(stored) as index:
        right = expected(model, QUERY, index, ids=ids)
    found = ok(client.post("/v1/rank", json={"queries": [QUERY], "ids": ids, "return_texts": True}))["rankings"][0]
    assert [(entry["id"], entry["score"]) for entry in found] == right
    for entry in found:
        assert ids[entry["index"]] == entry["id"]
        assert entry["text"] == DOCUMENTS[IDS.index(entry["id"])]
        assert entry.get("metadata") == METADATA[IDS.index(entry["id"])]
    for path, body in (("/v1/rerank", {"top_n": 2}), ("/v2/rerank", {"top_n": 2})):
        results = ok(client.post(path, json={"query": QUERY, "ids": ids, **body}))["results"]
        assert [(result["id"], result["relevance_score"]) for result in results] == right[:2]
        assert ("document" in results[0]) == (path == "/v1/rerank")
    ranks = ok(client.post("/rerank", json={"query": QUERY, "ids": ids, "return_text": True}))
    assert [(rank["id"], rank["score"]) for rank in ranks] == right
    assert ranks[0]["text"] == DOCUMENTS[IDS.index(ranks[0]["id"])]


def test_the_whole_index_is_ranked(client, model, stored):
    with model.open_index(stored) as index:
        right = {query: expected(model, query, index, top_k=4) for query in (QUERY, OTHER_QUERY)}
    found = ok(client.post("/v1/rank", json={"queries": list(right), "ids": "all", "top_k": 4}))["rankings"]
    for query, ranking in zip(right, found, strict=True):
        assert [(entry["id"], entry["score"]) for entry in ranking] == right[query]
        assert all(IDS[entry["index"]] == entry["id"] for entry in ranking)
        assert all("text" not in entry for entry in ranking)
    assert len(ok(client.post("/v1/rerank", json={"query": QUERY, "ids": "all"}))["results"]) == len(IDS)


def test_a_model_without_calibration_answers_with_the_sigmoid(serve, checkpoint):
    engine = MixEncoder.from_pretrained(checkpoint)
    client = serve(engine=engine)
    found = ok(client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}))
    raw = ok(client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": True}))
    assert [rank["score"] for rank in found] == pytest.approx([1 / (1 + math.exp(-rank["score"])) for rank in raw])
    assert ok(client.get("/info"))["calibrated"] is False


def test_info_models_and_health(client, model):
    info = ok(client.get("/info"))
    assert info["model_id"] == "mixencoder"
    assert info["model_dtype"] == "float32"
    assert info["max_input_length"] == model.read_document.max_length
    assert info["index"] == {"candidates": len(IDS), "read_only": True}
    assert "reranker" in info["model_type"]
    assert [card["id"] for card in ok(client.get("/v1/models"))["data"]] == ["mixencoder"]
    assert ok(client.get("/health")) == {"status": "ok"}


def test_metrics_count_requests_by_endpoint_and_status(client):
    client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
    client.get("/no/such/path")
    text = client.get("/metrics").text
    assert 'mixencoder_requests_total{endpoint="/rerank",status="200"} 1.0' in text
    assert 'mixencoder_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "mixencoder_pairs_total 5.0" in text
    assert "mixencoder_index_candidates 5.0" in text


def test_the_openapi_page_says_that_keys_are_needed(client, serve):
    assert "securitySchemes" not in ok(client.get("/openapi.json"))["components"]
    key = "a-key-of-some-length"
    schema = ok(serve(api_keys=(key,)).get("/openapi.json", headers={"Authorization": f"Bearer {key}"}))
    (scheme,) = schema["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert all("security" in method for methods in schema["paths"].values() for method in methods.values())


def test_the_openapi_page_describes_every_endpoint_with_examples_and_errors(client):
    schema = ok(client.get("/openapi.json"))
    posts = {path: methods for path, methods in schema["paths"].items() if "post" in methods}
    assert set(posts) == {"/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/v1/rank", "/v1/explain"}
    for methods in posts.values():
        assert {"400", "413", "422", "429"} <= set(methods["post"]["responses"])
    requests = [part for name, part in schema["components"]["schemas"].items() if name.endswith("Request")]
    assert len(requests) == 7
    assert all(part["examples"] for part in requests)
    names = {"/v1/rank": "RankRequest", "/v1/rerank": "RerankRequest", "/score": "ScoreRequest"}
    names |= {"/rerank": "TeiRerankRequest", "/v1/explain": "ExplainRequest"}
    for path, name in names.items():
        example = schema["components"]["schemas"][name]["examples"][0]
        assert client.post(path, json=example).status_code == 200
