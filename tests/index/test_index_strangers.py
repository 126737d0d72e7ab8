"""Untrusted indexes, and folders that hold other files too: nothing outside the index is read or written."""

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from mixencoder.errors import (
    IndexDamagedError,
    IndexMismatchError,
    IndexStateError,
    IndexStorageError,
    InputError,
    MixEncoderError,
)
from mixencoder.index import CandidateIndex, Entry, connection
from tests.index.index_stub import FINGERPRINT, build, check, create, reopen

ENTRIES = [Entry(f"i{n}", f"text {n}" + "|more" * (n % 2), None) for n in range(20)]


@pytest.fixture
def path(tmp_path):
    """An index of twenty documents, closed."""
    build(tmp_path / "index", [entry.text for entry in ENTRIES], [entry.id for entry in ENTRIES]).close()
    return tmp_path / "index"


@pytest.fixture
def victim(tmp_path):
    """A file outside the index that must not change."""
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    return file


def writes(path: Path) -> list[str]:
    """Try every call that writes, and return the names of the errors raised."""
    raised = []
    for change in (
        lambda: reopen(path).add(["new|one"], ["new"]),
        lambda: reopen(path).update(["changed"], ["i1"]),
        lambda: reopen(path).remove("i2"),
        lambda: reopen(path).compact(),
        lambda: reopen(path, check_sizes=False).repair(),
        lambda: create(path).build(["other"]),
    ):
        try:
            change()
        except MixEncoderError as error:
            raised.append(type(error).__name__)
    return raised


def test_files_with_names_like_those_of_the_library_survive_every_call(path):
    kept = [
        "generation-000001.bak",
        "generation-99",
        "generation-000099",
        "generation-0000002",
        "generation-x",
        "notes",
    ]
    for name in kept:
        (path / name).write_text("mine")
        (path / f"{name}.d").mkdir()
        (path / f"{name}.d" / "catalogue.sqlite").write_text("mine")
    (path / "generation-000098").mkdir()
    (path / "generation-000098" / "catalogue.sqlite").write_text("mine")
    index = reopen(path)
    index.add(["a"], ["a"])
    index.remove("a")
    index.compact()
    for _ in range(2):
        with pytest.raises(MixEncoderError):
            index.add(["b"], ["i1"])
    assert all((path / name).read_text() == "mine" for name in kept)
    files = [path / f"{name}.d" / "catalogue.sqlite" for name in kept]
    assert all(file.read_text() == "mine" for file in [*files, path / "generation-000098" / "catalogue.sqlite"])
    assert not (path / "generation-000001").exists()


def test_another_file_within_a_stale_generation_survives(path):
    stale = path / "generation-000002"
    stale.mkdir()
    (stale / "catalogue.sqlite").write_text("left by a killed writer")
    (stale / "thesis.txt").write_text("mine")
    index = reopen(path)
    index.remove("i1")
    assert (stale / "thesis.txt").read_text() == "mine"
    with pytest.raises(IndexStorageError, match="generation-000002 already exists"):
        index.compact()
    (stale / "thesis.txt").unlink()
    index.compact()
    check(index.snapshot(), [entry for entry in ENTRIES if entry.id != "i1"])


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "index.json",
        "index.json.new",
        "generation-000001",
        "generation-000002",
        "generation-000001/shard-00000.context.bin",
        "generation-000001/catalogue.sqlite",
        "generation-000001/catalogue.sqlite-journal",
        "generation-000001/catalogue.sqlite-wal",
    ],
)
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_no_file_outside_is_written_and_no_call_waits_for_a_pipe(path, tmp_path, victim, name, kind):
    replaced, outside = path / name, tmp_path / "outside"
    if replaced.is_dir():
        shutil.copytree(replaced, outside)
        shutil.rmtree(replaced)
    elif replaced.exists():
        shutil.copy(replaced, outside)
        replaced.unlink()
    else:
        shutil.copy(victim, outside)
    target = tmp_path / "nothing" if kind == "dangling link" else outside
    os.mkfifo(replaced) if kind == "pipe" else replaced.symlink_to(target)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and path not in file.parents}
    raised = writes(path)
    assert raised
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and path not in file.parents}
    assert after == before
    if name not in ("index.json.new", "lock", "generation-000002"):
        with pytest.raises((IndexDamagedError, IndexStateError), match=Path(name).name.split("-j")[0].split("-w")[0]):
            reopen(path).snapshot()


def test_a_journal_cannot_make_sqlite_delete_another_file(path, victim):
    name = str(victim).encode()
    journal = next(path.glob("generation-*")) / "catalogue.sqlite-journal"
    end = name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big") + connection._JOURNAL_MAGIC
    journal.write_bytes(bytes(512) + end)
    with pytest.raises(IndexDamagedError, match=r"catalogue\.sqlite-journal"):
        reopen(path)
    assert victim.exists()


