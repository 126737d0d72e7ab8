"""Adding a head to a trained model: the new head, and that everything else keeps its bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.architectures import ARCHITECTURES, engine_class, load_engine
from mixencoder.base.checkpoints.checkpoint import write_calibration
from mixencoder.errors import DataError, InputError
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import partner_pairs

PAIRS = [("how to cook rice", "boil water in pot"), ("the dog", "a cat"), ("undo git commit", "the mat")]


def predictions(engine, head: str) -> np.ndarray:
    return engine.predict(PAIRS, head=head)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("heads", [("ranking", "classification"), ("classification", "ranking")])
def test_a_head_is_added_and_all_other_weights_keep_their_bits(backbone_path, architecture, heads):
    has, added = heads
    options = {"num_labels": 3} if has == "classification" else {}
    engine = engine_class(architecture).from_backbone(backbone_path, **options)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    scores = predictions(engine, has)
    both = engine.with_head(added, ["no", "perhaps", "yes"] if added == "classification" else ())
    assert type(both) is type(engine)
    assert both.config.heads == [has, added]
    after = both.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    np.testing.assert_array_equal(predictions(both, has), scores)
    assert predictions(both, added).shape == ((3, 3) if added == "classification" else (3,))
    if added == "classification":
        assert both.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert not both.model.training
    # the first engine has not changed, nor does it when the new one does
    for parameter in both.model.parameters():
        parameter.data.zero_()
    assert engine.config.heads == [has]
    np.testing.assert_array_equal(predictions(engine, has), scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_with_a_head_added_is_saved_like_any_other(tmp_path, backbone_path, architecture):
    both = engine_class(architecture).from_backbone(backbone_path).with_head("classification", ["x", "y"])
    both.save_pretrained(tmp_path / "both")
    loaded = load_engine(tmp_path / "both")
    assert loaded.config.id2label == {0: "x", 1: "y"}
    found, expected = loaded.model.state_dict(), both.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert predictions(loaded, "classification").shape == (3, 2)


def test_an_engine_with_a_head_added_keeps_dtype_backend_and_limits(backbone_path):
    engine = MixEncoder.from_backbone(backbone_path, dtype="bfloat16", backend="reference", dual_term=True)
    both = engine.with_limits(max_query_length=5, max_document_length=6).with_head("classification", ["x", "y"])
    assert both.dtype == torch.bfloat16
    assert both.backend == "reference"
    assert (both.read_query.max_length, both.read_document.max_length) == (5, 6)


def test_heads_that_cannot_be_added_are_refused(backbone_path):
    ranker = MixEncoder.from_backbone(backbone_path)
    classifier = MixEncoder.from_backbone(backbone_path, num_labels=2)
    for engine, arguments, message in (
        (ranker, ("ranking",), "head is 'ranking'; expected one of ranking, classification that the model lacks, it"),
        (classifier, ("classification", ["x", "y"]), "that the model lacks, it has classification"),
        (ranker, ("similarity",), "head is 'similarity'"),
        (ranker, ("classification",), r"class_names is \[\]; expected names of classes"),
        (ranker, ("classification", ["x", "x"]), "expected names of classes, each once"),
        (classifier, ("ranking", ["x"]), "a ranking head has no classes"),
    ):
        with pytest.raises(InputError, match=message):
            engine.with_head(*arguments)


def labelled(labels: list) -> list[dict]:
    words = ["rice", "dog", "mat", "pot", "cat", "water"]
    return [{"premise": f"the {w}", "hypothesis": w, "label": labels[i % len(labels)]} for i, w in enumerate(words * 2)]


def going_on(model: Path, output: Path, rows: list[dict] | list[list[dict]], **changes) -> TrainConfig:
    sources = rows if isinstance(rows[0], list) else [rows]
    data = [DataSpec(source, name=f"rows{number}") for number, source in enumerate(sources)]
    # with a learning rate of zero no weight changes, so the saved model shows what the run started from
    fields = {"steps": 1, "batch_size": 6, "learning_rate": 0.0, "head_learning_rate": 0.0}
    return TrainConfig(output=str(output), model=str(model), data=data, **{**fields, **changes})


@pytest.fixture
def ranker(tmp_path, backbone_path) -> Path:
    MixEncoder.from_backbone(backbone_path, dual_term=True).save_pretrained(tmp_path / "ranker")
    return tmp_path / "ranker"


def test_training_adds_a_head_for_the_classes_of_its_data(tmp_path, ranker):
    before = load_engine(ranker).model.state_dict()
    train(going_on(ranker, tmp_path / "out", labelled(["yes", "no"])))
    loaded = load_engine(tmp_path / "out")
    assert loaded.config.heads == ["ranking", "classification"]
    assert loaded.config.label2id == {"no": 0, "yes": 1}
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # a second stage finds the head and keeps it
    train(going_on(tmp_path / "out", tmp_path / "again", labelled(["no", "yes"])))
    again = load_engine(tmp_path / "again").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_a_head_added_learns_beside_the_ranking(tmp_path, ranker, words):
    config = going_on(ranker, tmp_path / "out", [labelled(["yes", "no"]), partner_pairs(words, 12)])
    before = load_engine(ranker).model.state_dict()
    engine = train(TrainConfig(**{**vars(config), "steps": 6, "learning_rate": 1e-3, "head_learning_rate": 1e-2}))
    after = engine.model.state_dict()
    assert not torch.equal(after["gate.weight"], before["gate.weight"])
    fresh = load_engine(ranker).with_head("classification", ["no", "yes"]).model
    assert after.keys() == fresh.state_dict().keys()


def test_classes_that_are_numbers_are_told_by_the_configuration(tmp_path, ranker):
    rows = labelled([0, 1, 2])
    engine = train(going_on(ranker, tmp_path / "three", rows, config={"num_labels": 3}))
    assert engine.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    # as YAML and JSON have it
    names = {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    engine = train(going_on(ranker, tmp_path / "named", rows, config=names))
    assert engine.config.label2id == {"no": 0, "yes": 1, "perhaps": 2}
    # without either, numbers are scores, which the ranking head learns
    assert train(going_on(ranker, tmp_path / "scores", rows)).config.heads == ["ranking"]


def test_classes_that_do_not_fit_are_refused_before_training(tmp_path, ranker):
    train(going_on(ranker, tmp_path / "classes", labelled(["yes", "no"])))
    cases = [
        (
            tmp_path / "classes",
            labelled(["yes", "perhaps"]),
            {},
            DataError,
            "the classes no, yes, but the data have perh",
        ),
        (
            tmp_path / "classes",
            labelled(["yes", "no"]),
            {"num_labels": 3},
            DataError,
            "but the configuration has LABEL",
        ),
        (tmp_path / "classes", labelled(["x"]), {"id2label": {0: "yes", 1: "no"}}, DataError, "keeps its classes"),
        (ranker, labelled([0, 1]), {"num_labels": "two"}, InputError, "num_labels is 'two'; expected a positive"),
        (ranker, labelled([0, 1]), {"id2label": {1: "a", 2: "b"}}, InputError, "expected names of classes, numbered"),
        (ranker, labelled([0, 1]), {"id2label": ["a", "b"]}, InputError, "expected names of classes, numbered from 0"),
        (ranker, labelled([0, 1]), {"dual_term": False}, InputError, "has its own; expected only the classes"),
        (ranker, labelled(["yes"]), {}, DataError, "all 12 examples have the class number 0"),
        (ranker, labelled([0, 2]), {"num_labels": 2}, DataError, "row 1: label is 2; expected a class from 0 to 1"),
    ]
    for model, rows, fields, error, message in cases:
        with pytest.raises(error, match=message):
            train(going_on(model, tmp_path / "out", rows, config=fields))
    assert not (tmp_path / "out").exists()


def test_training_adds_a_ranking_head_to_a_classifier(tmp_path, backbone_path, words):
    CrossEncoder = engine_class("cross-encoder")  # noqa: N806
    CrossEncoder.from_backbone(backbone_path, num_labels=2).save_pretrained(tmp_path / "classifier")
    engine = train(going_on(tmp_path / "classifier", tmp_path / "out", partner_pairs(words, 12)))
    assert engine.config.heads == ["classification", "ranking"]
    before = load_engine(tmp_path / "classifier").model.state_dict()
    assert all(torch.equal(engine.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_training_on_forgets_a_calibration(tmp_path, ranker, words):
    write_calibration(ranker, {"temperature": 2.0, "bias": 0.5})
    assert train(going_on(ranker, tmp_path / "out", partner_pairs(words, 12))).config.calibration is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["calibration"] is None
    # a head alone changes no score
    assert load_engine(ranker).with_head("classification", ["x", "y"]).config.calibration is not None
