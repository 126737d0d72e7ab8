"""What cannot be answered: bad input, limits and keys, each with a status and the dialect's own form of an error."""

import json

import pytest

from mixencoder.errors import InputError, NonFiniteError
from mixencoder.serving.settings import KEYS_VARIABLE, Limits, ServeConfig, read_api_keys
from tests.serving.cases import DOCUMENTS, IDS, QUERY

RERANKS = {"/rerank": {"query": QUERY, "texts": DOCUMENTS}}
RERANKS |= {path: {"query": QUERY, "documents": DOCUMENTS} for path in ("/v1/rerank", "/v2/rerank")}
SCORES = {path: {"text_1": QUERY, "text_2": DOCUMENTS} for path in ("/score", "/v1/score")}
BODIES = {**RERANKS, **SCORES, "/v1/rank": {"queries": [QUERY], "documents": DOCUMENTS}}
POSTS = {**BODIES, "/v1/explain": {"query": QUERY, "document": DOCUMENTS[0]}}
KEY = "a-key-of-some-length"


def message(response, path: str) -> str:
    """Return the message of an error, from the place where each dialect's clients look for it."""
    body = response.json()
    if path == "/rerank":
        assert set(body) == {"error", "error_type", "message"}
        return body["error"]
    if path in ("/v1/rerank", "/v2/rerank"):
        assert body["message"] == body["detail"]
        return body["message"]
    assert body["error"]["code"] == response.status_code
    return body["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "change",
    [
        {"query": 3, "text_1": 3, "queries": 3},
        {"texts": [1], "documents": [1], "text_2": [1]},
        {"texts": "a", "documents": {"a": 1}, "text_2": {"a": 1}},
        {"texts": [None], "documents": [None], "text_2": [None]},
        {"query": None, "text_1": None, "queries": None},
    ],
)
def test_wrong_types_are_refused_with_where_they_are(client, path, change):
    changed = {name: value for name, value in change.items() if name in BODIES[path]}
    response = client.post(path, json={**BODIES[path], **changed})
    assert response.status_code == 422
    places = tuple(f"body.{name}" for name in changed)
    assert message(response, path).startswith((*places, "expected text_1", "neither"))


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"", b"[1]", b"null", b"{}", b"\xff", b'"\xed\xa0\x80"'),
        *(b'{"query": NaN}', b'{"query": [Infinity]}', b'{"x": -1e999}'),
        *(b"[" * 100_000, b'{"top_n": ' + b"9" * 5000 + b"}"),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_no_json_object_is_refused(client, path, content):
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert message(response, path)


def test_nan_is_refused_even_where_nothing_reads_it(client):
    for number in ("NaN", "Infinity", "-Infinity", "1e400"):
        content = json.dumps({"query": QUERY, "texts": DOCUMENTS})[:-1] + f', "other": {number}}}'
        assert client.post("/rerank", content=content, headers={"Content-Type": "application/json"}).status_code == 400


def test_half_a_surrogate_pair_is_refused_and_not_quoted(client):
    for path, body in RERANKS.items():
        content = json.dumps({**body, "query": "\ud83d"})
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 422


@pytest.mark.parametrize("path", [*RERANKS, "/v1/rank"])
def test_neither_and_both_of_documents_and_ids_name_the_field_of_the_dialect(client, path):
    field = "texts" if path == "/rerank" else "documents"
    neither = {name: value for name, value in BODIES[path].items() if name != field}
    for found, body in (("neither", neither), ("both", {**BODIES[path], "ids": IDS})):
        response = client.post(path, json=body)
        assert response.status_code == 422
        assert message(response, path) == f"{found} of {field} and ids are given; expected one of them"


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_does_not_say_that_it_is_json_is_refused(client, path):
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = client.post(path, content=json.dumps(POSTS[path]), headers=headers)
        assert response.status_code == 415
        assert "application/json" in message(response, path)
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post(path, content=json.dumps(POSTS[path]), headers=headers).status_code == 200


