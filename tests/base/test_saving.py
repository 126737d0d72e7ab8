"""Saving: concurrent saves, folders that cannot be written, and what is on the disk when saving returns."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.base.checkpoints.checkpoint import write_calibration
from mixencoder.durable import exclusive, replace_file
from mixencoder.errors import CheckpointError

WRITER = """
import sys
from pathlib import Path
from mixencoder.durable import write_folder
name, place = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    write_folder(Path(place), lambda folder: [Path(folder, file).write_text(name) for file in "abc"])
"""


@pytest.fixture
def engines(backbone_path) -> list[MixEncoder]:
    """Return two models that differ in configuration and weights."""
    found = []
    for k in (1, 2):
        torch.manual_seed(k)
        found.append(MixEncoder.from_backbone(backbone_path, num_context_embeddings=k))
    return found


def state(engine: MixEncoder) -> tuple:
    weights = tuple(tensor.numpy().tobytes() for tensor in engine.model.state_dict().values())
    return engine.config.num_context_embeddings, weights


@pytest.mark.parametrize("is_there", [False, True])
def test_threads_that_save_into_one_folder_wait_for_each_other(engines, tmp_path, is_there):
    place = tmp_path / "place"
    if is_there:
        engines[0].save_pretrained(place)
    failures = []

    def work(engine: MixEncoder) -> None:
        try:
            for _ in range(10):
                engine.save_pretrained(place)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state(MixEncoder.from_pretrained(place)) in [state(engine) for engine in engines]
    assert not [path.name for path in [*tmp_path.iterdir(), *place.iterdir()] if path.name.startswith(".")]


def test_loading_during_saves_gives_one_whole_checkpoint(engines, tmp_path):
    place = tmp_path / "place"
    for number, engine in enumerate(engines):
        # each has its own tokenizer, which is read last
        engine.tokenizer = copy.deepcopy(engine.tokenizer)
        engine.tokenizer.model_max_length = 10 + number
    engines[0].save_pretrained(place)
    is_over, failures = threading.Event(), []

    def work() -> None:
        try:
            while not is_over.is_set():
                for engine in engines:
                    engine.save_pretrained(place)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        loaded = [MixEncoder.from_pretrained(place) for _ in range(15)]
    finally:
        is_over.set()
        thread.join()
    assert not failures
    whole = [(*state(engine), engine.tokenizer.model_max_length) for engine in engines]
    assert all((*state(engine), engine.tokenizer.model_max_length) in whole for engine in loaded)


def test_processes_that_write_one_folder_wait_for_each_other(tmp_path):
    place = tmp_path / "place"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    commands = [[sys.executable, "-c", WRITER, name, str(place)] for name in ("one", "two", "three")]
    writers = [subprocess.Popen(command, text=True, **pipes) for command in commands]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    errors = [writer.communicate(timeout=300)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3, errors
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "c"]
    assert len({path.read_text() for path in place.iterdir()}) == 1


def test_one_thread_at_a_time_locks_a_folder_that_exists_or_not(tmp_path):
    place = tmp_path / "place"
    order, held = [], threading.Event()

    def second() -> None:
        with exclusive(place):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive(place):
        thread.start()
        # long enough for the other thread to enter, if there were no lock
        held.wait(0.2)
        place.mkdir()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_folders_that_cannot_be_written_give_one_line(engines, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (
        tmp_path / "file",
        tmp_path / "file" / "below" / "it",
        Path("/proc/nothing/below"),
        "~nobody-here/x",
        "a\0b",
    ):
        with pytest.raises(CheckpointError, match=r"cannot be written: \w") as caught:
            engines[0].save_pretrained(place)
        assert str(caught.value).startswith(str(place))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_gives_one_line(engines, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        engines[0].save_pretrained(tmp_path / "place")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record, in order, the files that are synchronised and the renames."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        seen.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_a_calibration_is_on_the_disk_before_it_takes_its_place_and_its_name_after(checkpoint, tmp_path, monkeypatch):
    place = Path(shutil.copytree(checkpoint, tmp_path / "place"))
    seen = watched(monkeypatch)
    write_calibration(place, {"temperature": 2.0, "bias": 0.5})
    assert seen == [("fsync", "config.json"), ("replace", "config.json"), ("fsync", "place")]
    assert json.loads((place / "config.json").read_text())["calibration"] == {"temperature": 2.0, "bias": 0.5}
    assert MixEncoder.from_pretrained(place).config.calibration == {"temperature": 2.0, "bias": 0.5}


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_calibration_needs_a_checkpoint(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match=r"is not a directory|no config\.json"):
            write_calibration(place, {"temperature": 1.0, "bias": 0.0})
