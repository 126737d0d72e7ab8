"""A bounded load from a second process: every answer is the model's own, and the server's memory does not grow.

MIXENCODER_TEST_REQUESTS sets the number of requests. `python -m benchmarks.processes.serving` measures speed.
"""

import json
import os

import pytest
import torch

from benchmarks.processes.load import Request, percentile, resident_bytes, send
from tests.serving.cases import DOCUMENTS, IDS, OTHER_QUERY, QUERY, expected
from tests.serving.server_process import running

REQUESTS = int(os.environ.get("MIXENCODER_TEST_REQUESTS", "400"))
CONNECTIONS = 16
GROWTH = 64 * 2**20
"""Bytes by which a server may grow between the first requests and the last: allocators keep some memory."""


def test_under_load_every_answer_is_right_and_memory_stays(calibrated, stored, model, words):
    generator = torch.Generator().manual_seed(11)

    def text() -> str:
        numbers = torch.randint(len(words), (int(torch.randint(1, 30, (), generator=generator)),), generator=generator)
        return " ".join(words[number] for number in numbers)

    requests, right = [], []
    for number in range(40):
        texts = [text() for _ in range(1 + number % 9)]
        query = text()
        requests.append(Request("/rerank", {"query": query, "texts": texts}))
        right.append(expected(model, query, texts))
        requests.append(Request("/v1/rerank", {"query": query, "documents": texts, "top_n": 2}))
        right.append(expected(model, query, texts, top_k=2))
    with model.open_index(stored, read_only=True) as index:
        for query in (QUERY, OTHER_QUERY):
            requests.append(Request("/rerank", {"query": query, "ids": IDS}))
            right.append([(IDS.index(id), score) for id, score in expected(model, query, index, ids=IDS)])
    with running("--model", calibrated, "--index", str(stored)) as (process, address, _):
        warm = send([address], requests, len(requests), CONNECTIONS)
        before = resident_bytes(process.pid)
        answers = send([address], requests, REQUESTS, CONNECTIONS)
        after = resident_bytes(process.pid)
    for kind in (warm, answers):
        assert set(kind.statuses) == {200}
        for number, body in enumerate(kind.bodies):
            found = json.loads(body)
            if isinstance(found, dict):
                found = [{"index": entry["index"], "score": entry["relevance_score"]} for entry in found["results"]]
            assert [(entry["index"], entry["score"]) for entry in found] == right[number % len(right)]
    assert 0 < percentile(answers.seconds, 0.5) <= percentile(answers.seconds, 0.99) <= answers.wall_seconds
    if before is not None:
        assert after - before < GROWTH


def test_the_load_goes_to_this_machine_alone():
    with pytest.raises(ValueError, match="not all on this machine"):
        send(["http://203.0.113.5:80"], [Request("/rerank", {"query": QUERY, "texts": DOCUMENTS})], 1, 1)