@pytest.mark.parametrize(
    "statements",
    [
        [
            "ALTER TABLE blocks RENAME TO b",
            "CREATE VIEW blocks AS WITH RECURSIVE r(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM r) "
            "SELECT n AS block, 1024 AS rows, x'00' AS checksums, NULL AS starts, NULL AS live, 0 AS checksum FROM r",
        ],
        ["CREATE TRIGGER t AFTER INSERT ON entries BEGIN UPDATE entries SET text = 'forged'; END"],
        ["CREATE VIRTUAL TABLE extra USING fts5(x)"],
        ["DROP TABLE entries"],
        ["ALTER TABLE entries ADD COLUMN more AS (zeroblob(1000000000))"],
        ["CREATE INDEX more ON entries (lower(text))"],
    ],
    ids=["endless view", "trigger", "virtual table", "missing table", "generated column", "expression"],
)
def test_a_schema_that_the_library_did_not_make_raises(path, statements):
    with contextlib.closing(sqlite3.connect(path / "generation-000001" / "catalogue.sqlite")) as opened:
        for statement in statements:
            opened.execute(statement)
        opened.commit()
    with pytest.raises(IndexDamagedError, match=r"catalogue.sqlite (holds|lacks)"):
        reopen(path)
    assert set(writes(path)) <= {"IndexDamagedError"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", "[" * 100_000),
        ("settings", json.dumps({"x": "y" * 2**20})),
        ("shard_rows", "0"),
        ("shard_rows", "1e400"),
        ("shard_rows", str(2**70)),
        ("complete", "1"),
        ("fingerprint", '{"name": 1}'),
        ("schema", "[]"),
        ("schema", '[{"name": "../x", "shape": [1], "dtype": "int8"}]'),
        ("schema", '[{"name": "x", "shape": [1000000, 1000000, 1000000], "dtype": "int8"}]'),
        ("schema", '[{"name": "x", "shape": [1.5], "dtype": "int8"}]'),
        ("schema", "9" * 5000),
        ("store_text", None),
    ],
)
def test_an_invalid_manifest_is_damage(path, name, value):
    with contextlib.closing(sqlite3.connect(path / "generation-000001" / "catalogue.sqlite")) as opened:
        if value is None:
            opened.execute("DELETE FROM manifest WHERE name = ?", (name,))
        else:
            opened.execute("UPDATE manifest SET value = ? WHERE name = ?", (value, name))
        opened.commit()
    with pytest.raises(IndexDamagedError, match="no valid manifest"):
        reopen(path)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 60_000,
        " " * 70_000 + "{}",
        '{"kind": "mixencoder-candidate-index", "format": true, "generation": 1}',
        '{"kind": "mixencoder-candidate-index", "format": 1, "generation": -1}',
        '{"kind": "mixencoder-candidate-index", "format": 1, "generation": 1e300}',
        f'{{"kind": "mixencoder-candidate-index", "format": 1, "generation": {"9" * 5000}}}',
        "[]",
    ],
)
def test_an_invalid_pointer_is_damage(path, content):
    (path / "index.json").write_text(content)
    with pytest.raises(IndexDamagedError, match="cannot be read"):
        reopen(path)


def test_an_open_index_raises_if_one_of_another_model_replaces_it(path, tmp_path):
    handle, without_fingerprint = reopen(path), CandidateIndex.open(path, None)
    view, held = handle.snapshot(), list(handle)
    path.rename(tmp_path / "away")
    create(path, fingerprint={"name": "other", "model": "m2", "tokenizer": "t1"}).build(["theirs"], ["t"])
    for index in (handle, without_fingerprint):
        for use in (lambda: list(index), index.snapshot, index.info, lambda: index.remove("t"), index.verify):  # noqa: B023
            with pytest.raises(IndexMismatchError, match="replaced by another index, which was made by other"):
                use()
    with pytest.raises(IndexMismatchError, match="model is m2, expected m1"):
        handle.add(["mine"])
    check(view, ENTRIES)
    assert list(CandidateIndex.open(path, None)) == ["t"]
    # the original index, moved back, is accepted again
    shutil.rmtree(path)
    (tmp_path / "away").rename(path)
    assert list(handle) == held
    handle.add(["mine"], ["m"])


def test_an_open_index_raises_if_one_with_other_settings_replaces_it(path, tmp_path):
    handle = reopen(path)
    path.rename(tmp_path / "away")
    create(path, settings={"layout": "other"}).build(["theirs"], ["t"])
    with pytest.raises(IndexMismatchError, match="replaced by another index with settings"):
        handle.add(["mine"])


def test_another_catalogue_under_the_same_pointer_is_noticed(path, tmp_path):
    handle = reopen(path)
    handle.snapshot()
    create(tmp_path / "other", fingerprint={**FINGERPRINT, "model": "m2"}).build(["theirs"], ["t"])
    shutil.copy(tmp_path / "other/generation-000001/catalogue.sqlite", tmp_path / "copy")
    (tmp_path / "copy").replace(path / "generation-000001/catalogue.sqlite")
    with pytest.raises(IndexMismatchError, match="model is m2"):
        handle.add(["mine"])


def test_a_write_whose_folder_is_moved_away_does_not_reach_the_index_that_replaces_it(path, tmp_path):
    def moving():
        yield "first"
        path.rename(tmp_path / "away")
        build(path, ["theirs"] * 3, ["a", "b", "c"]).close()

    with pytest.raises(MixEncoderError):
        reopen(path).add(moving())
    with reopen(path) as index:
        assert list(index) == ["a", "b", "c"]
        assert index.verify().ok
    with reopen(tmp_path / "away") as index:
        assert index.verify().ok
        check(index.snapshot(), ENTRIES)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("file/below", IndexStateError),
        ("/proc/nothing/index", (IndexStateError, IndexStorageError)),
        ("x" * 300, IndexStorageError),
        ("", InputError),
        ("a\0b", InputError),
        ("~nobody-of-this-name/x", InputError),
        (b"bytes", InputError),
        (7, InputError),
        ("\ud800", InputError),
    ],
)
def test_an_unusable_path_raises_with_a_message_of_one_line(tmp_path, monkeypatch, where, error):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    for use in (reopen, create):
        with pytest.raises(error) as caught:
            use(where)
        assert "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build("~/index", ["a"]).close()
    assert len(reopen("~/index")) == 1
    assert (tmp_path / "index").is_dir()
