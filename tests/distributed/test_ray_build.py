"""Building with Ray Data on this machine: equal to a plain build, also when a worker or the driver is killed."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch

from benchmarks.processes.ray_build import actor_processes
from mixencoder import MixEncoder
from mixencoder.errors import DataError, DuplicateIdError, IndexStateError, InputError
from mixencoder.index.shard_list import LIST
from tests.conftest import WORDS
from tests.distributed.test_plan import same_rows, written

pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
pytest.importorskip("ray.data", reason="ray is installed without ray[data]")
pytestmark = pytest.mark.usefixtures("cluster")

TEXTS = [f"{a} {b} {c}" for a in WORDS[:12] for b in WORDS[:10] for c in WORDS[:2]]
IDS = [f"id {number}" for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def model(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    half = len(TEXTS) // 2
    written(folder / "1.jsonl", TEXTS[:half], IDS[:half])
    written(folder / "2.jsonl", TEXTS[half:], IDS[half:])
    return str(folder / "*.jsonl")


def build(model, path, files, **options):
    from mixencoder.distributed.ray_build import Workers, build_index

    return build_index(model, path, files, workers=Workers(2), **options)


def test_shards_of_two_workers_equal_a_plain_build(model, files, tmp_path):
    result = build(model, tmp_path / "out", files, shard_rows=50)
    assert result == (len(TEXTS), 6, 0)
    assert len(json.loads((tmp_path / "out" / LIST).read_text())["shards"]) == 6
    with model.open_index(tmp_path / "out") as many, model.index(TEXTS, IDS) as one:
        assert same_rows(one, many)
        for top_k in (1, 7, None):
            assert model.rank("boil water", many, top_k) == model.rank("boil water", one, top_k)


def test_a_killed_worker_costs_its_shard_and_changes_nothing(model, files, tmp_path):
    out, results = tmp_path / "out", []
    thread = threading.Thread(target=lambda: results.append(build(model, out, files, shard_rows=4)))
    thread.start()
    killed = None
    while thread.is_alive() and killed is None:
        if any(out.glob("shard-*")) and (found := actor_processes("_ShardEncoder")):
            killed = found[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.01)
    thread.join(300)
    assert killed is not None
    assert results == [(len(TEXTS), 60, results[0].held)]
    # the new worker looks for what the killed one left; its drafts are no shards
    with model.open_index(out) as many, model.index(TEXTS, IDS) as one:
        assert len(many.shards) == 60
        assert same_rows(one, many)


def test_a_build_continues_where_shards_are_complete(model, files, tmp_path, monkeypatch):
    from mixencoder.distributed import ray_build

    def killed(folder, names):
        raise KeyboardInterrupt

    out, finish = tmp_path / "out", ray_build.finish
    monkeypatch.setattr(ray_build, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        build(model, out, files, shard_rows=50)
    shutil.rmtree(out / "shard-000002")
    monkeypatch.setattr(ray_build, "finish", finish)
    with pytest.raises(IndexStateError, match="unfinished build with shard_rows 50; expected 60"):
        build(model, out, files, shard_rows=60)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*/*")}
    assert build(model, out, files, shard_rows=50) == (len(TEXTS), 6, 5)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with model.open_index(out) as many, model.index(TEXTS, IDS) as one:
        assert same_rows(one, many)
    with pytest.raises(IndexStateError, match="holds a complete index"):
        build(model, out, files, shard_rows=50)


def test_what_cannot_be_built_is_said(model, files, tmp_path):
    from mixencoder.distributed.ray_build import Workers, build_index

    with pytest.raises(DataError, match="no file is named"):
        build(model, tmp_path / "a", str(tmp_path / "*.jsonl"))
    with pytest.raises(InputError, match="expected at least one worker"):
        build_index(model, tmp_path / "b", files, workers=Workers(0))
    written(tmp_path / "1.jsonl", TEXTS[:3], ["1", "2", "3"])
    written(tmp_path / "2.jsonl", TEXTS[3:6], ["4", "2", "5"])
    with pytest.raises(DuplicateIdError, match=r"given twice: '2'"):
        build(model, tmp_path / "c", str(tmp_path / "*.jsonl"))
