"""The public methods of the candidate index: its content after any history of changes, transactions, resuming."""

import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixencoder.errors import (
    DuplicateIdError,
    IndexLockedError,
    IndexMismatchError,
    IndexStateError,
    InputError,
)
from mixencoder.index import AddResult, CandidateIndex, Entry, shards
from tests.index.index_stub import FINGERPRINT, SCHEMA, build, check, create, encode, project, reopen, rows_of


@pytest.fixture(params=["memory", "disk"])
def path(request, tmp_path):
    """The path of a new index: None for memory, or a folder that does not exist yet."""
    return None if request.param == "memory" else tmp_path / "index"


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 1,024 rows, so that a few thousand rows fill several."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)


def text_of(number: int, version: int = 0) -> str:
    return f"text {number} version {version}" + "| more" * (number * 7 % 4 if number % 3 == 0 else 0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([0, 1, 2, 3, 30, 500, 1100]), st.sampled_from(["list", "iterator"])),
        st.tuples(st.just("add again"), st.integers(0, 10**6), st.none()),
        st.tuples(st.just("remove"), st.integers(0, 10**6), st.sampled_from([1, 2, 10, 400, 2000])),
        st.tuples(st.just("update"), st.integers(0, 10**6), st.sampled_from([1, 2, 10, 400])),
        st.tuples(st.just("compact"), st.none(), st.none()),
        st.tuples(st.just("reopen"), st.none(), st.none()),
        st.tuples(st.just("snapshot"), st.none(), st.none()),
    ),
    max_size=12,
)


