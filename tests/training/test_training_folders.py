"""The folder of a run's checkpoints: what a run may touch, what it refuses, and what it goes on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app
from mixencoder.errors import CheckpointError, DataError, InputError
from mixencoder.training.folders import MARKER, last_checkpoint, unfinished_folder
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import partner_pairs, write


@pytest.fixture
def config(tmp_path, backbone_path, words):
    rows = write(tmp_path / "pairs.jsonl", partner_pairs(words, 12))
    return {"output": str(tmp_path / "out"), "data": [str(rows)], "backbone": str(backbone_path), "steps": 2} | {
        "batch_size": 4,
        "architecture": "dual-encoder",
        "save_every": 1,
    }


def run(config, **changes):
    return train(TrainConfig(**{**config, **changes}))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return everything in a folder, by name, with what is in it."""
    found = sorted(path for path in folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.fixture
def interrupted(config, tmp_path, monkeypatch):
    """A run that stopped after its first checkpoint."""
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("mixencoder.training.run.save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert last_checkpoint(tmp_path / "out.unfinished") is not None
    return tmp_path / "out.unfinished"


@pytest.mark.parametrize("changes", [{}, {"data": ["missing.jsonl"]}, {"backbone": "missing"}, {"resume": True}])
def test_a_folder_of_somebody_else_is_refused_and_stays(config, tmp_path, changes):
    folder = tmp_path / "out.unfinished"
    for name in ("thesis.txt", "config.json", "checkpoint-7/complete", "checkpoint-7/weights"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"out\.unfinished holds files that no run of this version left there"):
        run(config, **changes)
    assert contents(tmp_path) == before


def test_files_of_others_in_a_folder_of_a_run_stay_when_it_ends(config, tmp_path, interrupted):
    theirs = ["notes.txt", "checkpoint-best/complete", "checkpoint-1.bak/weights", "checkpoint-007/complete"]
    for name in theirs:
        (interrupted / name).parent.mkdir(exist_ok=True)
        (interrupted / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "complete").write_text("mine")
    (interrupted / "checkpoint-99").symlink_to(elsewhere)
    run(config, resume=True)
    assert (tmp_path / "out" / "training.json").is_file()
    assert all((interrupted / name).read_text() == "mine" for name in theirs)
    assert (interrupted / "checkpoint-99" / "complete").read_text() == "mine"
    assert not (interrupted / MARKER).exists()
    assert not list(interrupted.glob("checkpoint-[12]"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": ["missing.jsonl"]}, DataError),
        ({"backbone": "missing"}, CheckpointError),
        ({"teacher": "missing"}, CheckpointError),
        ({"negatives": 0, "in_batch": False}, InputError),
        ({"max_query_tokens": 4000}, None),
    ],
)
def test_a_run_that_is_refused_changes_nothing_of_an_earlier_one(config, tmp_path, changes, error, interrupted):
    # before its first checkpoint was whole: what there is would be begun anew
    (interrupted / "checkpoint-2" / "complete").unlink()
    before = contents(tmp_path)
    if error is None:
        run(config, **changes)
        assert not interrupted.exists()
        return
    with pytest.raises(error):
        run(config, **changes)
    assert contents(tmp_path) == before


def test_what_is_in_the_way_of_the_folder_is_named_and_stays(config, tmp_path):
    folder, other = tmp_path / "out.unfinished", tmp_path / "other"
    folder.write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        run(config)
    assert folder.read_text() == "mine"
    folder.unlink()
    other.mkdir()
    folder.symlink_to(other)
    with pytest.raises(InputError, match="is in the way"):
        run(config)
    assert list(other.iterdir()) == []
    folder.unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a broken link"):
        run(config)
    assert not folder.exists()


@pytest.mark.parametrize("output", ["pairs.jsonl/x", "pairs.jsonl/x/y", "new/" + "n" * 300, "/proc/x/y"])
def test_an_output_that_cannot_be_written_is_one_line_and_leaves_nothing(config, tmp_path, output, monkeypatch):
    monkeypatch.setattr("mixencoder.training.run._prepare", lambda *_: pytest.fail("work was begun"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        run(config, output=tmp_path / output)
    assert contents(tmp_path) == before
    arguments = ["train", "--data", config["data"][0], "--output", str(tmp_path / output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_without_permission_is_refused_before_any_work(config, tmp_path):
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written"):
        run(config, output=place / "out")


def test_folders_made_for_a_refused_run_go_again(config, tmp_path):
    with pytest.raises(DataError):
        run(config, output=tmp_path / "a" / "b" / "out", data=["missing.jsonl"])
    assert not (tmp_path / "a").exists()


def test_the_folder_lies_beside_its_output_however_that_is_spelt(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert unfinished_folder("out/") == Path("out.unfinished")
    assert unfinished_folder(".") == tmp_path / "here.unfinished"
    assert unfinished_folder("x/..") == tmp_path / "here.unfinished"
    with pytest.raises(InputError, match="output is /"):
        unfinished_folder("/")


def test_a_run_goes_on_with_what_it_read_and_with_nothing_else(config, tmp_path, words, interrupted, backbone_path):
    data, before = Path(config["data"][0]), contents(interrupted)
    kept = data.read_text()
    data.write_text(kept.replace("cat", "dog") + "\n")
    with pytest.raises(InputError, match=r"begun with other contents of data pairs; resume with what it read"):
        run(config, resume=True)
    assert contents(interrupted) == before
    # the order of keys and further columns are not what is learned
    rows = [json.loads(line) for line in kept.splitlines()]
    write(data, [{"note": 1, "positive": row["positive"], "query": row["query"]} for row in rows])
    changed = tmp_path / "changed"
    shutil.copytree(backbone_path, changed)
    moved = MixEncoder.from_backbone(backbone_path).model.backbone
    with torch.no_grad():
        next(moved.parameters()).mul_(2)
    moved.save_pretrained(changed)
    marker = interrupted / MARKER
    marker.write_text(marker.read_text().replace(str(backbone_path), str(changed)))
    with pytest.raises(InputError, match="begun with other contents of backbone"):
        run(config, resume=True, backbone=str(changed))
    marker.write_text(before[MARKER].decode())
    assert isinstance(run(config, resume=True), object)
    assert not interrupted.exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000], ids=["cut", "a list", "empty", "deep"])
def test_a_marker_that_says_nothing_is_refused(config, interrupted, text):
    (interrupted / MARKER).write_text(text)
    with pytest.raises(InputError, match=r"remove .*out\.unfinished to start again"):
        run(config, resume=True)
    assert last_checkpoint(interrupted) is not None


def test_a_link_in_the_folder_leads_a_run_nowhere(config, tmp_path):
    folder, victim = tmp_path / "out.unfinished", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    (folder / f"{MARKER}.new").symlink_to(victim)
    run(config)
    assert victim.read_text() == "mine"


def test_a_full_disk_ends_a_run_with_one_message_and_the_checkpoint_before(config, tmp_path, monkeypatch):
    from transformers import Trainer

    whole = Trainer._save_checkpoint

    def fill_up(self, *args, **kwargs):
        if self.state.global_step > 1:
            raise OSError(28, "No space left on device")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_checkpoint", fill_up)
    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-1 is complete, and resume continues from it"):
        run(config)
    assert last_checkpoint(tmp_path / "out.unfinished").name == "checkpoint-1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_by_a_signal_says_how_to_go_on(config, tmp_path, number):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({**config, "steps": 100_000, "save_every": 2}))
    command = [sys.executable, "-m", "mixencoder", "train", "--config", str(settings)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    deadline = time.monotonic() + 120
    while last_checkpoint(tmp_path / "out.unfinished") is None and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + number, errors
    assert "Traceback" not in errors
    kept = last_checkpoint(tmp_path / "out.unfinished")
    assert f"interrupted: {kept} is complete, and the same command with --resume continues from it" in errors


def test_rows_given_as_data_are_compared_too(config, words, interrupted, tmp_path):
    marker = json.loads((interrupted / MARKER).read_text())
    assert list(marker["read"]) == ["data pairs", "backbone"]
    rows = partner_pairs(words, 12)
    with pytest.raises(InputError, match="begun with other settings: data"):
        run(config, resume=True, data=DataSpec(rows, name="pairs"))
