"""The scripts that made the bundled checkpoint: pairs out of free texts, and the interaction's share."""

import pytest
import torch
import yaml

from benchmarks.checkpoint import average
from benchmarks.checkpoint.card import PRETRAINED, STAGES
from benchmarks.checkpoint.equal_dual import dual_stage
from benchmarks.checkpoint.share import SHARES, figures_by_share, scale_interaction
from mixencoder import MixEncoder
from mixencoder.errors import InputError
from mixencoder.evaluation.tasks import read_task
from mixencoder.training.run import TrainConfig
from tests.training.synthetic import write


def test_scaling_the_interaction_scales_that_term_alone(backbone_path):
    model = MixEncoder.from_backbone(backbone_path, heads=("ranking", "classification"), num_labels=3, dual_term=True)
    pairs = [("boil water", "the cat sat"), ("undo", "a mat")]

    def scores():
        parts = [model.predict(pairs, score=part, convert_to_tensor=True) for part in ("interaction", "dual")]
        return [*parts, model.predict(pairs, head="classification", convert_to_tensor=True)]

    interaction, dual, classes = scores()
    scale_interaction(model.model, 0.25)
    scaled = scores()
    torch.testing.assert_close(scaled[0], 0.25 * interaction)
    assert torch.equal(scaled[1], dual)
    torch.testing.assert_close(scaled[2], classes)


def test_a_share_is_worth_what_the_scores_rank(tmp_path):
    rows = [{"query": "a", "candidates": ["right", "wrong"], "labels": [1, 0]}]
    task = read_task(write(tmp_path / "dev.jsonl", rows))
    # the dual term is wrong by 1, the interaction right by 1.1
    parts = {"dual": [torch.tensor([0.0, 1.0])], "interaction": [torch.tensor([1.1, 0.0])]}
    found = figures_by_share(task, parts)
    assert {share for share, value in found.items() if value == 1} == {share for share in SHARES if share >= 1}
    assert found[0.0] == pytest.approx(1 / 1.5849625)


def test_averaged_weights_are_the_mean_of_all(checkpoint, tmp_path):
    model = MixEncoder.from_pretrained(checkpoint)
    first = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(2.0)
    model.save_pretrained(tmp_path / "other")
    average.main([checkpoint, str(tmp_path / "other"), "--output", str(tmp_path / "mean")])
    found = MixEncoder.from_pretrained(tmp_path / "mean").model.state_dict()
    for name, _ in model.model.named_parameters():
        torch.testing.assert_close(found[name], first[name] + 1.0)


def test_checkpoints_of_different_forms_are_not_averaged():
    weights = {"a": torch.zeros(2), "steps": torch.tensor(3)}
    assert average.average([weights, weights])["steps"] == 3
    with pytest.raises(InputError, match="differ in the names or shapes"):
        average.average([weights, {**weights, "a": torch.zeros(3)}])


@pytest.mark.parametrize("name", STAGES)
def test_an_equal_dual_encoder_is_trained_by_the_same_stages(name):
    stage = yaml.safe_load((PRETRAINED / name).read_text())
    equal = dual_stage(stage)
    assert TrainConfig(output="out", **equal).architecture == "dual-encoder"
    assert set(equal["config"]) <= {"query_truncation_side", "max_document_length"}
    assert {key: equal[key] for key in stage if key != "config"} == {
        key: stage[key] for key in stage if key != "config"
    }