def test_names_and_ids_of_a_request_are_quoted_only_in_part(client):
    content = json.dumps({**BODIES["/v1/rank"], "\ud83d": 1, "x" * 100_000: 2})
    response = client.post("/v1/rank", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert len(response.content) < 3000
    response = client.post("/rerank", json={"query": QUERY, "ids": ["x" * 19_000]})
    assert response.status_code == 404
    assert len(response.content) < 5000


@pytest.mark.parametrize("path", BODIES)
def test_no_document_and_blank_queries_are_refused(client, path):
    none = {name: [] if name in ("texts", "documents", "text_2") else value for name, value in BODIES[path].items()}
    response = client.post(path, json=none)
    assert response.status_code == 422
    blank = {**BODIES[path], **{name: [" "] if name == "queries" else " " for name in BODIES[path] if name[0] in "q"}}
    blank |= {"text_1": " "} if "text_1" in blank else {}
    response = client.post(path, json=blank)
    assert response.status_code == 422
    assert "empty" in message(response, path)


def test_empty_documents_are_ranked(client):
    response = client.post("/rerank", json={"query": QUERY, "texts": ["", " ", "git"]})
    assert response.status_code == 200
    assert len(response.json()) == 3


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/score", "/v1/rank"])
def test_an_unknown_model_is_not_found(client, path):
    response = client.post(path, json={**BODIES[path], "model": "gpt-4"})
    assert response.status_code == 404
    assert "expected mixencoder" in message(response, path)


def test_any_of_the_given_names_is_taken(serve):
    client = serve(names=("first", "rerank-v3.5"))
    for name in ("first", "rerank-v3.5"):
        body = {**BODIES["/v2/rerank"], "model": name}
        assert client.post("/v2/rerank", json=body).json()["model"] == "first"


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank", "/v1/rank"])
def test_ids_need_an_index_and_known_ids(client, serve, path):
    body = {"queries": [QUERY]} if path == "/v1/rank" else {"query": QUERY}
    unknown = client.post(path, json={**body, "ids": [IDS[0], "../../etc/hosts"]})
    assert unknown.status_code == 404
    assert "'../../etc/hosts'" in message(unknown, path)
    assert client.post(path, json={**body, "ids": [IDS[0], IDS[0]]}).status_code == 422
    assert client.post(path, json={**body, "ids": []}).status_code == 422
    assert client.post(path, json={**body, "ids": "rice"}).status_code == 422
    assert client.post(path, json=body).status_code == 422
    assert client.post(path, json={**body, "documents": DOCUMENTS, "ids": IDS}).status_code == 422
    assert serve().post(path, json={**body, "ids": IDS}).status_code == 404


def test_numbers_of_texts_that_do_not_fit_are_refused(client):
    assert client.post("/score", json={"text_1": [QUERY] * 2, "text_2": DOCUMENTS}).status_code == 422
    assert client.post("/score", json={"text_1": QUERY, "queries": QUERY, "text_2": DOCUMENTS}).status_code == 422
    assert client.post("/v1/rerank", json={**BODIES["/v1/rerank"], "rank_fields": ["title"]}).status_code == 422
    for top_n in (-1, 1.5, True, "2"):
        assert client.post("/v1/rerank", json={**BODIES["/v1/rerank"], "top_n": top_n}).status_code == 422
    assert client.post("/v1/rank", json={**BODIES["/v1/rank"], "tpo_k": 3}).status_code == 422


def test_unknown_paths_and_methods(client):
    assert client.get("/../../etc/passwd").status_code == 404
    assert client.get("/no").json()["error"]["code"] == 404
    assert client.get("/v1/rerank").status_code == 405
    assert client.get("/v1/rerank").json()["message"]


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_limits_are_413(serve, path):
    cases = {"candidates": 4, "characters": 10, "body_bytes": 100}
    for name, value in cases.items():
        response = serve(limits=Limits(**{name: value})).post(path, json=BODIES[path])
        assert response.status_code == 413, name
        assert str(value) in message(response, path)


def test_queries_and_results_are_limited(serve, stored):
    client = serve(stored, limits=Limits(queries=2, candidates=3))
    body = {"queries": [QUERY] * 3, "documents": DOCUMENTS[:2]}
    assert client.post("/v1/rank", json=body).status_code == 413
    assert client.post("/v1/rank", json={"queries": [QUERY], "ids": "all", "top_k": 4}).status_code == 413
    assert client.post("/v1/rank", json={"queries": [QUERY], "ids": "all", "top_k": 3}).status_code == 200
    pairs = {"text_1": [QUERY] * 3, "text_2": DOCUMENTS[:3]}
    assert client.post("/score", json=pairs).status_code == 200


def test_a_body_without_a_length_is_limited_too(serve):
    client = serve(limits=Limits(body_bytes=1000))
    parts = (b" " * 600 for _ in range(2))
    response = client.post("/rerank", content=parts, headers={"Content-Type": "application/json"})
    assert response.status_code == 413


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_server_with_keys_answers_only_with_one_of_them(serve):
    client = serve(api_keys=(KEY, KEY + "-2"))
    for header in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}):
        for path, body in POSTS.items():
            response = client.post(path, json=body, headers=header)
            assert response.status_code == 401
            assert KEY not in message(response, path)
        assert client.get("/metrics", headers=header).status_code == 401
        assert client.get("/openapi.json", headers=header).status_code == 401
    for key in (KEY, KEY + "-2"):
        for scheme in ("Bearer", "bearer"):
            response = client.post("/rerank", json=BODIES["/rerank"], headers={"Authorization": f"{scheme} {key}"})
            assert response.status_code == 200
    assert client.get("/health").status_code == 200


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {KEY}-2 \n")
    assert read_api_keys(file, {}) == (KEY, f"{KEY}-2")
    assert read_api_keys(None, {KEYS_VARIABLE: f"{KEY}-3, {KEY}-4"}) == (f"{KEY}-3", f"{KEY}-4")
    assert read_api_keys(file, {KEYS_VARIABLE: f"{KEY}-3"}) == (KEY, f"{KEY}-2", f"{KEY}-3")
    assert read_api_keys(None, {}) == ()
    file.write_text("# none\n")
    for path, environment in ((file, {}), (tmp_path / "absent", {}), (None, {KEYS_VARIABLE: " "})):
        with pytest.raises(InputError):
            read_api_keys(path, environment)


