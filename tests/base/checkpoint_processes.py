"""Processes that are killed while they write a checkpoint, for test_checkpoint_faults.

Run as a script, so that children are forked from a process in which torch has no threads:
``python tests/base/checkpoint_processes.py SCENARIO FOLDER BACKBONE``. Exits with 0 if no wrong answer was seen.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import normalizers

from mixencoder import MixEncoder
from mixencoder.architectures import load_engine
from mixencoder.errors import CheckpointError
from mixencoder.training.folders import last_checkpoint
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.index.index_processes import fork
from tests.training.synthetic import partner_pairs

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WORDS = [f"word{number}" for number in range(30)]
TRAIN_KILLS = 10


def watch_changes(place: Path, notice: Callable[[], None]) -> None:
    """From now on, call notice before every change that this process makes to files and folders under place."""

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            names = [name for name in arguments if isinstance(name, str | bytes | os.PathLike)]
            if any(os.fsdecode(name).startswith(str(place)) for name in names):
                notice()

    sys.addaudithook(hook)


def count_changes(place: Path, work: Callable[[], object]) -> int:
    """Run work in a child process; return the number of changes that it makes under place."""
    read, write = os.pipe()

    def child() -> None:
        watch_changes(place, lambda: os.write(write, b"."))
        work()

    pid = fork(child)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = len(pipe.read())
    assert os.waitpid(pid, 0)[1] == 0
    return found


def kill_before(change: int, place: Path, work: Callable[[], object]) -> bool:
    """Run work in a child process that is killed before its change of this number; return whether it was killed."""

    def child() -> None:
        left = change

        def notice() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        watch_changes(place, notice)
        work()

    _, status = os.waitpid(fork(child), 0)
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
    return status != 0


def state_of(folder: Path) -> tuple:
    """Load a checkpoint; return its configuration, all weights, and the tokens of a text."""
    engine = load_engine(folder)
    config = {name: value for name, value in engine.config.to_dict().items() if name != "_name_or_path"}
    weights = [(name, tensor.numpy().tobytes()) for name, tensor in engine.model.state_dict().items()]
    return config, weights, engine.tokenizer("the cat")["input_ids"]


def engines(backbone: Path) -> list[MixEncoder]:
    """Return two models that differ in configuration, weights and tokenizer."""
    found = []
    for k in (1, 3):
        torch.manual_seed(k)
        found.append(MixEncoder.from_backbone(backbone, num_context_embeddings=k))
    old, new = found
    new.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("the cat", "the")
    with torch.no_grad():
        new.model.backbone.embeddings.word_embeddings.weight.mul_(2.0)
    return [old, new]


def save_over_another(folder: Path, backbone: Path) -> None:
    """Kill a save before each of its changes: the checkpoint is always the old one or the new one, whole."""
    old, new = engines(backbone)
    states = []
    for name, engine in (("old", old), ("new", new)):
        engine.save_pretrained(folder / name)
        states.append(state_of(folder / name))
    assert states[0] != states[1]
    place = folder / "place"

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "old", place)
        (place / "notes.txt").write_text("mine")

    begin()
    seen = set()
    changes = count_changes(place, lambda: new.save_pretrained(place))
    assert state_of(place) == states[1]
    for change in range(changes):
        begin()
        assert kill_before(change, place, lambda: new.save_pretrained(place)), change
        seen.add(states.index(state_of(place)))
        # the next save succeeds, whatever files the killed one left
        old.save_pretrained(place)
        assert state_of(place) == states[0]
        assert (place / "notes.txt").read_text() == "mine"
        assert {path.name for path in place.iterdir()} == {
            "notes.txt",
            *(path.name for path in (folder / "old").iterdir()),
        }
    assert seen == {0, 1}


def save_where_nothing_was(folder: Path, backbone: Path) -> None:
    """Kill a save into a new or an empty folder: the checkpoint is there whole or not at all."""
    (engine, _) = engines(backbone)
    for is_empty in (False, True):
        place = folder / f"place{is_empty}"
        seen = set()
        for change in range(1000):
            shutil.rmtree(place, ignore_errors=True)
            if is_empty:
                place.mkdir()
            # a new folder is first written under another name in the same parent, so watch that
            if not kill_before(change, folder, lambda place=place: engine.save_pretrained(place)):
                break
            try:
                state = state_of(place)
            except CheckpointError:
                state = None
            seen.add(state is not None)
            assert state in (None, state_of_once(engine, folder))
        assert change > 3
        assert False in seen


def state_of_once(engine: MixEncoder, folder: Path) -> tuple:
    """Return the `state_of` an engine, saved into a separate folder once."""
    place = folder / "whole"
    if not place.exists():
        engine.save_pretrained(place)
    return state_of(place)


def train_until_killed(folder: Path, backbone: Path) -> None:
    """Kill a training run before some of its changes: resumed, it ends with the weights of an uninterrupted run."""
    rows = partner_pairs(WORDS, 40)

    def run(output: Path, *, resume: bool = False) -> None:
        config = TrainConfig(
            output=str(output),
            data=[DataSpec(rows, name="rows")],
            backbone=str(backbone),
            architecture="dual-encoder",
            steps=5,
            save_every=2,
            batch_size=4,
            gradient_accumulation_steps=2,
            resume=resume,
        )
        train(config)

    place = folder / "place"
    place.mkdir()
    changes = count_changes(place, lambda: run(place / "out"))
    whole = state_of(place / "out")
    resumed = 0
    for number in range(TRAIN_KILLS):
        change = changes * number // TRAIN_KILLS
        shutil.rmtree(place)
        place.mkdir()
        assert kill_before(change, place, lambda: run(place / "out")), change
        resumed += last_checkpoint(place / "out.unfinished") is not None
        pid = fork(run, place / "out") if not (place / "out.unfinished").exists() else None
        pid = pid or fork(lambda: run(place / "out", resume=True))
        assert os.waitpid(pid, 0)[1] == 0, change
        assert state_of(place / "out") == whole, change
        assert (place / "out" / "training.json").is_file()
        assert [path.name for path in place.iterdir() if not path.name.startswith(".")] == ["out"]
    assert resumed > TRAIN_KILLS // 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, place, encoder = sys.argv[1:]
    globals()[scenario](Path(place), Path(encoder))
