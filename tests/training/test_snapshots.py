"""Copies of the model that a run saves on its way, and the schedule that makes them points of one learning curve."""

import json

import pytest
import torch

from mixencoder.architectures import load_engine
from mixencoder.errors import InputError
from mixencoder.training.folders import RECORD
from mixencoder.training.run import TrainConfig, train
from mixencoder.training.snapshots import snapshot_path
from tests.training.synthetic import partner_pairs, write


@pytest.fixture
def config(tmp_path, backbone_path, words):
    rows = write(tmp_path / "pairs.jsonl", partner_pairs(words, 20))
    fields = {"output": str(tmp_path / "out"), "data": [str(rows)], "backbone": str(backbone_path), "batch_size": 4}
    return fields | {"architecture": "dual-encoder", "steps": 20, "schedule": "stable", "log_every": 1}


def run(config, **changes):
    return train(TrainConfig(**{**config, **changes}))


def same(one, other) -> bool:
    one, other = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_stable_schedule_stays_at_its_peak_until_the_last_tenth(config, tmp_path):
    run(config, learning_rate=1e-3, head_learning_rate=1e-3)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    # the rate that each step took
    rates = [entry["learning_rate"] for entry in record["log"] if "learning_rate" in entry]
    assert rates == pytest.approx([0, 5e-4, *[1e-3] * 17, 5e-4])


def test_a_snapshot_is_the_model_after_its_step(config, tmp_path):
    engine = run(config, snapshots=[20, 5, 5])
    output = tmp_path / "out"
    assert same(load_engine(snapshot_path(output, 20)), engine)
    middle = load_engine(snapshot_path(output, 5))
    assert not same(middle, engine)
    assert middle.rank("rice", ["the cat", "boil rice"])
    # the same steps of a run without snapshots lead to the same model
    assert same(run(config, output=str(tmp_path / "plain")), engine)


def test_an_interrupted_run_keeps_and_adds_snapshots(config, tmp_path, monkeypatch):
    whole = run(config, output=str(tmp_path / "whole"), snapshots=[5, 15])
    with monkeypatch.context() as patch:

        def stop(trainer, *arguments, **options):
            if trainer.state.global_step == 10:
                raise KeyboardInterrupt
            return step(trainer, *arguments, **options)

        from mixencoder.training.trainer import ObjectiveTrainer

        step = ObjectiveTrainer.training_step
        patch.setattr(ObjectiveTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, snapshots=[5, 15], save_every=8)
    assert snapshot_path(tmp_path / "out", 5).is_dir()
    assert same(run(config, snapshots=[5, 15], save_every=8, resume=True), whole)
    for number in (5, 15):
        found = [load_engine(snapshot_path(tmp_path / name, number)) for name in ("out", "whole")]
        assert same(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshots": [30]}, r"snapshots are saved after steps \[30\], but the run ends at step 20"),
        ({"snapshots": [0]}, "snapshots is 0; expected an integer of at least 1"),
        ({"snapshots": "5"}, "snapshots is '5'; expected a list of steps"),
        ({"snapshots": 5}, "snapshots is 5; expected a list of steps"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; expected one of linear, stable"),
    ],
)
def test_what_cannot_be_is_an_error_before_any_work(config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(config, **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_of_a_snapshot_stays(config, tmp_path):
    path = snapshot_path(tmp_path / "out", 5)
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="step-5 exists and is not empty"):
        run(config, snapshots=[5])
    assert [entry.name for entry in path.iterdir()] == ["mine.txt"]
