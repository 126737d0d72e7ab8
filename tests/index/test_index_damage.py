"""Damage in an index's files is found and named, and no write makes it permanent; an older format is read.

MIXENCODER_TEST_DAMAGES lengthens the run of random damages.
"""

import contextlib
import copy
import errno
import json
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixencoder.errors import IndexDamagedError, IndexStateError, IndexStorageError, MixEncoderError
from mixencoder.index import CandidateIndex, Entry, Repair, shards
from tests.index.index_stub import as_format_1, build, check, create, reopen

TEXTS = [f"text {n}" + "|more" * (n % 3) for n in range(40)]
ENTRIES = [Entry(f"i{n}", text, {"n": n} if n % 2 else None) for n, text in enumerate(TEXTS)]
HELD = [entry for n, entry in enumerate(ENTRIES) if n not in (3, 4, 39)]
DAMAGES = int(os.environ.get("MIXENCODER_TEST_DAMAGES", "200"))


@pytest.fixture
def path(tmp_path):
    """An index of forty documents, of which three were removed, closed."""
    make(tmp_path / "index")
    return tmp_path / "index"


def make(path: Path) -> None:
    with create(path) as index:
        index.build(TEXTS, [entry.id for entry in ENTRIES], metadata=[entry.metadata for entry in ENTRIES])
        index.remove(["i3", "i4", "i39"])


def catalogue_of(path: Path) -> Path:
    return next(path.glob("generation-*")) / "catalogue.sqlite"


def execute(path: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(catalogue_of(path))) as connection:
        connection.execute(statement, values)
        connection.commit()


def flip_live(path: Path, row: int) -> None:
    with contextlib.closing(sqlite3.connect(catalogue_of(path))) as connection:
        live = bytearray(connection.execute("SELECT live FROM blocks").fetchone()[0])
    live[row // 8] ^= 1 << row % 8
    execute(path, "UPDATE blocks SET live = ?", bytes(live))


@pytest.mark.parametrize("row", [0, 3], ids=["the only row of a document", "the first of three rows"])
def test_a_flipped_live_bit_is_found_and_no_write_makes_it_permanent(path, row):
    handle = reopen(path)
    flip_live(path, row)
    for use in (handle.snapshot, lambda: reopen(path), lambda: list(handle), handle.compact, handle.repair):
        with pytest.raises(IndexDamagedError, match=r"catalogue\.sqlite is damaged: the record of block 0"):
            use()
    for change in (lambda: handle.add(["x"]), lambda: handle.remove("i1"), lambda: handle.update(["x"], ["i1"])):
        with pytest.raises(IndexDamagedError):
            change()
    report = reopen(path, check_sizes=False).verify()
    assert not report.ok
    assert "the record of block 0" in str(report)
    flip_live(path, row)
    check(handle.snapshot(), HELD)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE blocks SET starts = NULL",
        "UPDATE blocks SET rows = rows - 1",
        "UPDATE blocks SET checksums = zeroblob(12)",
        "UPDATE blocks SET checksum = checksum + 1",
        "UPDATE blocks SET checksum = NULL",
        "DELETE FROM blocks",
        "UPDATE blocks SET block = 1",
        "UPDATE blocks SET live = 'text'",
        "UPDATE blocks SET rows = 'many'",
        "UPDATE manifest SET value = '[1, 7]' WHERE name = 'state'",
        "DELETE FROM manifest WHERE name = 'state'",
    ],
)
def test_everything_in_the_catalogue_that_ranking_reads_has_a_checksum(path, statement):
    execute(path, statement)
    with pytest.raises(IndexDamagedError, match="is damaged"):
        reopen(path)
    assert not reopen(path, check_sizes=False).verify().ok


def test_a_changed_text_is_not_returned_and_gets_no_new_checksum(path):
    execute(path, "UPDATE entries SET text = 'forged', metadata = '{}' WHERE id = 'i7'")
    index = reopen(path)
    view = index.snapshot()
    position = view.positions(["i7"])
    for use in (
        lambda: view.texts(position),
        lambda: index.get("i7"),
        lambda: list(index.entries()),
        lambda: index.update(["x"], ["i7"]),
    ):
        with pytest.raises(IndexDamagedError, match="entry of document 'i7'"):
            use()
    assert view.texts(view.positions(["i8"])) == [TEXTS[8]]
    assert index.repair() == Repair([], ["i7"])
    check(index.snapshot(), [entry for entry in HELD if entry.id != "i7"])


