"""Many requests at once: each client gets its own answer, the queue has a bound, and gone clients cost nothing."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mixencoder.serving.batching import PASS_WEIGHT, SHARE, UNFINISHED, Batcher
from mixencoder.serving.errors import RequestError
from mixencoder.serving.settings import Limits
from tests.serving.cases import DOCUMENTS, IDS, OTHER_QUERY, QUERY, expected


def test_a_burst_gives_every_client_its_own_right_answer(serve, stored, model, words):
    client = serve(stored, gather_seconds=0.05)
    generator = torch.Generator().manual_seed(7)

    def text() -> str:
        numbers = torch.randint(len(words), (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        return " ".join(words[number] for number in numbers)

    asked = [(text(), [text() for _ in range(1 + number % 7)]) for number in range(30)]
    with model.open_index(stored) as index:
        right = [expected(model, query, texts) for query, texts in asked]
        from_index = {query: expected(model, query, index) for query in (QUERY, OTHER_QUERY)}

    def ask(number: int):
        if number >= len(asked):
            query = (QUERY, OTHER_QUERY)[number % 2]
            return client.post("/v1/rank", json={"queries": [query], "ids": "all" if number % 3 else IDS})
        return client.post("/rerank", json=dict(zip(("query", "texts"), asked[number], strict=True)))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(45)))
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        if number < len(asked):
            assert [(rank["index"], rank["score"]) for rank in answer.json()] == right[number]
        else:
            found = [(entry["id"], entry["score"]) for entry in answer.json()["rankings"][0]]
            assert found == from_index[(QUERY, OTHER_QUERY)[number % 2]]
    metrics = client.get("/metrics").text
    passes = float(metrics.split("mixencoder_pass_requests_count ")[1].split()[0])
    assert passes < len(answers)


def test_large_requests_take_several_passes_and_small_ones_do_not_wait_for_them(serve, model, words):
    client = serve(limits=Limits(candidates=2000))
    texts = [f"{first} {second} {third}" for first in words[:6] for second in words for third in words[:8]]
    assert len(texts) > 8 * SHARE
    finished = []

    def ask(path, body):
        answer = client.post(path, json=body)
        finished.append(path)
        return answer.json()

    with ThreadPoolExecutor(3) as pool:
        large = pool.submit(ask, "/v1/rerank", {"query": QUERY, "documents": texts, "raw_scores": True})
        until(lambda: "mixencoder_pass_requests_count 0.0" not in client.get("/metrics").text)
        small = pool.submit(ask, "/rerank", {"query": QUERY, "texts": DOCUMENTS})
        ranks = [(rank["index"], rank["score"]) for rank in small.result()]
        results = [(result["index"], result["relevance_score"]) for result in large.result()["results"]]
    assert finished == ["/rerank", "/v1/rerank"]
    assert ranks == expected(model, QUERY)
    assert results == expected(model, QUERY, texts, raw=True)
    queries = [QUERY, OTHER_QUERY] * (len(texts) // 2)
    body = {"queries": queries, "documents": texts, "use_activation": False}
    scores = [score["score"] for score in client.post("/score", json=body).json()["data"]]
    assert scores == model.predict(list(zip(queries, texts, strict=True))).tolist()


@pytest.fixture
def blocked(monkeypatch):
    """Let passes wait until an event is set; the list holds how many requests each pass has."""
    from mixencoder.serving.service import Service

    go, passes, run = threading.Event(), [], Service._run

    def wait(self, jobs):
        passes.append(len(jobs))
        assert go.wait(30)
        return run(self, jobs)

    monkeypatch.setattr(Service, "_run", wait)
    yield go, passes
    go.set()


def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 10 seconds")


def test_a_full_queue_answers_429_and_the_others_are_answered(serve, blocked):
    go, passes = blocked
    client = serve(limits=Limits(queue=2), gather_seconds=0.0)
    body = {"query": QUERY, "texts": DOCUMENTS}
    service = client.app.state.service
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/rerank", json=body)
        until(lambda: passes)
        waiting = [pool.submit(client.post, "/rerank", json=body) for _ in range(2)]
        until(lambda: service.waiting() == 2)
        refused = client.post("/rerank", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error_type"] == "overloaded"
        # health and metrics answer meanwhile
        assert client.get("/health").status_code == 200
        assert "mixencoder_queue_length 2.0" in client.get("/metrics").text
        go.set()
        assert [answer.result().status_code for answer in (first, *waiting)] == [200, 200, 200]
    assert passes == [1, 2]
    assert client.post("/rerank", json=body).status_code == 200


def test_too_many_requests_in_work_are_429(serve, blocked):
    go, passes = blocked
    client = serve(limits=Limits(requests=1))
    body = {"query": QUERY, "texts": DOCUMENTS}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/rerank", json=body)
        until(lambda: passes)
        refused = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS})
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200
        go.set()
        assert first.result().status_code == 200
    assert client.post("/rerank", json=body).status_code == 200


def with_batcher(use, run, **options):
    """Run `use(batcher)` in an event loop with a batcher whose passes call `run`."""

    async def main():
        batcher = Batcher(run, **{"queue": 10, "gather_seconds": 0.0, **options})
        batcher.start()
        try:
            return await use(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main())


def test_a_pass_takes_jobs_in_order_up_to_a_weight():
    passes = []

    def run(jobs):
        passes.append([job.work for job in jobs])
        return [job.work for job in jobs]

    async def use(batcher):
        weights = [10 * PASS_WEIGHT, 1, PASS_WEIGHT, SHARE, SHARE, 1]
        jobs = [batcher.submit(number, weight) for number, weight in enumerate(weights)]
        return [await job.done for job in jobs]

    assert with_batcher(use, run, gather_seconds=0.01) == [0, 1, 2, 3, 4, 5]
    assert passes == [[0, 1, 2, 3], [4, 5]]


def test_a_large_job_lets_others_have_their_turn():
    passes = []

    def run(jobs):
        passes.append([job.work for job in jobs])
        for job in jobs:
            job.state = (job.state or 0) + 1
        return [UNFINISHED if job.work == "large" and job.state < 3 else job.state for job in jobs]

    async def use(batcher):
        large, others = batcher.submit("large", 3 * SHARE), [batcher.submit(number, SHARE) for number in range(7)]
        assert len(batcher) == 8
        assert [await job.done for job in others] == [1] * 7
        return await large.done

    assert with_batcher(use, run, gather_seconds=0.01) == 3
    assert passes == [["large", 0, 1, 2], [3, 4, 5, 6], ["large"], ["large"]]


def test_an_abandoned_job_is_not_run():
    ran = []

    def run(jobs):
        ran.extend(job.work for job in jobs)
        return [None] * len(jobs)

    async def use(batcher):
        gone, kept = batcher.submit("gone", 1), batcher.submit("kept", 1)
        batcher.abandon(gone)
        assert len(batcher) == 1
        await kept.done
        assert gone.done.cancelled()

    with_batcher(use, run, gather_seconds=0.01)
    assert ran == ["kept"]


def test_closing_finishes_what_waits():
    async def main():
        batcher = Batcher(lambda jobs: [job.work for job in jobs], queue=10, gather_seconds=10.0)
        batcher.start()
        jobs = [batcher.submit(number, PASS_WEIGHT) for number in range(3)]
        await batcher.close()
        assert not batcher.running
        return [job.done.result() for job in jobs]

    assert asyncio.run(asyncio.wait_for(main(), 5)) == [0, 1, 2]


def test_a_full_queue_says_how_long_the_waiting_jobs_take():
    go = threading.Event()

    def run(jobs):
        go.wait(10)
        return [None] * len(jobs)

    async def use(batcher):
        batcher._pass_seconds = 20.0
        running = batcher.submit(0, 1)
        await asyncio.sleep(0.05)
        waiting = [batcher.submit(1, PASS_WEIGHT), batcher.submit(2, 1)]
        with pytest.raises(RequestError) as caught:
            batcher.submit(3, 1)
        go.set()
        for job in (running, *waiting):
            await job.done
        return caught.value.headers

    assert with_batcher(use, run, queue=2) == {"Retry-After": "40"}


def test_threads_are_not_more_than_the_usable_cores(monkeypatch):
    from mixencoder.serving.service import usable_threads

    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert usable_threads(None) == 3
    assert usable_threads(5) == 5


def test_the_worker_computes_with_the_threads_of_the_settings(serve, monkeypatch):
    from mixencoder.serving.service import Service

    found, run, before = [], Service._run, torch.get_num_threads()

    def note(self, jobs):
        found.append(torch.get_num_threads())
        return run(self, jobs)

    monkeypatch.setattr(Service, "_run", note)
    try:
        client = serve(threads=2)
        assert client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS}).status_code == 200
    finally:
        torch.set_num_threads(before)
    assert found == [2]
