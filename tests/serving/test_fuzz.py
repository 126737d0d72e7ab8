"""Requests made up from the OpenAPI page, right and wrong ones, to every endpoint: no 5xx, no hang, documented answers.

MIXENCODER_TEST_FUZZ sets how many right and how many wrong requests each endpoint gets.
"""

import os

import pytest

from benchmarks.processes import fuzzing
from tests.serving.cases import DOCUMENTS, QUERY, expected
from tests.serving.server_process import running

httpx = pytest.importorskip("httpx")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

EXAMPLES = int(os.environ.get("MIXENCODER_TEST_FUZZ", "12"))
OPERATIONS = [
    *(
        f"POST {path}"
        for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/v1/rank", "/v1/explain")
    ),
    *("PUT /v1/candidates", "DELETE /v1/candidates"),
    *(f"GET {path}" for path in ("/v1/models", "/info", "/health", "/metrics")),
]


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    import shutil

    return shutil.copytree(stored, tmp_path_factory.mktemp("fuzzed") / "index")


@pytest.fixture(scope="module")
def address(calibrated, folder):
    with running("--model", calibrated, "--index", str(folder), "--allow-writes") as (process, address, _):
        yield address
        assert process.poll() is None


@pytest.fixture(scope="module")
def operations(address):
    return fuzzing.operations(address)


def test_every_endpoint_is_fuzzed(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_a_documented_one(operations, name):
    found = fuzzing.fuzz(operations[name], EXAMPLES)
    assert found["requests"] >= 1
    assert found["slowest_seconds"] < fuzzing.SECONDS


def test_afterwards_answers_are_right_and_the_index_is_whole(address, folder, model):
    body = {"query": QUERY, "texts": DOCUMENTS}
    found = httpx.post(f"{address}/rerank", json=body, timeout=fuzzing.SECONDS).json()
    assert [(rank["index"], rank["score"]) for rank in found] == expected(model, QUERY)
    with model.open_index(folder, read_only=True) as index:
        assert index.verify().ok
        right = expected(model, QUERY, index)
    ranked = httpx.post(f"{address}/v1/rank", json={"queries": [QUERY], "ids": "all"}, timeout=fuzzing.SECONDS).json()
    assert [(entry["id"], entry["score"]) for entry in ranked["rankings"][0]] == right[:10]