@pytest.mark.parametrize(
    "field",
    [
        *({"port": -1}, {"port": 65_536}, {"port": 1.5}, {"threads": 0}, {"threads": True}),
        *({"gather_seconds": -1.0}, {"gather_seconds": float("nan")}, {"host": ""}, {"names": ("",)}),
        *({"names": "x"}, {"allow_writes": 1}, {"api_keys": ("short",)}),
    ],
)
def test_settings_that_cannot_be_used_are_refused(field):
    with pytest.raises(InputError, match=next(iter(field)) if "api_keys" not in field else "API keys"):
        ServeConfig(**field)
    with pytest.raises(InputError, match="candidates is 0; expected an integer of at least 1"):
        Limits(candidates=0)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_a_fault_is_a_500_without_details(serve, path, monkeypatch, caplog):
    client = serve()

    def fail(*_, **__):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("mixencoder.serving.ranking.Ranker._run", fail)
    response = client.post(path, json=BODIES[path])
    assert response.status_code == 500
    assert "ZeroDivision" not in response.text
    assert "secret" not in response.text
    assert message(response, path) == "the server failed to answer; its log says more"


def test_a_score_that_is_not_finite_fails_its_own_request_alone(serve, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from mixencoder.fast import MixEncoder

    client = serve(gather_seconds=0.2)
    encode = MixEncoder.encode_rows

    def fail_for_four(self, rows, **options):
        if any(len(row) == 4 for row in rows):
            raise NonFiniteError("a number is not finite")
        return encode(self, rows, **options)

    monkeypatch.setattr(MixEncoder, "encode_rows", fail_for_four)
    texts = ["dog cat", "dog", "cat"]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: client.post("/rerank", json={"query": QUERY, "texts": [text]}), texts))
    assert [answer.status_code for answer in answers] == [500, 200, 200]
