"""Clients that others wrote, against a freshly started server: right answers, and errors that they understand.

A client that is not installed is skipped. vLLM's are the requests that its pages show, sent with httpx.
"""

import pytest

from tests.serving.cases import DOCUMENTS, QUERY, expected
from tests.serving.server_process import running

httpx = pytest.importorskip("httpx")
KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def address(calibrated):
    with running("--model", calibrated, environment={"MIXENCODER_API_KEYS": KEY}) as (_, address, _):
        yield address


# -- Cohere ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cohere():
    return pytest.importorskip("cohere", reason="the client of Cohere is not installed")


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_cohere_ranks_documents(cohere, address, model, version):
    client = getattr(cohere, version)(KEY, base_url=address)
    response = client.rerank(model="tiny", query=QUERY, documents=DOCUMENTS, top_n=3)
    found = [(result.index, result.relevance_score) for result in response.results]
    assert found == expected(model, QUERY, top_k=3)
    assert response.id
    assert response.meta.billed_units.search_units == 1
    assert response.meta.tokens.input_tokens > 0


def test_cohere_reads_all_fields_of_its_first_version(cohere, address, model):
    client = cohere.Client(KEY, base_url=address)
    documents = [{"text": text} for text in DOCUMENTS]
    response = client.rerank(
        model="tiny",
        query=QUERY,
        documents=documents,
        rank_fields=["text"],
        return_documents=True,
        max_chunks_per_doc=1,
    )
    assert [result.document.text for result in response.results] == [
        DOCUMENTS[index] for index, _ in expected(model, QUERY)
    ]


def test_cohere_cuts_documents_where_it_is_told_to(cohere, address, model):
    client = cohere.ClientV2(KEY, base_url=address)
    long = [f"{text} dog cat mat" for text in DOCUMENTS]
    response = client.rerank(model="tiny", query=QUERY, documents=long, max_tokens_per_doc=4)
    short = [" ".join(text.split()[:2]) for text in long]
    assert {result.relevance_score for result in response.results} == {
        score for _, score in expected(model, QUERY, short)
    }


def test_cohere_raises_its_own_errors_with_the_servers_message(cohere, address):
    options = {"query": QUERY, "documents": DOCUMENTS, "request_options": {"max_retries": 0}}
    with pytest.raises(cohere.errors.UnauthorizedError, match="API key"):
        cohere.ClientV2("wrong", base_url=address).rerank(model="tiny", **options)
    client = cohere.ClientV2(KEY, base_url=address)
    with pytest.raises(cohere.errors.NotFoundError, match="expected tiny"):
        client.rerank(model="rerank-v3.5", **options)
    with pytest.raises(cohere.errors.UnprocessableEntityError, match="documents is empty"):
        client.rerank(model="tiny", **{**options, "documents": []})


# -- text-embeddings-inference -----------------------------------------------------------------------------------------


def test_huggingface_hub_sees_a_healthy_tei_server(address, model):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is set, so that this client calls no server")
    client = huggingface_hub.InferenceClient(address, provider="hf-inference", token=KEY)
    assert client.health_check()
    info = client.get_endpoint_info()
    assert info["model_id"] == "tiny"
    assert "reranker" in info["model_type"]
    assert info["max_client_batch_size"] == 1000


def test_llama_index_ranks_nodes_with_its_tei_client(address, model):
    tei = pytest.importorskip("llama_index.postprocessor.tei_rerank", reason="LlamaIndex's client is not installed")
    from llama_index.core.schema import NodeWithScore, TextNode

    ranker = tei.TextEmbeddingInference(base_url=address, top_n=3, auth_token=f"Bearer {KEY}")
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in DOCUMENTS]
    found = [(DOCUMENTS.index(node.text), node.score) for node in ranker.postprocess_nodes(nodes, query_str=QUERY)]
    assert found == expected(model, QUERY, top_k=3)


# -- vLLM, Jina --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(address):
    with httpx.Client(
        base_url=address, headers={"accept": "application/json", "Authorization": f"Bearer {KEY}"}
    ) as http:
        yield http


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_vllm_reranks(http, model, path):
    body = {"model": "tiny", "query": QUERY, "documents": DOCUMENTS}
    found = http.post(path, json=body).json()
    right = expected(model, QUERY)
    assert [(result["index"], result["relevance_score"]) for result in found["results"]] == right
    if path != "/v2/rerank":
        assert [result["document"]["text"] for result in found["results"]] == [DOCUMENTS[index] for index, _ in right]
    assert found["usage"]["total_tokens"] > 0
    assert found["model"] == "tiny"


def test_vllm_scores_one_with_many_many_with_many_and_one_pair(http, model):
    def scores(text_1, text_2):
        body = {"model": "tiny", "encoding_format": "float", "text_1": text_1, "text_2": text_2}
        return [entry["score"] for entry in http.post("/score", json=body).json()["data"]]

    right = model.probability(model.predict([(QUERY, text) for text in DOCUMENTS])).tolist()
    assert scores(QUERY, DOCUMENTS) == right
    assert scores([QUERY] * len(DOCUMENTS), DOCUMENTS) == right
    assert scores(QUERY, DOCUMENTS[1]) == right[1:2]


def test_the_names_of_the_model_are_listed_as_openai_does(http):
    found = http.get("/v1/models").json()
    assert found["object"] == "list"
    assert [entry["id"] for entry in found["data"]] == ["tiny"]
