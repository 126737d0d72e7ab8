"""Training with bf16: every step computes with the weights as they are, and runs go on as they would have."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch

from mixencoder.training.objective import Objective
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import partner_pairs


@pytest.fixture
def config(tmp_path, backbone_path, words):
    """A run without dropout, whose steps are long enough to be seen in bfloat16."""
    backbone = tmp_path / "plain"
    shutil.copytree(backbone_path, backbone)
    fields = json.loads((backbone / "config.json").read_text())
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (backbone / "config.json").write_text(json.dumps(fields))
    data = [DataSpec(partner_pairs(words, 40))]
    rates = {"learning_rate": 1e-2, "head_learning_rate": 1e-2}
    return TrainConfig(output=tmp_path / "out", data=data, backbone=backbone, bf16=True, steps=4, **rates)


@pytest.mark.parametrize("inside_autocast", [False, True])
def test_every_step_computes_with_the_weights_as_they_are(config, monkeypatch, inside_autocast):
    # inside the caller's autocast PyTorch keeps the weights that it has cast
    caller = torch.autocast("cpu", torch.bfloat16) if inside_autocast else nullcontext()
    compute, losses = Objective.__call__, []

    def twice(self, model, inputs):
        loss, scores = compute(self, model, inputs)
        torch.clear_autocast_cache()
        losses.append((loss.item(), compute(self, model, inputs)[0].item()))
        return loss, scores

    monkeypatch.setattr(Objective, "__call__", twice)
    with caller:
        train(config)
    assert len({first for first, _ in losses}) == config.steps
    assert all(first == again for first, again in losses), losses
