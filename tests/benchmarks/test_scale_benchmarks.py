"""The benchmarks of shards and of building with Ray: what they prepare and compare, and their tables (without Ray)."""

import gzip
import itertools
import json

import pytest
import torch

from benchmarks.index import sharded
from benchmarks.processes import ray_build
from benchmarks.report import scale_tables
from mixencoder import MixEncoder
from tests.conftest import WORDS

TEXTS = [f"{a} {b} {c} in the pot of water" for a, b, c in itertools.product(WORDS[:5], WORDS[5:9], WORDS[9:12])]


@pytest.fixture
def model(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    files = ("dialogue/ubuntu_irc.train", "dialogue/ubuntu_irc_1in10.dev", "answers/medquad.train", "pairs/x.train")
    for number, name in enumerate(files):
        path = folder / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"query": f"{text} {number}", "positive": text} for text in TEXTS[number * 10 :]]
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_the_same_rows_make_one_index_and_shards(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "BLOCK", 7)
    queries = sharded.prepare(model, data, 40, 3, tmp_path / "out")
    assert queries == sharded.prepare(model, data, 40, 3, tmp_path / "out")
    indexes = [model.open_index(tmp_path / "out" / name, read_only=True) for name in ("one", "many", "few")]
    assert [len(index.shards) for index in indexes[1:]] == [3, sharded.FEW]
    rankings = [[model.rank(query, index, 10) for query in queries] for index in indexes]
    assert rankings[0] == rankings[1] == rankings[2]
    calls = sharded.timed_calls({"way": lambda query: seen.append(query)}, queries)
    seen: list = []
    for _ in range(len(queries) + 1):
        calls["way"]()
    assert seen == [*queries, queries[0]]


def test_builds_are_compared_row_for_row(model, data, tmp_path, monkeypatch):
    ray_build.write_texts(data, 50, tmp_path / "texts")
    files = sorted((tmp_path / "texts").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    texts, ids = [row["text"] for row in rows], [row["id"] for row in rows]
    assert (len(files), len(set(texts)), ids) == (5, 50, [f"t{number}" for number in range(50)])
    with pytest.raises(SystemExit, match="may be at most that"):
        ray_build.write_texts(data, 10**6, tmp_path / "other")
    monkeypatch.setattr(ray_build.MixEncoder, "from_pretrained", lambda: model)
    found = ray_build.run_stage(ray_build.PLAIN, tmp_path, 50, torch.get_num_threads())
    assert found["documents"] == 50
    for number, part in enumerate((slice(0, 20), slice(20, None))):
        model.index(texts[part], ids[part], tmp_path / "ray" / f"shard-{number}").close()
    assert ray_build.compare(tmp_path / "plain", tmp_path / "ray") == 50
    with model.open_index(tmp_path / "ray" / "shard-1") as index:
        index.update(["another text"], [ids[-1]])
    with pytest.raises(AssertionError, match="rows from 0 differ"):
        ray_build.compare(tmp_path / "plain", tmp_path / "ray")


def test_tables_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_tables, "RESULTS", tmp_path)
    assert scale_tables.sharded_table().startswith("Not recorded yet")
    assert scale_tables.ray_build_table().startswith("Not recorded yet")
    folder = tmp_path / scale_tables.DEVICE
    folder.mkdir()
    provenance = {"command": "python -m x", "commit": "a" * 40, "versions": {"torch": "2", "ray": "3"}}
    seconds = {"one": 0.1, "read as one": 0.102, "actors": 0.15, "few actors": 0.09}
    records = [{"prefilter": None, "seconds": seconds}]
    sizes = {"documents": 1000, "shards": 8, "few": 2}
    (folder / "index_sharded.json").write_text(json.dumps({**sizes, "provenance": provenance, "records": records}))
    lines = scale_tables.sharded_table().splitlines()
    assert lines[2:5] == [
        "| one index | 100.0 ms |",
        "| 8 shards, read as one | 102.0 ms (+2.0) |",
        "| 8 shards in Ray, an actor each | 150.0 ms (+50.0) |",
    ]
    # a stage that was not run yet has no row
    stages = {"plain": {"seconds": 10.0, "parts": {"model": 1.0}, "commit": "b" * 40}}
    document = {"documents": 50, "workers": 2, "provenance": provenance, "stages": stages}
    (folder / "ray_build.json").write_text(json.dumps(document))
    assert scale_tables.ray_build_table().splitlines()[2] == "| plain build, 2 threads | 10 s | 1.0 s |"
