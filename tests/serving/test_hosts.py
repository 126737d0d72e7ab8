"""The Host header: foreign names are refused where no key protects the server (DNS rebinding)."""

import socket

import pytest

from mixencoder.serving.hosts import HostCheck
from tests.serving.cases import DOCUMENTS, QUERY

BODY = {"query": QUERY, "texts": DOCUMENTS}
ALWAYS = [
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1:8000",
    "[::1]:8000",
    "10.1.2.3",
    "reranker:80",
    "a.localhost",
    "::1",
]
FOREIGN = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "evil.example.", "1.2.3", "a.b:x"]


@pytest.mark.parametrize("host", [*ALWAYS, socket.gethostname()])
def test_addresses_and_names_that_no_other_site_can_have_are_allowed(host):
    assert HostCheck([]).allows(host.encode())


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_names_are_not(host):
    assert not HostCheck(["rank.example"]).allows(host.encode())
    assert HostCheck(["*"]).allows(host.encode())


def test_names_of_the_settings_are_allowed_whatever_their_case():
    check = HostCheck(["Rank.Example"])
    assert check.allows(b"rank.example:443")
    assert check.allows(b"RANK.EXAMPLE.")
    assert not check.allows(b"x.rank.example")
    assert check.allows(None)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/score"])
def test_a_request_for_a_foreign_name_is_refused_with_what_to_do(serve, path):
    response = serve().post(path, json=BODY, headers={"Host": "evil.example"})
    assert response.status_code == 400
    assert "--allowed-host" in response.text
    assert "evil" not in response.text


def test_the_settings_decide(serve):
    headers = {"Host": "rank.example"}
    assert serve(allowed_hosts=("rank.example",)).post("/rerank", json=BODY, headers=headers).status_code == 200
    assert serve(host="rank.example").post("/rerank", json=BODY, headers=headers).status_code == 200
    assert serve().get("/health", headers=headers).status_code == 200
    key = "a-key-of-some-length"
    keyed = {**headers, "Authorization": f"Bearer {key}"}
    assert serve(api_keys=(key,)).post("/rerank", json=BODY, headers=keyed).status_code == 200
    strict = serve(api_keys=(key,), allowed_hosts=("other.example",))
    assert strict.post("/rerank", json=BODY, headers=keyed).status_code == 400
