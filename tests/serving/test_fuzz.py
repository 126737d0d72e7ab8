"""Requests made up from the OpenAPI page, right and wrong ones, to every endpoint: no 5xx, no hang, documented answers.

MIXENCODER_TEST_FUZZ sets how many right and how many wrong requests each endpoint gets.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.serving.cases import DOCUMENTS, QUERY, expected
from tests.serving.server_process import running

httpx = pytest.importorskip("httpx")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
checks = pytest.importorskip("schemathesis.checks")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")

EXAMPLES = int(os.environ.get("MIXENCODER_TEST_FUZZ", "12"))
SECONDS = 30
OPERATIONS = [
    *(
        f"POST {path}"
        for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/v1/rank", "/v1/explain")
    ),
    *("PUT /v1/candidates", "DELETE /v1/candidates"),
    *(f"GET {path}" for path in ("/v1/models", "/info", "/health", "/metrics")),
]
CHECKS = [
    checks.not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
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
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_every_endpoint_is_fuzzed(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_a_documented_one(operations, name):
    operation = operations[name]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body:
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            case.validate_response(case.call(timeout=SECONDS), checks=CHECKS)

        ask()


def test_afterwards_answers_are_right_and_the_index_is_whole(address, folder, model):
    body = {"query": QUERY, "texts": DOCUMENTS}
    found = httpx.post(f"{address}/rerank", json=body, timeout=SECONDS).json()
    assert [(rank["index"], rank["score"]) for rank in found] == expected(model, QUERY)
    with model.open_index(folder, read_only=True) as index:
        assert index.verify().ok
        right = expected(model, QUERY, index)
    ranked = httpx.post(f"{address}/v1/rank", json={"queries": [QUERY], "ids": "all"}, timeout=SECONDS).json()
    assert [(entry["id"], entry["score"]) for entry in ranked["rankings"][0]] == right[:10]
