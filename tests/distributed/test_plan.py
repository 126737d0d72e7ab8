"""Cutting files into shards and building them one by one, without Ray: whole or absent, and equal to a plain build."""

import gzip
import json
import re

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.distributed import plan
from mixencoder.distributed.plan import Part, Reading, Source, begin, build_shard, count_rows, cut, find_sources, finish
from mixencoder.durable import sync_folder
from mixencoder.errors import DataError, DuplicateIdError, IndexStateError
from mixencoder.index.shard_list import PLAN
from tests.conftest import WORDS

TEXTS = [f"{WORDS[number % 22]} {WORDS[number // 22]} {WORDS[(number * 7) % 22]}" for number in range(60)]
OPTIONS = {"precision": "float16", "layout": "projected", "on_overflow": "truncate", "store_text": True}


@pytest.fixture(scope="module")
def model(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True)


def written(path, texts, ids=None):
    rows = [
        {"text": text} if ids is None else {"text": text, "id": id}
        for text, id in zip(texts, ids or texts, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parts_of(paths, shard_rows):
    return cut([Source(path, 0, count_rows(path, Reading())) for path in paths], shard_rows)


def same_rows(one, many):
    """Whether two indexes hold the same documents in the same order, with the same bits."""
    left, right = one.snapshot(), many.snapshot()
    if list(one.entries()) != list(many.entries()):
        return False
    fields, others = (view.gather(range(len(view))).fields for view in (left, right))
    return all(torch.equal(fields[name], others[name]) for name in fields)


def test_rows_are_cut_into_shards_of_one_file_each():
    found = cut([Source("a", 9, 5), Source("b", 9, 0), Source("c", 9, 4)], 3)
    assert found == [
        Part("shard-000000", "a", 0, 3),
        Part("shard-000001", "a", 3, 5),
        Part("shard-000002", "c", 0, 3),
        Part("shard-000003", "c", 3, 4),
    ]


def test_files_are_found_and_counted(tmp_path):
    written(tmp_path / "b.jsonl", TEXTS[:3])
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines"\n2,one\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("one\n\ntwo\n")
    found = find_sources(str(tmp_path / "*"))
    assert [name.rpartition("/")[2] for name, _ in found] == ["a.csv", "b.jsonl", "c.txt.gz"]
    assert [size for _, size in found] == [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert [count_rows(name, Reading()) for name, _ in found] == [2, 3, 2]
    with pytest.raises(DataError, match=r"no file is named .*/\*\.parquet"):
        find_sources(str(tmp_path / "*.parquet"))


def test_files_behind_a_uri_are_read(tmp_path, model):
    pytest.importorskip("pyarrow")
    written(tmp_path / "a.jsonl", TEXTS[:3])
    written(tmp_path / "b.jsonl", TEXTS[3:5])
    (tmp_path / "b.other").write_text("x")
    found = find_sources(f"file://{tmp_path}/*.jsonl")
    assert found == [(f"file://{tmp_path}/{name}.jsonl", (tmp_path / f"{name}.jsonl").stat().st_size) for name in "ab"]
    assert find_sources(f"file://{tmp_path}/a.jsonl") == found[:1]
    assert [count_rows(name, Reading()) for name, _ in found] == [3, 2]
    build_shard(model, tmp_path, Part("shard", found[1][0], 1, 2), Reading(), OPTIONS)
    with model.open_index(tmp_path / "shard") as index:
        assert [entry.text for entry in index.entries()] == TEXTS[4:5]


def test_parquet_is_counted_without_reading_it(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "t.parquet")
    assert count_rows(str(tmp_path / "t.parquet"), Reading()) == len(TEXTS)


def test_shards_equal_the_plain_build_and_are_built_once(tmp_path, model):
    paths = [written(tmp_path / "1.jsonl", TEXTS[:25], list(map(str, range(25))))]
    paths.append(written(tmp_path / "2.jsonl", TEXTS[25:], list(map(str, range(25, 60)))))
    out, parts = tmp_path / "out", parts_of(paths, 10)
    begin(out, {"files": paths})
    # any order, as workers finish in any
    for part in parts[::-1]:
        assert not build_shard(model, out, part, Reading(), OPTIONS).held
    with pytest.raises(IndexStateError, match="out is unfinished"):
        model.open_index(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert [build_shard(model, out, part, Reading(), OPTIONS) for part in parts] == [
        plan.Built(part.name, part.last - part.first, held=True) for part in parts
    ]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert finish(out, [part.name for part in parts]) == 60
    assert not (out / PLAN).exists()
    with model.open_index(out) as many, model.index(TEXTS, list(map(str, range(60)))) as one:
        assert same_rows(one, many)
        assert not same_rows(one, model.index(TEXTS[::-1], list(map(str, range(60)))))


def test_a_build_that_was_killed_continues(tmp_path, model):
    path = written(tmp_path / "t.jsonl", TEXTS)
    out, parts = tmp_path / "out", parts_of([path], 20)
    begin(out, {"files": [path]})
    build_shard(model, out, parts[1], Reading(), OPTIONS)
    # what a killed worker leaves: a folder that is no shard yet
    model.index(TEXTS[:5], path=out / ".shard-shard-000000-1234")
    begin(out, {"files": [path]})
    assert sorted(found.name for found in out.iterdir()) == [PLAN, "shard-000001"]
    assert [build_shard(model, out, part, Reading(), OPTIONS).held for part in parts] == [False, True, False]
    finish(out, [part.name for part in parts])
    with model.open_index(out) as many, model.index(TEXTS) as one:
        assert same_rows(one, many)


def test_two_workers_may_build_the_same_shard(tmp_path, model, monkeypatch):
    path = written(tmp_path / "t.jsonl", TEXTS[:4])
    part = parts_of([path], 10)[0]
    renamed = []

    def other_worker(folder):
        # between the files' flush and the rename
        if not renamed:
            renamed.append(folder)
            build_shard(model, tmp_path, part, Reading(), OPTIONS)

    monkeypatch.setattr(plan, "sync_files", other_worker)
    assert build_shard(model, tmp_path, part, Reading(), OPTIONS).documents == 4
    assert not list(tmp_path.glob(".shard-*"))
    assert renamed
    sync_folder(tmp_path)


def test_a_worker_that_fails_leaves_no_shard(tmp_path, model):
    path = written(tmp_path / "t.jsonl", [*TEXTS[:4], TEXTS[0]], ["1", "2", "3", "4", "2"])
    with pytest.raises(DuplicateIdError, match="'2'"):
        build_shard(model, tmp_path, parts_of([path], 10)[0], Reading(), OPTIONS)
    written(tmp_path / "t.jsonl", TEXTS[:3])
    with pytest.raises(DataError, match="holds 3 candidates; expected more than 4"):
        build_shard(model, tmp_path, Part("shard-000000", path, 0, 5), Reading(), OPTIONS)
    assert [found.name for found in tmp_path.iterdir()] == ["t.jsonl"]


def test_ids_that_two_files_share_are_named(tmp_path, model):
    paths = [written(tmp_path / "1.jsonl", TEXTS[:3], ["1", "2", "3"])]
    paths.append(written(tmp_path / "2.jsonl", TEXTS[3:6], ["4", "2", "1"]))
    out, parts = tmp_path / "out", parts_of(paths, 10)
    begin(out, {})
    for part in parts:
        build_shard(model, out, part, Reading(), OPTIONS)
    with pytest.raises(DuplicateIdError, match=re.escape("ids are given twice: '1', '2' (in shard-000000, shard-")):
        finish(out, [part.name for part in parts])
    with pytest.raises(IndexStateError, match="unfinished"):
        model.open_index(out)


def test_equal_texts_without_ids_are_one_document(tmp_path, model):
    texts = [*TEXTS[:5], TEXTS[2], *TEXTS[5:9], TEXTS[0], TEXTS[2]]
    out, parts = tmp_path / "out", parts_of([written(tmp_path / "t.jsonl", texts)], 4)
    begin(out, {})
    for part in parts:
        build_shard(model, out, part, Reading(), OPTIONS)
    assert finish(out, [part.name for part in parts]) == 9
    with model.open_index(out) as many, model.index(iter(texts)) as one:
        assert same_rows(one, many)


def test_another_build_is_not_continued(tmp_path):
    out = tmp_path / "out"
    begin(out, {"shard_rows": 5, "files": ["a"]})
    with pytest.raises(IndexStateError, match=r"unfinished build with shard_rows 5; expected 6. Give the same files"):
        begin(out, {"shard_rows": 6, "files": ["a"]})
    (tmp_path / "other" / "x").mkdir(parents=True)
    with pytest.raises(IndexStateError, match="is not empty"):
        begin(tmp_path / "other", {})
    (out / "shards.json").write_text("{}")
    with pytest.raises(IndexStateError, match="holds a complete index"):
        begin(out, {"shard_rows": 5, "files": ["a"]})
