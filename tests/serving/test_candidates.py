"""Changing the index over HTTP: what is acknowledged is on disk, and only where the server allows it."""

import json
import subprocess
import sys

import pytest

from tests.serving.cases import IDS, METADATA, QUERY, expected

NEW = {"id": "a/../b\n", "text": "the cat sat in paris", "metadata": {"page": 3, "of": None, "in": [{"x": None}]}}


@pytest.fixture
def writer(serve, folder):
    return serve(folder, allow_writes=True)


def delete(client, ids):
    return client.request("DELETE", "/v1/candidates", json={"ids": ids})


def test_put_adds_and_replaces_and_is_on_disk_when_acknowledged(writer, model, folder):
    changed = {"id": IDS[0], "text": "boil rice in water"}
    response = writer.put("/v1/candidates", json={"candidates": [changed, NEW]})
    assert response.status_code == 200, response.text
    assert response.json() == {"added": 1, "replaced": 1, "candidates": len(IDS) + 1}
    # opened anew, as another process would
    with model.open_index(folder, read_only=True) as index:
        assert index.get(NEW["id"]).text == NEW["text"]
        assert index.get(NEW["id"]).metadata == NEW["metadata"]
        assert index.get(IDS[0]).text == changed["text"]
        assert index.get(IDS[0]).metadata is None
        right = expected(model, QUERY, index)
        assert index.verify().ok
    found = writer.post("/v1/rank", json={"queries": [QUERY], "ids": "all"}).json()["rankings"][0]
    assert [(entry["id"], entry["score"]) for entry in found] == right
    assert {entry["id"]: entry.get("metadata") for entry in found}[NEW["id"]] == NEW["metadata"]


def test_delete_removes_and_is_on_disk_when_acknowledged(writer, model, folder):
    assert delete(writer, IDS[1:3]).json() == {"removed": 2, "candidates": len(IDS) - 2}
    with model.open_index(folder, read_only=True) as index:
        assert list(index) == [IDS[0], *IDS[3:]]
    assert writer.post("/v1/rank", json={"queries": [QUERY], "ids": [IDS[1]]}).status_code == 404


def test_an_unknown_id_removes_nothing(writer, model, folder):
    response = delete(writer, [IDS[0], "/etc/passwd"])
    assert response.status_code == 404
    assert "'/etc/passwd'" in response.json()["error"]["message"]
    with model.open_index(folder, read_only=True) as index:
        assert len(index) == len(IDS)


def test_ids_that_look_like_paths_are_only_ids(writer, folder):
    before = {path for path in folder.parent.rglob("*") if not path.name.endswith(("-wal", "-shm"))}
    ids = ["/etc/passwd", "../x", "..", "C:\\x", "~", "a\0b", "index.json", "%2e%2e"]
    candidates = [{"id": id, "text": "dog"} for id in ids]
    response = writer.put("/v1/candidates", json={"candidates": candidates})
    assert response.status_code in (200, 422), response.text
    if response.status_code == 422:
        # the index has no room for NUL
        candidates = [entry for entry in candidates if "\0" not in entry["id"]]
        assert writer.put("/v1/candidates", json={"candidates": candidates}).json()["added"] == len(candidates)
    found = writer.post("/v1/rank", json={"queries": [QUERY], "ids": ["/etc/passwd", ".."]}).json()["rankings"][0]
    assert {entry["id"] for entry in found} == {"/etc/passwd", ".."}
    assert delete(writer, [entry["id"] for entry in candidates]).json()["candidates"] == len(IDS)
    after = {path for path in folder.parent.rglob("*") if not path.name.endswith(("-wal", "-shm"))}
    assert before == after


def test_a_server_is_read_only_unless_told_otherwise(client, serve):
    for response in (client.put("/v1/candidates", json={"candidates": [NEW]}), delete(client, IDS[:1])):
        assert response.status_code == 403
        assert "read-only" in response.json()["error"]["message"]
    assert serve(allow_writes=True).put("/v1/candidates", json={"candidates": [NEW]}).status_code == 404


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [{"id": "a"}],
        [{"id": "", "text": "dog"}],
        [{"id": 1, "text": "dog"}],
        [{"id": "a", "text": "dog", "metadata": [1]}],
        [{"id": "a", "text": "dog"}] * 2,
        [{"id": "a", "text": "dog", "more": 1}],
        [{"id": "a", "text": "\ud83d"}],
        "a",
    ],
)
def test_candidates_that_cannot_be_stored_change_nothing(writer, model, folder, candidates):
    content = json.dumps({"candidates": candidates})
    headers = {"Content-Type": "application/json"}
    assert writer.put("/v1/candidates", content=content, headers=headers).status_code == 422
    with model.open_index(folder, read_only=True) as index:
        assert list(index) == IDS


def test_a_lock_of_another_process_is_503_and_retried(writer, model, folder):
    code = (
        "import sys, fcntl\n"
        "from mixencoder.index.folder import FolderStore\n"
        "with FolderStore(sys.argv[1]).lock():\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        response = writer.put("/v1/candidates", json={"candidates": [NEW]})
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
        assert str(folder) not in response.text
        other.stdin.close()
    assert writer.put("/v1/candidates", json={"candidates": [NEW]}).status_code == 200


def test_what_another_process_adds_is_ranked_without_a_restart(client, serve, model, folder):
    client = serve(folder)
    with model.open_index(folder) as index:
        index.add([NEW["text"]], [NEW["id"]])
    found = client.post("/v1/rank", json={"queries": [QUERY], "ids": "all"}).json()["rankings"][0]
    assert NEW["id"] in {entry["id"] for entry in found}
    assert METADATA[0] in [entry.get("metadata") for entry in found]
