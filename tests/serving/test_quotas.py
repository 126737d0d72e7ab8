"""Limits of control groups: the number of threads follows the quota, and little memory gives a warning."""

import pytest
import torch
from typer.testing import CliRunner

from mixencoder.cli import app
from mixencoder.serving import quotas
from mixencoder.serving.service import usable_threads
from mixencoder.serving.settings import Limits
from tests.serving.cases import DOCUMENTS, OTHER_QUERY, QUERY


@pytest.fixture
def groups(tmp_path):
    """Return a function that writes files of control groups; the process's own are given first."""

    def write(own: str, files: dict[str, str]):
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        (tmp_path / "own").write_text(own)
        return tmp_path / "cgroup", tmp_path / "own"

    return write


@pytest.mark.parametrize(
    ("own", "files", "cpu", "memory"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "536870912\n"}, 1.5, 2**29),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        (
            "0::/a.slice/b.service\n",
            {"a.slice/cpu.max": "100000 100000", "a.slice/b.service/cpu.max": "max 100000", "a.slice/memory.max": "7"},
            1.0,
            7,
        ),
        (
            "5:memory:/x\n4:cpu,cpuacct:/\n0::/\n",
            {
                "memory/x/memory.limit_in_bytes": "1073741824",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/cpu.cfs_quota_us": "250000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            2.5,
            2**30,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
    ],
)
def test_limits_of_both_versions_are_read(groups, own, files, cpu, memory):
    root, path = groups(own, files)
    assert quotas.cpu_quota(root, path) == cpu
    assert quotas.memory_limit(root, path) == memory


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert quotas.cpu_quota(tmp_path, tmp_path / "absent") is None
    assert quotas.memory_limit(tmp_path, tmp_path / "absent") is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 3), (2.5, 2), (0.5, 1), (8.0, 3)])
def test_threads_follow_the_quota_rounded_down(monkeypatch, quota, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr("mixencoder.serving.service.cpu_quota", lambda: quota)
    assert usable_threads(None) == threads
    assert usable_threads(5) == 5


@pytest.mark.parametrize(("limit", "warned"), [(None, False), (2**31, False), (2**29, True)])
def test_little_memory_is_warned_of(checkpoint, monkeypatch, limit, warned):
    import mixencoder.serving.server

    monkeypatch.setattr(quotas, "memory_limit", lambda: limit)
    monkeypatch.setattr(mixencoder.serving.server, "serve", lambda *given: None)
    result = CliRunner().invoke(app, ["serve", "--model", checkpoint])
    assert result.exit_code == 0, result.output
    assert ("512 MiB" in result.stderr) == warned


def test_tokens_of_a_request_are_limited_as_far_as_they_are_read(serve, model):
    count = sum(map(len, (*model.read_query([QUERY]), *model.read_document(DOCUMENTS))))
    body = {"query": QUERY, "texts": DOCUMENTS}
    assert serve(limits=Limits(tokens=count)).post("/rerank", json=body).status_code == 200
    client = serve(limits=Limits(tokens=count - 1))
    refused = client.post("/rerank", json=body)
    assert refused.status_code == 413
    assert f"{count} tokens" in refused.json()["error"]
    assert f"{count - 1}" in refused.json()["error"]
    assert client.post("/v1/rank", json={"queries": [QUERY, OTHER_QUERY], "documents": DOCUMENTS}).status_code == 413
    # the tiny model reads 40 tokens
    long = {"query": "dog", "texts": ["dog " * 1000]}
    assert serve(limits=Limits(tokens=43)).post("/rerank", json=long).status_code == 200
