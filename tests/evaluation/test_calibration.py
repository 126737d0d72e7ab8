"""Probabilities beside scores: the fit, what it is stored in, and who offers it."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.architectures import load_engine
from mixencoder.base.checkpoints.checkpoint import write_calibration
from mixencoder.cli import app
from mixencoder.errors import CheckpointError, DataError, InputError, NonFiniteError
from mixencoder.evaluation.calibration import fit_scores
from mixencoder.peers import CrossEncoder
from tests.training.synthetic import write

TEXTS = ["cook rice", "boil water in the pot", "the cat sat", "git commit"]


@pytest.fixture
def checkpoint(tmp_path, backbone_path):
    torch.manual_seed(0)
    MixEncoder.from_backbone(backbone_path, dual_term=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values, dtype=np.float64)))


def test_the_fit_finds_the_line_that_the_labels_were_drawn_from():
    generator = np.random.default_rng(0)
    scores = generator.normal(100, 40, 200_000)
    right = generator.random(200_000) < sigmoid(scores / 20 - 6)
    fitted = fit_scores(scores, right, np.ones(200_000))
    assert fitted.temperature == pytest.approx(20, rel=0.02)
    assert fitted.bias == pytest.approx(-6, rel=0.02)
    assert fitted.error < 0.005
    probabilities = sigmoid(scores / fitted.temperature + fitted.bias)
    by_hand = -np.mean(np.where(right, np.log(probabilities), np.log(1 - probabilities)))
    assert fitted.log_loss == pytest.approx(by_hand, rel=1e-9)
    share = right.mean()
    assert fitted.base_log_loss == pytest.approx(-share * np.log(share) - (1 - share) * np.log(1 - share))
    # no other line does better
    plain = LogisticRegression(C=np.inf, tol=1e-10).fit(scores[:, None] / 40, right)
    assert fitted.temperature == pytest.approx(40 / plain.coef_[0, 0], rel=1e-4)


def test_the_calibration_error_of_scores_that_say_too_much():
    # logits of +-4 where the truth is 3 in 4: no line through two points is wrong about them
    scores = np.array([4.0] * 4 + [-4.0] * 4)
    right = np.array([True, True, True, False, False, False, False, True])
    fitted = fit_scores(scores, right, np.ones(8))
    assert sigmoid(4 / fitted.temperature + fitted.bias) == pytest.approx(0.75, abs=1e-4)
    assert fitted.error == pytest.approx(0, abs=1e-4)
    assert fitted.log_loss < fitted.base_log_loss


def test_weights_count_as_often_as_they_say():
    scores = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    right = np.array([False, True, False, True, True])
    weighed = fit_scores(scores, right, np.array([1, 1, 2, 1, 1.0]))
    repeated = fit_scores(scores[[0, 1, 2, 2, 3, 4]], right[[0, 1, 2, 2, 3, 4]], np.ones(6))
    assert weighed.temperature == pytest.approx(repeated.temperature, rel=1e-3)
    assert weighed.error == pytest.approx(repeated.error, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("right", "message"),
    [([True] * 4, "4 of 4 candidates are right"), ([False] * 4, "0 of 4"), ([True, True, False, False], "higher")],
)
def test_what_cannot_be_fitted_is_refused(right, message):
    with pytest.raises(DataError, match=message):
        fit_scores(np.arange(4.0), np.array(right), np.ones(4))


def test_scores_that_tell_all_apart_are_refused_and_far_ones_do_not_overflow():
    """The steeper the line the better it would fit, up to probabilities of 0 and 1 that nothing holds."""
    right = np.array([False, False, True])
    with pytest.raises(DataError, match=r"all 1 right documents score above all 2 others.* expected more data"):
        fit_scores(np.array([1.0, 2.0, 3.0]), right, np.ones(3))
    with np.errstate(all="raise"):
        fitted = fit_scores(np.array([-1e4, 1.0, 0.9, 2.0, 1e4]), np.array([0, 1, 0, 0, 1], dtype=bool), np.ones(5))
    assert np.isfinite(fitted.log_loss)


def test_the_command_stores_what_rank_then_offers(checkpoint, tmp_path):
    engine = MixEncoder.from_pretrained(checkpoint)
    scores = engine.predict([("boil rice", text) for text in TEXTS]).astype(np.float64)
    # the model is right about all but one
    labels = [int(score > np.median(scores)) for score in scores]
    best = int(np.argmax(scores))
    rows = [
        {"query": "boil rice", "candidates": TEXTS, "labels": labels},
        {"query": "boil rice", "candidates": TEXTS, "labels": [int(place != best) for place in range(4)]},
        {"query": "boil rice", "candidates": TEXTS, "labels": labels},
    ]
    data = write(tmp_path / "dev.jsonl", rows)
    before = json.loads((checkpoint / "config.json").read_text())
    result = CliRunner().invoke(app, ["calibrate", str(data), "--model", str(checkpoint)])
    assert result.exit_code == 0, result.output
    after = json.loads((checkpoint / "config.json").read_text())
    calibration = after.pop("calibration")
    before.pop("calibration")
    assert after == before
    assert sorted(path.name for path in checkpoint.iterdir() if path.name.startswith(".")) == []
    engine = MixEncoder.from_pretrained(checkpoint)
    expected = sigmoid(scores / calibration["temperature"] + calibration["bias"])
    np.testing.assert_allclose(engine.probability(scores), expected, rtol=1e-9)
    for documents in (TEXTS, engine.index(TEXTS, precision="float32")):
        ranking = engine.rank("boil rice", documents, return_probabilities=True)
        np.testing.assert_allclose(
            [entry["probability"] for entry in ranking],
            [expected[entry["corpus_id"]] for entry in ranking],
            rtol=1e-3,
        )
        # beside, never instead
        assert [entry["score"] for entry in ranking] == [
            entry["score"] for entry in engine.rank("boil rice", documents)
        ]
    # kept when the model is saved again
    engine.save_pretrained(tmp_path / "again")
    assert MixEncoder.from_pretrained(tmp_path / "again").config.calibration == calibration
    candidates = tmp_path / "candidates.txt"
    candidates.write_text("\n".join(TEXTS))
    arguments = ["rank", "boil rice", "--candidates", str(candidates), "--model", str(checkpoint)]
    shown = CliRunner().invoke(app, arguments)
    assert "probability" in shown.output
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert listed[0]["probability"] == pytest.approx(expected.max(), rel=1e-4)


def test_without_a_calibration_there_are_no_probabilities(checkpoint):
    engine = MixEncoder.from_pretrained(checkpoint)
    assert "probability" not in engine.rank("boil rice", TEXTS)[0]
    for documents in (TEXTS, engine.index(TEXTS)):
        with pytest.raises(InputError, match="mixencoder calibrate"):
            engine.rank("boil rice", documents, return_probabilities=True)
    with pytest.raises(InputError, match="no calibration"):
        engine.probability(1.0)


def test_probabilities_are_those_of_full_raw_scores(checkpoint):
    write_calibration(checkpoint, {"temperature": 2.0, "bias": -1})
    engine = load_engine(checkpoint)
    for options in ({"score": "dual"}, {"activation_fn": torch.sigmoid}):
        with pytest.raises(InputError, match="full scores"):
            engine.rank("boil rice", TEXTS, return_probabilities=True, **options)
    with pytest.raises(NonFiniteError, match="NaN"):
        engine.probability([1.0, float("nan")])
    # far out nothing overflows, and what is asked for keeps its shape
    with np.errstate(all="raise"):
        found = engine.probability(torch.tensor([[1e9, -1e9], [2.0, 0.0]]))
    np.testing.assert_allclose(found, [[1.0, 0.0], [0.5, sigmoid(-1.0)]])


def test_every_architecture_keeps_a_calibration(tmp_path, backbone_path):
    engine = CrossEncoder.from_backbone(backbone_path, calibration={"temperature": 3.0, "bias": 0.5})
    engine.save_pretrained(tmp_path / "cross")
    found = load_engine(tmp_path / "cross").rank("boil rice", TEXTS, return_probabilities=True)
    assert found[0]["probability"] == pytest.approx(sigmoid(found[0]["score"] / 3 + 0.5))


@pytest.mark.parametrize(
    "value", [{"temperature": 0, "bias": 0}, {"temperature": 1}, 3, {"temperature": 1, "bias": "x"}]
)
def test_a_calibration_that_is_none_is_refused(backbone_path, value):
    with pytest.raises(InputError, match="expected None or a temperature above 0 and a bias"):
        MixEncoder.from_backbone(backbone_path, calibration=value)


def test_a_crash_while_it_is_stored_leaves_the_checkpoint_as_it_was(checkpoint, monkeypatch):
    before = (checkpoint / "config.json").read_bytes()

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixencoder.durable.os.replace", crash)
    with pytest.raises(CheckpointError, match="No space left"):
        write_calibration(checkpoint, {"temperature": 1.0, "bias": 0.0})
    assert (checkpoint / "config.json").read_bytes() == before
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".")]
    with pytest.raises(CheckpointError, match="is not a directory"):
        write_calibration(checkpoint / "missing", {"temperature": 1.0, "bias": 0.0})
