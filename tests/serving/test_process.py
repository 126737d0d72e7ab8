"""The server as a process: it starts, logs without texts, ends well on SIGTERM, and costs nothing if unused."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder.cli import app
from tests.serving.cases import DOCUMENTS, IDS, OTHER_QUERY, QUERY, expected
from tests.serving.server_process import running

httpx = pytest.importorskip("httpx")


def test_a_server_process_answers_and_finishes_its_requests_on_sigterm(calibrated, stored, model):
    with running("--model", calibrated, "--index", str(stored), "--gather-ms", "1500") as (process, address, _):
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
            answers = []
            body = {"query": OTHER_QUERY, "texts": DOCUMENTS}
            asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/rerank", json=body)))
            asking.start()
            # it waits for others to share its pass
            time.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            asking.join(60)
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert [(rank["index"], rank["score"]) for rank in answers[0].json()] == expected(model, OTHER_QUERY)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_logs_are_json_without_texts_ids_and_keys(calibrated, stored):
    key = "a-key-that-is-long-enough"
    secrets = ["dog cat mat", "water pot", key, IDS[0] + "x", "made-up-path"]
    environment = {"MIXENCODER_API_KEYS": key}
    with running("--model", calibrated, "--index", str(stored), environment=environment) as (process, address, lines):
        with httpx.Client(base_url=address, timeout=60, headers={"Authorization": f"Bearer {key}"}) as client:
            assert client.post("/rerank", json={"query": "dog cat mat", "texts": ["water pot " * 50, ""]}).is_success
            assert client.post("/rerank", json={"query": "dog cat mat", "ids": [IDS[0] + "x"]}).status_code == 404
            assert client.post("/rerank", json={"query": "dog cat mat", "texts": [1]}).status_code == 422
            assert client.get("/made-up-path?q=dog cat mat").status_code == 404
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    text = "".join(lines)
    assert not [secret for secret in secrets if secret in text], text
    events = [json.loads(line) for line in lines]
    requests = [event for event in events if event["event"] == "request"]
    assert [event["status"] for event in requests] == [200, 404, 422, 404]
    assert requests[0]["endpoint"] == "/rerank"
    assert requests[0]["results"] == 2
    assert requests[0]["cut"] == 1
    assert requests[-1]["endpoint"] == "other"
    assert all(event["seconds"] >= 0 for event in requests)
    assert {"started", "stopped"} <= {event["event"] for event in events}


def test_a_client_that_goes_away_or_sends_slowly_leaves_the_server_well(calibrated):
    with running("--model", calibrated, "--gather-ms", "300") as (_, address, _):
        host, port = address.removeprefix("http://").split(":")
        content = json.dumps({"query": QUERY, "texts": DOCUMENTS}).encode()
        head = b"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection((host, int(port))) as half:
            half.sendall(head % len(content) + content[:10])
            with socket.create_connection((host, int(port))) as gone:
                gone.sendall(head % len(content) + content)
            with httpx.Client(base_url=address, timeout=60) as client:
                response = client.post("/rerank", content=content, headers={"Content-Type": "application/json"})
                assert response.status_code == 200
                metrics = client.get("/metrics").text
        assert "mixencoder_requests_abandoned_total 1.0" in metrics
        assert 'mixencoder_requests_total{endpoint="/rerank",status="499"} 1.0' in metrics
        assert httpx.get(f"{address}/health").status_code == 200


def test_acknowledged_candidates_survive_sigkill(calibrated, folder, model):
    with running("--model", calibrated, "--index", str(folder), "--allow-writes") as (process, address, _):
        acknowledged = []

        def put():
            with httpx.Client(base_url=address, timeout=60) as client, contextlib.suppress(httpx.TransportError):
                while True:
                    id = f"new-{len(acknowledged)}"
                    body = {"candidates": [{"id": id, "text": "dog cat", "metadata": {"id": id}}]}
                    assert client.put("/v1/candidates", json=body).is_success
                    acknowledged.append(id)

        writing = threading.Thread(target=put)
        writing.start()
        until = time.monotonic() + 30
        while len(acknowledged) < 5 and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
        writing.join(60)
    assert len(acknowledged) >= 5
    with model.open_index(folder) as index:
        assert index.verify().ok
        assert [index.get(id).metadata for id in acknowledged] == [{"id": id} for id in acknowledged]


def test_a_refused_client_that_still_sends_sees_the_answer(calibrated):
    with running("--model", calibrated, "--max-body", "1000") as (_, address, _), httpx.Client(timeout=60) as client:
        for _ in range(5):
            headers = {"Content-Type": "application/json"}
            response = client.post(f"{address}/rerank", content=b" " * 8_000_000, headers=headers)
            assert response.status_code == 413
            assert "1,000 bytes" in response.json()["error"]
        assert 'endpoint="/rerank",status="413"} 5.0' in client.get(f"{address}/metrics").text


def test_a_body_that_does_not_arrive_is_408(serve):
    import asyncio

    from mixencoder.serving.settings import Limits

    client = serve(limits=Limits(body_seconds=0.05))
    sent = []

    async def receive():
        await asyncio.sleep(10)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/rerank", "headers": [], "query_string": b"", "state": {}}
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 5))
    assert sent[0]["status"] == 408


def test_importing_the_package_the_command_line_and_the_model_loads_no_server():
    code = (
        "import sys, mixencoder, mixencoder.cli, mixencoder.serving\n"
        "server = {'fastapi', 'starlette', 'uvicorn', 'prometheus_client'}\n"
        "found = {*server, 'pydantic', 'torch'} & set(sys.modules)\n"
        "assert not found, found\n"
        "mixencoder.MixEncoder\n"
        "assert not server & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_the_command_line_refuses_what_cannot_be_served(checkpoint, tmp_path, monkeypatch):
    result = run("--allow-writes")
    assert result.exit_code == 2
    assert "--index" in result.stderr
    result = run("--index", str(tmp_path / "absent"), "--model", checkpoint)
    assert result.exit_code == 2
    assert "absent" in result.stderr
    assert run("--port", "70000").exit_code == 2
    (tmp_path / "keys").write_text("")
    assert "holds no key" in run("--api-keys", str(tmp_path / "keys")).stderr


def test_a_missing_extra_is_named(checkpoint, monkeypatch):
    monkeypatch.delitem(sys.modules, "mixencoder.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run("--model", checkpoint)
    assert result.exit_code == 2
    assert "mixencoder[serve]" in result.stderr


def test_settings_reach_the_server_and_open_addresses_are_warned_of(checkpoint, stored, monkeypatch):
    import mixencoder.serving.server

    seen = []
    monkeypatch.setattr(mixencoder.serving.server, "serve", lambda *given: seen.append(given))
    options = ["--host", "0.0.0.0", "--threads", "3", "--max-candidates", "7", "--name", "a", "--name", "b"]
    result = run("--model", checkpoint, *options, "--gather-ms", "5")
    assert result.exit_code == 0, result.output
    config, _, index = seen[0]
    assert (config.host, config.threads, config.limits.candidates) == ("0.0.0.0", 3, 7)
    assert (config.names, config.gather_seconds, config.allow_writes) == (("a", "b"), 0.005, False)
    assert index is None
    assert Path(checkpoint).name not in config.names
    assert "reachable from other machines" in result.stderr
    assert "not calibrated" in result.stderr