def test_an_index_of_format_1_is_read_and_the_first_write_gives_it_checksums(path):
    as_format_1(path)
    index = reopen(path)
    check(index.snapshot(), HELD)
    assert index.info()["format"] == 1
    report = index.verify()
    assert report.ok
    assert report.unsummed
    assert "older version" in str(report)
    other = reopen(path)
    index.add(["new|one"], ["new"])
    held = [*HELD, Entry("new", "new|one", None)]
    for handle in (index, other, reopen(path)):
        check(handle.snapshot(), held)
        assert handle.info()["format"] == 2
        report = handle.verify()
        assert report.ok
        assert not report.unsummed
    flip_live(path, 0)
    with pytest.raises(IndexDamagedError):
        reopen(path)


@pytest.mark.parametrize("change", ["compact", "repair", "remove", "update"])
def test_every_kind_of_write_upgrades_an_index_of_format_1(path, change):
    as_format_1(path)
    with reopen(path) as index:
        {
            "compact": index.compact,
            "repair": index.repair,
            "remove": lambda: index.remove("i1"),
            "update": lambda: index.update([TEXTS[1]], ["i1"]),
        }[change]()
        report = index.verify()
        assert (report.ok, report.unsummed, index.info()["format"]) == (True, False, 2)


def test_a_writer_killed_between_pointer_and_checksums_leaves_an_index_that_works(path):
    as_format_1(path)
    pointer = path / "index.json"
    pointer.write_text(pointer.read_text().replace('"format": 1', '"format": 2'))
    with reopen(path) as index:
        check(index.snapshot(), HELD)
        index.remove("i1")
        assert not index.verify().unsummed


def test_opening_with_verify_reads_everything(path):
    with reopen(path, verify=True) as index:
        check(index.snapshot(), HELD)
    file = next(path.glob("generation-*/shard-00000.scale.bin"))
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    file.write_bytes(content)
    reopen(path).snapshot()
    with pytest.raises(IndexDamagedError, match=r"shard-00000\.scale\.bin: rows 0 to .* are not what was written"):
        reopen(path, verify=True)


