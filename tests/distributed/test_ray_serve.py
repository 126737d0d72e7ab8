"""The example on Ray Serve: answers are the model's own, also while the process of a shard is killed."""

import itertools
import json
import os
import runpy
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mixencoder import MixEncoder
from tests.conftest import WORDS

ray = pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
serve = pytest.importorskip("ray.serve", reason="ray is installed without ray[serve]")
for name in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(name, reason="the extra serve is not installed")
pytestmark = pytest.mark.usefixtures("cluster")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ray_serve.py"
TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[:8], WORDS[:8], WORDS[:10])]
IDS = [f"id {number}" for number in range(len(TEXTS))]
QUERY, PORT = "how to undo the git commit", 18_437
DEADLINE = 10.0


@pytest.fixture(scope="module")
def model(checkpoint):
    return MixEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    for number, first in enumerate((0, 300)):
        rows = slice(first, 300 if first == 0 else None)
        metadata = [{"number": id} for id in IDS[rows]]
        model.index(TEXTS[rows], IDS[rows], path / f"s{number}", metadata=metadata).close()
    return path


@pytest.fixture(scope="module")
def shards(model, folder, cluster):
    from mixencoder.distributed.ray_shards import RayShards

    with RayShards(model, folder, replicas=2) as found:
        # all actors run before Serve starts
        for number in range(4):
            replica_process(found, number // 2, number % 2)
        names = runpy.run_path(str(EXAMPLE))
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(names["application"](found, str(folder), str(folder / "model"), replicas=(2, 2), deadline=DEADLINE))
        yield found
        serve.shutdown()


@pytest.fixture(scope="module", autouse=True)
def saved(model, folder):
    # not an index, so no shard
    model.save_pretrained(folder / "model")


def post(path, **body):
    """Return status, answer and seconds of a request."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"}, method="POST"
    )
    begin = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, answer = response.status, json.load(response)
    except urllib.error.HTTPError as error:
        status, answer = error.code, error.read().decode()
    return status, answer, time.monotonic() - begin


def expected(model, query, top_k=5, **options):
    """Return what `/v1/rank` answers to a query over the whole index, from one index with all documents."""
    with model.index(TEXTS, IDS) as index:
        ranking = model.rank(query, index, top_k, **options)
    return [(entry["corpus_id"], entry["id"], entry["score"]) for entry in ranking]


def hits(ranking):
    return [(hit["index"], hit["id"], hit["score"]) for hit in ranking]


def test_its_dialects_answer_over_the_shards(shards, model):
    right = expected(model, QUERY)
    body = {"queries": [QUERY], "ids": "all", "top_k": 5, "raw_scores": True, "return_texts": True}
    status, answer, _ = post("/v1/rank", **body, return_metadata=True)
    assert status == 200, answer
    (ranking,) = answer["rankings"]
    assert hits(ranking) == right
    for hit in ranking:
        assert hit["text"] == TEXTS[hit["index"]]
        assert hit["metadata"] == {"number": hit["id"]}
    # by id: the position is that in the request
    ids = [IDS[number] for number in (500, 3, 299, 300)]
    ranked = expected(model, QUERY, ids=ids)
    status, answer, _ = post("/rerank", query=QUERY, ids=ids, raw_scores=True)
    assert status == 200, answer
    assert hits(answer) == [(ids.index(id), id, score) for _, id, score in ranked]
    status, answer, _ = post("/rerank", query=QUERY, ids=["id 3", "nobody"])
    assert status == 404, answer
    # texts of the request are ranked by the replica itself
    texts = [TEXTS[3], TEXTS[77]]
    by_text = model.rank(QUERY, texts)
    status, answer, _ = post("/rerank", query=QUERY, texts=texts, raw_scores=True)
    assert [(hit["index"], hit["score"]) for hit in answer] == [
        (entry["corpus_id"], entry["score"]) for entry in by_text
    ]
    status, answer, _ = post("/v2/rerank", query=QUERY, documents=texts, top_n=1)
    assert (status, answer["results"][0]["index"]) == (200, by_text[0]["corpus_id"])


def replica_process(shards, shard, number):
    actor = shards._actors._replicas[shard][number].actor
    return ray.get(actor.ready.options(max_task_retries=-1).remote()).process


def test_a_killed_shard_makes_no_answer_wrong_and_no_request_fail(shards, model):
    queries = [f"{WORDS[number]} {WORDS[number + 3]}" for number in range(6)]
    right = {query: expected(model, query) for query in queries}
    answers, stop = [], threading.Event()

    def ask(first):
        for query in itertools.islice(itertools.cycle(queries), first, None):
            if stop.is_set():
                return
            body = {"queries": [query], "ids": "all", "top_k": 5, "raw_scores": True}
            answers.append((query, *post("/v1/rank", **body)))

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in asking:
        thread.start()
    time.sleep(2)
    before, killed = len(answers), replica_process(shards, 0, 0)
    os.kill(killed, signal.SIGKILL)
    begin = time.monotonic()
    # runs again
    assert replica_process(shards, 0, 0) != killed
    restarted = time.monotonic() - begin
    after = len(answers)
    time.sleep(2)
    stop.set()
    for thread in asking:
        thread.join(120)
    assert [status for _, status, _, _ in answers] == [200] * len(answers)
    for query, _, answer, _ in answers:
        assert hits(answer["rankings"][0]) == right[query]
    # requests were answered while the actor started again, none waited for it
    slowest = max(seconds for _, _, _, seconds in answers)
    assert after - before > 3
    assert slowest < max(3.0, restarted)


def test_both_replicas_of_a_shard_are_lost(shards, model):
    right = expected(model, QUERY)
    for number in range(2):
        os.kill(replica_process(shards, 1, number), signal.SIGKILL)
    body = {"queries": [QUERY], "ids": "all", "top_k": 5, "raw_scores": True}
    end = time.monotonic() + 180
    while time.monotonic() < end:
        status, answer, _ = post("/v1/rank", **body)
        if status == 200:
            break
        assert status == 503, answer
        assert "did not answer in time" in answer
    assert hits(answer["rankings"][0]) == right


def test_a_shard_that_does_not_answer_in_time_is_a_503(shards, model):
    stopped = [replica_process(shards, 1, number) for number in range(2)]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        status, answer, seconds = post("/rerank", query=QUERY, ids=[IDS[3]])
        texts = post("/rerank", query=QUERY, texts=TEXTS[:3])
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)
    assert (status, "did not answer in time" in answer) == (503, True)
    assert seconds > DEADLINE
    # the replica itself is well
    assert texts[0] == 200
    status, answer, _ = post("/rerank", query=QUERY, ids=[IDS[3]])
    assert (status, answer[0]["id"]) == (200, IDS[3])
