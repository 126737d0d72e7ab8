"""Exported graphs give the model's scores, with onnxruntime, over random shapes and for every kind of backbone."""

import json
import logging
import os
import runpy
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from mixencoder import InputError, MixEncoder
from mixencoder.base.backbones import SUPPORTED
from mixencoder.cli import app
from tests.conftest import backbone_config

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from mixencoder import export
from tests.integrations.texts import TEXTS

QUERIES = ["how to cook rice", "how to undo a git commit in paris"]
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "onnx_rank.py"
BOUND = 1e-4
"""Scores of tiny models with large weights are some tens; float32 rounds each of some hundred operations."""


@pytest.fixture(autouse=True)
def quiet():
    """Keep PyTorch's trace of an export from pytest, which would take longer to store it than the export takes."""
    logging.getLogger("torch.__trace").propagate = False
    yield
    logging.getLogger("torch.__trace").propagate = True


# every variant of the model once, each on another backbone, as an export takes half a minute
CASES = {
    "bert": {},
    "roberta": {"num_context_embeddings": 2, "interaction_layers": (-2, -1), "dual_term": True},
    "xlm-roberta": {"state_row": False},
    "electra": {"context_update": False},
    "distilbert": {"dual_term": True, "pooling": "first", "context_norm": 2.0, "query_adapter_size": 8},
    "albert": {"dual_term": True, "num_context_embeddings": 3},
    "modernbert": {"num_context_embeddings": 4, "dual_term": True},
}


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_backbone_and_variant_is_exported(kind, tokenizer, tmp_path):
    torch.manual_seed(3)
    AutoModel.from_config(backbone_config(kind, initializer_range=0.3)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    engine = MixEncoder.from_backbone(tmp_path / "encoder", **CASES[kind])
    for parameter in engine.model.parameters():
        # an adapter that starts as the identity would hide an error
        parameter.data += torch.randn(parameter.shape) / 50
    assert export.export_onnx(engine, tmp_path / "out") < BOUND


def test_the_command_writes_what_a_program_needs(checkpoint, tmp_path):
    done = CliRunner().invoke(app, ["export", "--format", "onnx", str(tmp_path / "out"), "--model", checkpoint])
    assert done.exit_code == 0, done.output
    assert "differ from the model's by at most" in " ".join(done.stderr.split())
    settings = json.loads((tmp_path / "out" / export.SETTINGS).read_text())
    assert settings["prefix"] == [2]
    assert settings["suffix"] == [3]
    assert settings["state"] == ["keys_0", "values_0", "pooled"]
    model = MixEncoder.from_pretrained(checkpoint)
    # the example, in this process; below it runs without PyTorch
    ranker = runpy.run_path(str(EXAMPLE))["OnnxRanker"](tmp_path / "out")
    contexts = ranker.encode_document(TEXTS, batch_size=3)
    for query in QUERIES:
        assert np.abs(ranker.score(query, contexts) - model.predict([(query, text) for text in TEXTS])).max() < BOUND


def test_int8_is_near(checkpoint, tmp_path):
    engine = MixEncoder.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        difference = export.export_onnx(engine, tmp_path / "int8", int8=True)
    # scores of this model are some tens
    assert 0 < difference < 5


def test_what_cannot_be_exported_is_said(checkpoint, backbone_path, tmp_path):
    with pytest.raises(InputError, match=r"dtype is torch\.bfloat16"):
        export.export_onnx(MixEncoder.from_pretrained(checkpoint, dtype="bf16"), tmp_path / "out")
    with pytest.raises(InputError, match="no head 'ranking'"):
        export.export_onnx(MixEncoder.from_backbone(backbone_path, num_labels=2), tmp_path / "out")
    done = CliRunner().invoke(app, ["export", "--format", "tflite", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_example_ranks_without_pytorch(tmp_path):
    python = os.environ.get("MIXENCODER_TEST_ONNX_PYTHON")
    if not python:
        pytest.skip("MIXENCODER_TEST_ONNX_PYTHON names no Python with onnxruntime, tokenizers and numpy alone")
    model = MixEncoder.from_pretrained()
    export.export_onnx(model, tmp_path / "out")
    candidates = EXAMPLE.with_name("candidates.txt")
    query = "How do I undo my last git commit?"
    assert subprocess.run([python, "-c", "import torch"], check=False, stderr=subprocess.DEVNULL).returncode == 1
    command = [python, str(EXAMPLE), str(tmp_path / "out"), query, str(candidates)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = model.rank(query, candidates.read_text(encoding="utf-8").splitlines(), top_k=5, return_documents=True)
    for line, entry in zip(printed.splitlines(), expected, strict=True):
        score, _, text = line.strip().partition("  ")
        assert text == entry["text"]
        # three digits are printed
        assert abs(float(score) - entry["score"]) < 1e-3