@given(history=operations, seed=st.integers(0, 2**32 - 1), on_disk=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_any_history_an_index_equals_one_built_fresh(history, seed, on_disk, small_shards, tmp_path_factory):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("history") / "index" if on_disk else None
    index, expected, snapshots, number = build(path), {}, [], 0

    def pick(start, most):
        ids = list(expected)
        return ids[start % len(ids) :][:most] if rng.random() < 0.5 else rng.permutation(ids)[:most].tolist()

    for kind, first, second in history:
        if kind == "add":
            texts = [text_of(number + i) for i in range(first)]
            # half of the documents get ids by content
            ids = None if number % 2 else [f"id {number + i}" for i in range(first)]
            metadata = [{"n": number + i} if i % 2 else None for i in range(first)]
            number += first
            before = list(expected)
            result = index.add(texts if second == "list" else iter(texts), ids, metadata=metadata)
            assert result == AddResult(added=first)
            held = [id for id in index if id not in set(before)]
            expected.update({id: Entry(id, text, m) for id, text, m in zip(held, texts, metadata, strict=True)})
        elif kind == "add again" and expected:
            entry = expected[pick(first, 1)[0]]
            if entry.id.startswith("id "):
                with pytest.raises(DuplicateIdError, match=entry.id):
                    index.add([entry.text], [entry.id])
            elif " and" not in entry.text:
                assert index.add([entry.text]) == AddResult(skipped=1)
            else:
                assert index.add([entry.text], [entry.id + "x"]).added == 1
                expected[entry.id + "x"] = Entry(entry.id + "x", entry.text, None)
        elif kind == "remove" and expected:
            ids = pick(first, second)
            assert index.remove(ids) == len(ids)
            for id in ids:
                del expected[id]
        elif kind == "update" and expected:
            ids = pick(first, second)
            texts = [f"{expected[id].text} and{'|' * (first % 2)} then" for id in ids]
            index.update(texts, ids)
            for id, text in zip(ids, texts, strict=True):
                expected[id] = Entry(id, text, expected.pop(id).metadata)
        elif kind == "compact":
            index.compact()
        elif kind == "reopen" and on_disk:
            index.close()
            index = reopen(path)
        elif kind == "snapshot":
            snapshots.append((index.snapshot(), list(expected.values())))
        assert len(index) == len(expected)
    assert index.verify().ok
    check(index.snapshot(), list(expected.values()), size=700)
    fresh = create()
    fresh.build((e.text for e in expected.values()), list(expected), metadata=[e.metadata for e in expected.values()])
    check(fresh.snapshot(), list(index.entries()))
    # later changes did not affect earlier snapshots
    for view, entries in snapshots:
        check(view, entries)


def test_the_same_text_twice_is_one_entry(path):
    index = build(path, ["a", "b", "a"])
    assert index.add(["b", "c", "c"]) == AddResult(added=1, skipped=2)
    assert [entry.text for entry in index.entries()] == ["a", "b", "c"]


def test_an_update_moves_a_document_to_the_end_and_keeps_its_metadata(path):
    index = create(path)
    index.build(["a", "b"], ["x", "y"], metadata=[{"n": [1]}, None])
    assert index.update("c|d", "x") == AddResult(replaced=1)
    check(index.snapshot(), [Entry("y", "b", None), Entry("x", "c|d", {"n": [1]})])
    index.update(["e"], ["x"], metadata=[None])
    assert index.get("x") == Entry("x", "e", None)


def test_adding_a_replaced_text_again_raises_because_its_id_holds_other_content(path):
    index = build(path, ["first"])
    (id,) = index
    index.update(["second"], [id])
    with pytest.raises(DuplicateIdError, match=id):
        index.add(["first"])


def test_get_gives_text_metadata_and_on_request_rows(path):
    index = create(path)
    index.build(["a", "b|c"], ["x", "y"], metadata=[None, {"url": "u"}])
    assert index.get("y") == Entry("y", "b|c", {"url": "u"})
    fields, _ = rows_of(["b|c"])
    found = index.get("y", with_fields=True).fields
    assert all(found[name].equal(rows) for name, rows in fields.items())
    assert "x" in index
    assert "z" not in index
    assert 3 not in index


def test_given_embeddings_are_projected_instead_of_encoding_texts(path):
    index = create(path, encode=None)
    embeddings = torch.tensor([[5.0, 1.0], [9.0, 2.0], [5.0, 1.0]])
    # without ids they get ids by content
    assert index.build(embeddings=embeddings) == AddResult(added=2, skipped=1)
    assert index.add(["text"], ["t"], embeddings=np.array([[7.0, 0.0]])).added == 1
    assert index.update(ids=["t"], embeddings=torch.tensor([[8.0, 0.0]])).replaced == 1
    (chunk,) = index.snapshot().chunks(10)
    assert chunk.fields["scale"].tolist() == [5.0, 9.0, 8.0]
    assert index.get("t").text is None


def test_texts_are_kept_unless_store_text_is_false(path):
    index = build(path, ["a"], ["x"], store_text=False)
    assert index.get("x").text is None
    assert index.snapshot().texts([0]) == [None]
    assert index.store_text is False


def test_truncated_texts_are_counted(path):
    index = create(path)
    assert index.build(["a", "cut b"]).cut == 1
    assert index.add(iter(["cut c", "cut d"])).cut == 2
    assert index.update(["cut e"], [next(iter(index))]).cut == 1


def test_rows_of_one_shard_are_handed_out_without_a_copy(path):
    index = build(path, [f"text {i}" for i in range(100)])
    view = index.snapshot()
    (whole,) = view.chunks(100)
    halves = list(view.chunks(50))
    for name, rows in whole.fields.items():
        assert halves[1].fields[name].data_ptr() == rows[50:].data_ptr()


def test_a_view_stays_usable_after_removal_compaction_and_close(path):
    index = build(path, ["a", "b|c", "d"], ["x", "y", "z"])
    view, before = index.snapshot(), list(index.entries())
    index.remove("y")
    index.compact()
    index.add(["e"], ["y"])
    index.close()
    check(view, before)
    with pytest.raises(IndexStateError, match="closed"):
        len(index)


def test_compaction_drops_what_was_removed_and_nothing_else(path):
    texts = [f"text {i}" for i in range(3000)]
    index = build(path, texts, [str(i) for i in range(3000)])
    before = index.info()
    assert index.compact() == 0
    index.remove([str(i) for i in range(0, 3000, 2)])
    assert index.info()["removed_rows"] == 1500
    assert index.compact() > 0
    after = index.info()
    assert after["removed_rows"] == 0
    assert after["array_bytes"] < 0.75 * before["array_bytes"]
    check(index.snapshot(), [Entry(str(i), texts[i], None) for i in range(1, 3000, 2)])


def test_an_iterator_is_committed_every_1024_texts_and_a_list_at_once(path):
    index = build(path)

    def broken():
        yield from (f"text {i}" for i in range(2500))
        yield 7

    with pytest.raises(InputError, match="document 2500 is 7") as caught:
        index.add(broken())
    assert len(index) == 2048
    assert "2,048 documents" in caught.value.__notes__[0]
    with pytest.raises(InputError, match="document 2500 is 7"):
        index.add(["x" + str(i) for i in range(2500)] + [7])
    assert len(index) == 2048


def test_a_transaction_that_fails_changes_nothing(path):
    index = build(path, ["a", "b"], ["x", "y"])
    before = index.snapshot()
    left = 1

    def failing(texts, *, batch_size):
        nonlocal left
        if left == 0:
            raise RuntimeError("out of memory")
        left -= 1
        return encode(texts, batch_size=batch_size)

    index._encode = failing
    with pytest.raises(RuntimeError):
        index.add([f"t{i}" for i in range(2000)])
    with pytest.raises(RuntimeError):
        index.update(["q"], ["x"])
    assert index.snapshot() is before
    index._encode = encode
    index.add(["c"], ["z"])
    check(index.snapshot(), [Entry("x", "a", None), Entry("y", "b", None), Entry("z", "c", None)])
    assert index.verify().ok


def test_opening_an_index_of_another_model_raises_and_names_both(tmp_path):
    build(tmp_path / "index", ["a"]).close()
    other = {"name": "other", "model": "m2", "tokenizer": "t1"}
    with pytest.raises(IndexMismatchError, match="made by stub, but this is other: model is m1, expected m2") as caught:
        CandidateIndex.open(tmp_path / "index", other)
    assert "tokenizer" not in str(caught.value)
    # the name is not compared: the same checkpoint may have another path
    assert len(CandidateIndex.open(tmp_path / "index", {**FINGERPRINT, "name": "moved"})) == 1
    assert len(CandidateIndex.open(tmp_path / "index", None)) == 1


def test_an_index_opened_without_a_model_reads_and_removes_but_does_not_encode(tmp_path):
    build(tmp_path / "index", ["a", "b"], ["x", "y"]).close()
    index = CandidateIndex.open(tmp_path / "index", None)
    with pytest.raises(IndexStateError, match=r"without a model.*texts"):
        index.add(["c"])
    with pytest.raises(IndexStateError, match=r"without a model.*embeddings"):
        index.add(embeddings=torch.zeros(1, 1))
    index.remove("x")
    index.compact()
    assert list(index) == ["y"]


def test_creating_over_a_complete_index_raises(tmp_path):
    build(tmp_path / "index", ["a"]).close()
    with pytest.raises(IndexStateError, match="complete index of 1 documents"):
        create(tmp_path / "index")
    with pytest.raises(IndexStateError, match="complete"):
        reopen(tmp_path / "index").build(["b"])


@pytest.mark.parametrize("named", [False, True])
def test_an_interrupted_build_resumes_after_its_last_commit(tmp_path, named):
    texts = [f"text {i}" for i in range(5000)]
    ids = [f"id {i}" for i in range(5000)] if named else None
    encoded = []

    def counting(batch, *, batch_size):
        if len(encoded) == 3 * 1024:
            raise KeyboardInterrupt
        encoded.extend(batch)
        return encode(batch, batch_size=batch_size)

    index = create(tmp_path / "index", encode=counting)
    with pytest.raises(KeyboardInterrupt):
        index.build(texts, ids)
    with pytest.raises(IndexStateError, match="unfinished"):
        index.add(["x"])
    index.close()
    with pytest.raises(IndexStateError, match=r"unfinished.*3,072 documents"):
        reopen(tmp_path / "index")
    with pytest.raises(IndexMismatchError, match="model is m1, expected m2"):
        create(tmp_path / "index", fingerprint={"model": "m2", "tokenizer": "t1"})
    with pytest.raises(IndexMismatchError, match="settings"):
        create(tmp_path / "index", settings={"chunk": True})
    index = create(tmp_path / "index")
    assert index.build(iter(texts), ids) == AddResult(added=5000 - 3072, skipped=3072)
    assert [entry.text for entry in index.entries()] == texts
    reopen(tmp_path / "index")


def test_a_resumed_build_rejects_an_id_whose_text_has_changed(tmp_path):
    index = create(tmp_path / "index")
    with pytest.raises(InputError):
        index.build(iter(["a"] + [f"b{i}" for i in range(1023)] + [None]), map(str, range(1025)))
    with pytest.raises(DuplicateIdError, match="other content under ids '0'"):
        index.build(["changed"], ["0"])


def test_a_second_writer_raises_at_once_and_can_write_afterwards(path):
    index = build(path, ["a"])
    other = index if path is None else reopen(path)
    entered, leave = threading.Event(), threading.Event()

    def slowly():
        yield "b"
        entered.set()
        leave.wait(30)

    thread = threading.Thread(target=index.add, args=(slowly(),))
    thread.start()
    assert entered.wait(30)
    with pytest.raises(IndexLockedError):
        other.add(["c"])
    # reading goes on meanwhile
    assert len(other) == len(index) == 1
    leave.set()
    thread.join()
    other.add(["c"])
    assert [entry.text for entry in index.entries()] == ["a", "b", "c"]


def test_threads_read_whole_transactions_while_one_writes(path):
    index, done, seen = build(path, [f"0 of {i}" for i in range(5)], map(str, range(5))), threading.Event(), []
    wrong = []

    def read():
        while not done.is_set():
            view = index.snapshot()
            texts = view.texts(range(len(view)))
            (chunk,) = view.chunks(10)
            rows, _ = rows_of(texts)
            if len({text.split()[0] for text in texts}) > 1 or not chunk.fields["scale"].equal(rows["scale"]):
                wrong.append(texts)
            seen.append(texts[0])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for version in range(1, 40):
        index.update([f"{version} of {i}" for i in range(5)], list(map(str, range(5))))
        if version % 10 == 0:
            index.compact()
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert len(set(seen)) > 1
    assert index.verify().ok


def test_nothing_is_pickled(path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    index = build(path, ["a", "b|c"], ["x", "y"])
    index.update(["d"], ["x"], metadata=[{"n": 1}])
    index.compact()
    if path is not None:
        index = reopen(path)
    assert index.verify().ok
    check(index.snapshot(), [Entry("y", "b|c", None), Entry("x", "d", {"n": 1})])


def test_every_handle_sees_the_newest_commit(tmp_path):
    first = build(tmp_path / "index", ["a"], ["x"])
    second, reader = reopen(tmp_path / "index"), reopen(tmp_path / "index", read_only=True)
    for number in range(5):
        (first, second)[number % 2].add([f"t{number}"], [f"n{number}"])
        if number == 2:
            first.remove("x")
            second.compact()
        assert list(reader) == list(first) == list(second)
    assert reader.snapshot() is reader.snapshot()
    with pytest.raises(IndexStateError, match="read-only"):
        reader.add(["b"])


def test_an_index_is_a_context_manager_and_reports_its_properties(tmp_path):
    with build(tmp_path / "index", ["a|b", "c"], settings={"layout": "compact", "shape": (1, 2)}) as index:
        info = index.info()
        assert (info["documents"], info["rows"], info["complete"]) == (2, 3, True)
        assert info["fields"] == SCHEMA.to_json()
        assert index.settings == {"layout": "compact", "shape": [1, 2]}
        assert index.fingerprint == FINGERPRINT
        assert index.schema == SCHEMA
    with pytest.raises(IndexStateError, match="closed"):
        index.snapshot()


def test_the_estimate_matches_the_size_after_building(tmp_path):
    texts = [f"text {i:030d}" for i in range(20000)]
    index = build(tmp_path / "index", texts)
    expected, info = CandidateIndex.estimate(SCHEMA, 20000, text_bytes=35), index.info()
    assert info["array_bytes"] == expected.arrays
    assert 0.8 < info["catalogue_bytes"] / expected.catalogue < 1.25


def test_progress_is_shown_on_request(capsys):
    index = create(project=project)
    index.build(["a", "b"], show_progress_bar=True)
    assert "2/2" in capsys.readouterr().err
    index.add(["c"], show_progress_bar=False)
    assert capsys.readouterr().err == ""
