"""`POST /v1/explain`: the model's own numbers, for texts and for candidates of the index; and its refusals."""

import numpy as np
import pytest

from tests.serving.cases import DOCUMENTS, IDS, QUERY

PATH = "/v1/explain"


def error(response):
    return response.json()["error"]["message"]


@pytest.mark.parametrize("by_id", [False, True])
def test_an_explanation_holds_the_models_own_numbers(client, model, by_id):
    what = {"id": IDS[1]} if by_id else {"document": DOCUMENTS[1]}
    response = client.post(PATH, json={"query": QUERY, **what, "return_attention": True})
    assert response.status_code == 200, response.text
    found, right = response.json(), model.explain(QUERY, DOCUMENTS[1])
    assert found["score"] == pytest.approx(right.probability)
    ranked = client.post("/rerank", json={"query": QUERY, "texts": [DOCUMENTS[1]]}).json()
    assert found["score"] == ranked[0]["score"]
    assert (found["raw_score"], found["interaction"], found["dual"]) == (right.score, right.interaction, right.dual)
    assert [word["text"] for word in found["query_words"]] == QUERY.split()
    assert [word["weight"] for word in found["query_words"]] == [word.weight for word in right.query_words()]
    assert [word["text"] for word in found["document_words"]] == DOCUMENTS[1].split()
    assert [token["text"] for token in found["query_tokens"]] == [token.text for token in right.query_tokens]
    attention = found["attention"]
    assert np.allclose(attention["state"], right.state_attention)
    assert np.allclose(attention["contexts"], right.context_attention)
    assert np.allclose(attention["pooling"], right.pooling)
    tokens = len(right.query_tokens) + len(right.document_tokens)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def test_all_attention_is_returned_only_on_request(client):
    found = client.post(PATH, json={"query": QUERY, "document": DOCUMENTS[0]}).json()
    assert "attention" not in found


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": QUERY}, 422),
        ({"query": QUERY, "document": "dog", "id": IDS[0]}, 422),
        ({"query": " ", "document": "dog"}, 422),
        ({"query": 3, "document": "dog"}, 422),
        ({"query": QUERY, "document": ["dog"]}, 422),
        ({"query": QUERY, "document": "dog", "more": 1}, 422),
        ({"query": QUERY, "id": "/etc/passwd"}, 404),
        ({"query": QUERY, "document": "dog", "model": "another"}, 404),
        ({"query": QUERY, "document": "x" * 20_001}, 413),
        ({"query": QUERY * 1000, "document": "dog"}, 413),
    ],
)
def test_what_cannot_be_explained_is_refused(client, body, status):
    response = client.post(PATH, json=body)
    assert response.status_code == status
    assert error(response)


def test_an_id_needs_an_index_that_holds_texts(serve, model, tmp_path):
    assert serve().post(PATH, json={"query": QUERY, "id": IDS[0]}).status_code == 404
    model.index(DOCUMENTS, IDS, tmp_path / "without", store_text=False).close()
    response = serve(tmp_path / "without").post(PATH, json={"query": QUERY, "id": IDS[0]})
    assert response.status_code == 422
    assert "holds no texts" in error(response)


def test_a_text_without_letters_is_explained_too(client):
    response = client.post(PATH, json={"query": QUERY, "document": ""})
    assert response.status_code == 200, response.text
    assert response.json()["document_words"] == []
