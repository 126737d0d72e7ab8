"""Several indexes read as one: what a single index with the same documents gives, in every way of reading."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixencoder.errors import (
    DuplicateIdError,
    IndexDamagedError,
    IndexMismatchError,
    IndexStateError,
    InputError,
    UnknownIdError,
)
from mixencoder.index import Entry, ShardedIndex
from mixencoder.index.shard_list import LIST, repeated_ids, shard_paths
from mixencoder.index.sharded_index import list_shards, merge_shards, open_any
from tests.index.index_stub import FINGERPRINT, build, check, create, reopen

TEXTS = [f"text {number}" + " | more" * (number % 3) for number in range(40)]
IDS = [f"id {number}" for number in range(40)]


def shards_of(sizes, folder=None):
    """Indexes in memory, or below a folder, that hold the first texts, so many each."""
    bounds = itertools.pairwise([0, *itertools.accumulate(sizes)])
    return [
        build(None if folder is None else folder / f"s{number}", TEXTS[first:last], IDS[first:last])
        for number, (first, last) in enumerate(bounds)
    ]


def entries(numbers):
    return [Entry(IDS[number], TEXTS[number], None) for number in numbers]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    removed=st.sets(st.integers(0, 35), max_size=6),
    wanted=st.lists(st.integers(0, 10**6), max_size=12),
    size=st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_shards_are_read_as_one_index(sizes, removed, wanted, size):
    shards = shards_of(sizes)
    for number in sorted(removed):
        for shard in shards:
            if IDS[number] in shard:
                shard.remove(IDS[number])
    index = ShardedIndex(shards)
    left = [number for number in range(sum(sizes)) if number not in removed]
    assert list(index) == [IDS[number] for number in left]
    assert list(index.entries()) == entries(left)
    single = build(None, [TEXTS[number] for number in left], [IDS[number] for number in left])
    view, expected = index.snapshot(), single.snapshot()
    assert (len(view), view.rows) == (len(expected), expected.rows)
    chunks, whole = list(view.chunks(size)), list(expected.chunks(10**6))
    assert all(len(chunk.positions) <= size for chunk in chunks)
    if not left:
        assert not chunks
        return
    assert np.concatenate([chunk.positions for chunk in chunks]).tolist() == whole[0].positions.tolist()
    for name, rows in whole[0].fields.items():
        assert torch.cat([chunk.fields[name] for chunk in chunks]).equal(rows)
    positions = [number % len(left) for number in wanted]
    found, right = view.gather(positions), expected.gather(positions)
    assert found.positions.tolist() == right.positions.tolist()
    assert all(found.fields[name].equal(rows) for name, rows in right.fields.items())
    assert view.ids(positions) == expected.ids(positions)
    assert view.texts(positions) == expected.texts(positions)
    assert view.entries_of(positions) == expected.entries_of(positions)
    assert [record.id for record in view.records(positions)] == expected.ids(positions)
    assert view.positions(expected.ids(positions)).tolist() == positions


def test_every_way_of_reading_agrees(tmp_path):
    index = ShardedIndex(shards_of([7, 0, 5, 11], tmp_path))
    for size in (1, 4, 1000):
        view = index.snapshot()
        owners = np.concatenate([chunk.positions for chunk in view.chunks(size)])
        assert (np.diff(owners) >= 0).all()
        assert set(owners.tolist()) == set(range(23))
    assert index.get("id 8") == Entry("id 8", TEXTS[8], None)
    assert (
        index.get("id 8", with_fields=True).fields.keys() == index.shards[2].get("id 8", with_fields=True).fields.keys()
    )
    assert "id 22" in index
    assert "id 23" not in index
    assert 7 not in index
    with pytest.raises(UnknownIdError, match="'id 23'"):
        index.get("id 23")
    with pytest.raises(InputError, match="positions reach from 0 to 23"):
        index.snapshot().ids([0, 23])


def test_commits_to_a_shard_are_seen_and_snapshots_stay():
    shards = shards_of([3, 4])
    index = ShardedIndex(shards)
    before = index.snapshot()
    assert index.snapshot() is before
    shards[0].add(["a new text"], ["new"])
    assert list(index) == [*IDS[:3], "new", *IDS[3:7]]
    assert list(before) == IDS[:7]


def test_shards_of_other_encoders_or_settings_are_rejected():
    first = build(None, ["one"], ["1"])
    with pytest.raises(IndexMismatchError, match=r"shard number 1 .*model is m2, expected m1"):
        ShardedIndex([first, build(None, ["two"], ["2"], fingerprint={**FINGERPRINT, "model": "m2"})])
    with pytest.raises(IndexMismatchError, match=r"shard number 1 was made with settings .*build all shards alike"):
        ShardedIndex([first, build(None, ["two"], ["2"], settings={"precision": "other"})])
    with pytest.raises(IndexMismatchError, match="store_text False; expected True"):
        ShardedIndex([first, build(None, ["two"], ["2"], store_text=False)])
    with pytest.raises(InputError, match="at least one index"):
        ShardedIndex([])


def test_it_is_read_only():
    index = ShardedIndex(shards_of([2, 2]))
    changes = [lambda: index.add(["x"]), lambda: index.remove(["id 1"]), lambda: index.update(["x"], ["id 1"])]
    for change in [*changes, index.compact, index.repair]:
        with pytest.raises(IndexStateError, match="2 shards and is read-only; open the shard"):
            change()
    assert len(index) == 4


def test_repeated_ids_are_found_in_any_order():
    one = build(None, ["b", "a", "c"], ["3", "1", "2"])
    two = build(None, ["d", "a", "e"], ["4", "1", "2"])
    found = list(repeated_ids([one.listing(), two.listing()]))
    assert found == [("1", [0, 1], True), ("2", [0, 1], True)]
    two.remove("1")
    assert [id for id, _, _ in repeated_ids([one.listing(), two.listing()])] == ["2"]
    # ids that are hashes of equal texts
    without = [build(None, ["x", "y"]).listing(), build(None, ["y", "z"]).listing()]
    assert [(numbers, given) for _, numbers, given in repeated_ids(without)] == [([0, 1], False)]


def test_repeated_ids_are_found_over_many_pages():
    one = build(None, [f"t{n}" for n in range(3000)], [f"{n:05}" for n in range(3000)])
    two = build(None, [f"u{n}" for n in range(2999, 5000)], [f"{n:05}" for n in range(2999, 5000)])
    assert [id for id, _, _ in repeated_ids([one.listing(), two.listing()])] == ["02999"]


def test_a_list_of_shards_is_opened_as_one(tmp_path):
    for shard in shards_of([5, 6, 4], tmp_path / "out"):
        shard.close()
    # without a list: the folders inside, by name
    assert shard_paths(tmp_path / "out") == [tmp_path / "out" / f"s{number}" for number in range(3)]
    apart = build(tmp_path / "apart", TEXTS[15:18], IDS[15:18])
    inside = [tmp_path / "out" / f"s{number}" for number in (0, 1, 2)]
    assert list_shards(tmp_path / "out", [*inside, tmp_path / "apart"]) == 18
    names = json.loads((tmp_path / "out" / LIST).read_text())["shards"]
    assert names == ["s0", "s1", "s2", str(apart.path)]
    with open_any(tmp_path / "out") as index:
        assert list(index.entries()) == entries(range(18))
        found = index.info()
        assert (found["documents"], len(found["shards"])) == (18, 4)
        report = index.verify()
        assert report.ok
        assert (report.documents, report.rows) == (18, found["rows"])
    # a folder with a list can be moved
    (tmp_path / "out").rename(tmp_path / "moved")
    with open_any(tmp_path / "moved") as index:
        assert len(index) == 18


def test_merging_copies_every_row(tmp_path):
    for shard in shards_of([5, 6, 4], tmp_path):
        shard.close()
    merge_shards(tmp_path / "one", [tmp_path / f"s{number}" for number in range(3)]).close()
    with reopen(tmp_path / "one") as index:
        check(index.snapshot(), entries(range(15)))
        assert index.verify().ok


def test_repeated_ids_are_named_when_shards_are_merged(tmp_path):
    build(tmp_path / "a", ["one", "two"], ["1", "2"]).close()
    build(tmp_path / "b", ["three", "other"], ["3", "2"]).close()
    for merge in (list_shards, merge_shards):
        with pytest.raises(DuplicateIdError, match=r"the ids '2' \(in .*/a, .*/b\)"):
            merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="are the same index"):
        list_shards(tmp_path / "out", [tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_a_damaged_shard_is_not_merged(tmp_path):
    for shard in shards_of([5, 6], tmp_path):
        shard.close()
    file = next((tmp_path / "s1").glob("generation-*/shard-*.code.bin"))
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    with pytest.raises(IndexDamagedError, match="nothing was copied"):
        merge_shards(tmp_path / "one", [tmp_path / "s0", tmp_path / "s1"])
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "other", "format": 1, "shards": ["a"]}',
                                     '{"kind": "mixencoder-sharded-index", "format": 1, "shards": []}',
                                     '{"kind": "mixencoder-sharded-index", "format": 1, "shards": [1]}'])  # fmt: skip
def test_a_list_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / LIST).write_text(content)
    with pytest.raises(IndexDamagedError, match=r"shards\.json cannot be read"):
        open_any(tmp_path)


def test_verifying_reports_a_shard_that_is_cut_short(tmp_path):
    for shard in shards_of([5, 6], tmp_path):
        shard.close()
    file = next((tmp_path / "s1").glob("generation-*/shard-*.code.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IndexDamagedError):
        open_any(tmp_path)
    with open_any(tmp_path, check_sizes=False) as index:
        report = index.verify()
    assert [str(file) in str(damage) for damage in report.damages] == [True]


def test_a_newer_list_says_so(tmp_path):
    (tmp_path / LIST).write_text('{"kind": "mixencoder-sharded-index", "format": 2, "shards": {}}')
    with pytest.raises(IndexStateError, match="format 2; this version of mixencoder reads up to 1"):
        open_any(tmp_path)


def test_a_folder_without_shards_is_no_index(tmp_path):
    with pytest.raises(IndexStateError, match="is not an index"):
        open_any(tmp_path)
    with pytest.raises(InputError, match="list of paths is empty"):
        shard_paths([])


def test_an_unfinished_shard_is_named(tmp_path):
    create(tmp_path / "out" / "a").close()
    with pytest.raises(IndexStateError, match="/a is unfinished"):
        open_any(tmp_path / "out")