def damage(rng: random.Random, path: Path) -> str:
    """Damage the catalogue or the pointer at random."""
    file = catalogue_of(path) if rng.random() < 0.9 else path / "index.json"
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "flips", "byte", "cut", "zeros", "garbage", "value", "value"])
    if kind == "value" and file.suffix == ".sqlite":
        table, column = rng.choice(
            [("manifest", "name"), ("manifest", "value")]
            + [("blocks", name) for name in ("block", "rows", "checksums", "starts", "live", "checksum")]
            + [("entries", name) for name in ("row", "id", "digest", "checksum", "metadata", "text")]
        )
        value = rng.choice([None, -1, 0, 7, 2**62, 1.5, "", "text", "[]", "1", b"", b"\xff\0", bytes(128), "{" * 5000])
        with contextlib.suppress(sqlite3.Error):
            execute(
                path, f"UPDATE {table} SET {column} = ? WHERE rowid >= ? AND rowid < 20", value, rng.choice([0, 0, 5])
            )
        return f"{table}.{column} = {value!r:.20}"
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind in ("zeros", "garbage"):
        start = rng.randrange(len(content) // 4096 + 1) * 4096
        width = rng.choice([16, 512, 4096])
        content[start : start + width] = rng.randbytes(width) if kind == "garbage" else bytes(width)
    else:
        # most bytes of a small database are zero: damage the others
        filled = [offset for offset, value in enumerate(content) if value]
        for _ in range(20 if kind == "flips" else 1):
            offset = rng.choice(filled)
            content[offset] = rng.randrange(256) if kind == "byte" else content[offset] ^ 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{kind} of {file.name}"


def test_random_damage_of_catalogue_and_pointer_raises_an_error_of_the_library_or_is_harmless(tmp_path):
    make(tmp_path / "whole")
    whole, noticed = tmp_path / "whole", 0
    for seed in range(DAMAGES):
        rng = random.Random(seed)
        path = tmp_path / "damaged"
        shutil.copytree(whole, path)
        if rng.random() < 0.3:
            as_format_1(path)
        what = f"seed {seed}: {damage(rng, path)}"
        sound = False

        def read(index: CandidateIndex) -> None:
            view = index.snapshot()
            for chunk in view.chunks(16):
                view.ids(chunk.positions)
            view.gather(range(len(view)))
            view.texts(range(len(view)))
            list(index.entries())
            ids = list(index)
            view.positions(ids)
            index.get(ids[0], with_fields=True)
            index.info()

        steps = [
            lambda: read(reopen(path)),  # noqa: B023
            lambda: reopen(path, check_sizes=False).verify(),  # noqa: B023
            lambda: reopen(path).remove("i10"),  # noqa: B023
            lambda: reopen(path).update(["x|y"], ["i11"]),  # noqa: B023
            lambda: reopen(path).add(["x|z"], ["new"]),  # noqa: B023
            lambda: reopen(path, check_sizes=False).repair(),  # noqa: B023
            lambda: reopen(path).compact(),  # noqa: B023
        ]
        refused = []
        for step in steps:
            try:
                result = step()
            except MixEncoderError as error:
                refused.append(error)
            except BaseException as error:
                error.add_note(what)
                raise
            else:
                sound = sound or bool(getattr(result, "ok", False) and not result.unsummed)
                if step is steps[1] and sound:
                    # then all content must be right
                    check(reopen(path).snapshot(), HELD)
        noticed += bool(refused)
        shutil.rmtree(path)
    assert noticed > DAMAGES / 3, "too little of the damage had an effect"


@pytest.mark.parametrize("change", ["create", "build", "add", "update", "remove", "compact", "repair"])
def test_a_folder_that_cannot_be_flushed_raises_an_error_of_the_library(tmp_path, monkeypatch, change):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    texts, fsync = [f"t{n}" for n in range(1020)], os.fsync

    def failing(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    path = tmp_path / "index"
    if change == "build":
        index = create(path)
    elif change != "create":
        index = build(path, texts, texts)
        index.remove("t0")
        if change == "remove":
            # the first write to an older format replaces the pointer
            as_format_1(path)
    if change == "repair":
        os.truncate(next(path.glob("generation-*/shard-00000.scale.bin")), 100)
        index = reopen(path, check_sizes=False)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(IndexStorageError, match=r"cannot be written: Input/output error"):
        {
            "create": lambda: create(path),
            "build": lambda: index.build(texts),
            "add": lambda: index.add([f"n{n}" for n in range(20)]),
            "update": lambda: index.update([f"n{n}" for n in range(20)], texts[1:21]),
            "remove": lambda: index.remove("t1"),
            "compact": lambda: index.compact(),
            "repair": lambda: index.repair(),
        }[change]()
    monkeypatch.undo()
    if change not in ("create", "build", "repair"):
        assert [entry.text for entry in index.entries()] == texts[1:]
        assert index.verify().ok


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_copying_and_pickling_say_how_to_open_an_index_again(tmp_path, place):
    index = build(tmp_path / "index" if place == "disk" else None, ["a"])
    for item in (index, index.snapshot()):
        for use in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(IndexStateError, match=r"open it again by its path|build it again|open the index again"):
                use(item)


FORKED = """
import os, sys, threading
import torch
torch.set_num_threads(1)
from tests.index.index_stub import build
from mixencoder.errors import IndexStateError

def use_in_a_child(path):
    index = build(path, ["a", "b"], ["x", "y"])
    view = index.snapshot()
    # as if another thread were at work when the process is forked
    index._newest._mutex.acquire()
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (index.snapshot, lambda: list(index), lambda: index.add(["c"]), index.verify, index.info,
                    index.compact, lambda: view.texts([0]), lambda: "x" in view):
            try:
                use()
            except IndexStateError as error:
                refused += f"opened in another process (pid {os.getppid()})" in str(error)
        index.close()
        os._exit(refused)
    index._newest._mutex.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8, path
    index.add(["c"], ["z"])
    assert list(index) == ["x", "y", "z"], path

for path in (None, sys.argv[1]):
    use_in_a_child(path)
"""


def test_a_forked_child_is_refused_at_once(tmp_path):
    run_script(FORKED, str(tmp_path / "index"))


MODULES = """
import json, sys
from mixencoder.cli import app

MODEL_CODE = ("transformers", "tokenizers", "huggingface_hub", "mixencoder.modeling", "mixencoder.fast")
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mixencoder", *arguments]
    try:
        app(prog_name="mixencoder")
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    found = [name for name in sys.modules if name.startswith((*MODEL_CODE, "mixencoder.ranking."))]
    assert not found, (arguments, found)
"""


def test_commands_that_encode_nothing_load_no_model_code(path):
    of_an_index = (["info"], ["verify"], ["remove", "i1"], ["compact"])
    commands = [["index", name, str(path), *ids] for name, *ids in of_an_index]
    assert "transformers" in run_script(MODULES, json.dumps([*commands, ["info"]]))


def run_script(script: str, *arguments: str) -> str:
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parents[1])}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_rows_that_contradict_each_other_are_damage_in_format_1_too(path):
    as_format_1(path)
    # only the first of a document's three rows, so that its other rows would belong to the document before
    flip_live(path, int(np.cumsum([text.count("|") + 1 for text in TEXTS])[4]))
    with pytest.raises(IndexDamagedError, match="contradict each other"):
        reopen(path)
