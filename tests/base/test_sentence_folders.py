"""Encoders in sentence-transformers folders: which files are read, and the pooling that they were trained with."""

import json
import linecache
import shutil
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.base.backbones import SUPPORTED
from mixencoder.base.checkpoints.checkpoint import load_backbone
from mixencoder.cli import app
from mixencoder.errors import CheckpointError, EncoderWarning
from mixencoder.evaluation import provenance
from mixencoder.peers import CrossEncoder, DualEncoder, LateInteraction, PolyEncoder
from tests.training.synthetic import write

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."


@pytest.fixture
def folder(encoder) -> Path:
    """Return a tiny BERT's folder."""
    return encoder


def describe(folder: Path, pooling: dict, *others: str, encoder: str = "", kinds: str = OLD) -> None:
    """Write the files that sentence-transformers writes beside an encoder."""
    modules = [(f"{kinds}Transformer", encoder), (f"{kinds}Pooling", "1_Pooling")]
    modules += [(f"{kinds}{name}", f"{number}_{name}") for number, name in enumerate(others, 2)]
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


FIRST = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
MAX = {"pooling_mode_max_tokens": True}


def dual_term(folder: Path, **options: object) -> MixEncoder:
    return MixEncoder.from_backbone(folder, dual_term=True, **options)


@pytest.mark.parametrize("start", [dual_term, DualEncoder.from_backbone, PolyEncoder.from_backbone])
@pytest.mark.parametrize(
    ("pooling", "kinds"), [(FIRST, OLD), ({"pooling_mode": "cls"}, NEW), ({"pooling_mode": ["cls"]}, NEW)]
)
def test_pooling_by_the_first_token_is_followed(folder, start, pooling, kinds):
    describe(folder, pooling, "Normalize", kinds=kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(folder).config.pooling == "first"


@pytest.mark.parametrize("start", [dual_term, DualEncoder.from_backbone, PolyEncoder.from_backbone])
@pytest.mark.parametrize("pooling", [MEAN, {"pooling_mode": "mean"}])
def test_pooling_by_the_mean_stays_as_it_is_without_a_warning(folder, backbone_path, start, pooling):
    describe(folder, pooling, "Normalize")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(folder).config.pooling == start(backbone_path).config.pooling != "first"


@pytest.mark.parametrize("start", [dual_term, DualEncoder.from_backbone])
@pytest.mark.parametrize(
    ("pooling", "words"),
    [(MAX, "max"), ({"pooling_mode": "lasttoken"}, "lasttoken"), ({**FIRST, **MAX}, "cls and max")],
)
def test_pooling_that_cannot_be_followed_is_warned_of(folder, start, pooling, words):
    describe(folder, pooling)
    with pytest.warns(EncoderWarning, match=f"trained with {words} pooling") as caught:
        start(folder)
    # the warning points at the line that called from_backbone
    assert Path(caught[0].filename).name == Path(__file__).name
    line = linecache.getline(caught[0].filename, caught[0].lineno)
    assert "from_backbone(folder" in line or "start(folder)" in line


def test_several_context_embeddings_cannot_follow_the_first_token(folder):
    describe(folder, FIRST)
    with pytest.warns(EncoderWarning, match="trained with cls pooling"):
        assert dual_term(folder, num_context_embeddings=2).config.pooling == "codes"


def test_a_given_pooling_is_kept(folder):
    describe(folder, FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DualEncoder.from_backbone(folder, pooling="mean").config.pooling == "mean"


@pytest.mark.parametrize("start", [MixEncoder.from_backbone, CrossEncoder.from_backbone, LateInteraction.from_backbone])
def test_models_without_pooling_give_no_warning(folder, start):
    describe(folder, MAX, "Dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(folder)


def test_further_modules_are_warned_of_where_they_change_scores(folder):
    describe(folder, MEAN, "Dense", "Normalize")
    with pytest.warns(EncoderWarning, match="left out here: Dense$"):
        DualEncoder.from_backbone(folder)
    # a cosine ignores the lengths of vectors, a dot product does not
    with pytest.warns(EncoderWarning, match="left out here: Dense, Normalize$"):
        DualEncoder.from_backbone(folder, similarity="dot")


def test_the_older_form_is_followed_to_its_encoder(backbone_path, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(backbone_path, folder / "0_Transformer")
    describe(folder, FIRST, encoder="0_Transformer")
    assert load_backbone(folder).config.model_type == "bert"
    assert DualEncoder.from_backbone(folder).config.pooling == "first"
    # an evaluation says which weights it measured
    assert list(provenance._weight_hashes(folder)) == ["model.safetensors"]
    (folder / "0_Transformer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"0_Transformer holds no model\.safetensors"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[1]", '[{"type": "a.Transformer"}]', '[{"type": "a.Dense", "path": ""}]']
)
def test_a_damaged_list_of_modules_is_named(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("place", ["../encoder", "/etc", "a/../../encoder"])
def test_modules_outside_of_the_folder_are_not_read(folder, tmp_path, place):
    other = tmp_path / "other"
    other.mkdir()
    describe(other, MEAN, encoder=place)
    with pytest.raises(CheckpointError, match="expected one below"):
        load_backbone(other)


def test_a_pooling_without_its_configuration_is_named(folder):
    describe(folder, MEAN)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json cannot be read"):
        DualEncoder.from_backbone(folder)


@pytest.mark.parametrize("architecture", ["dual-encoder", "mixencoder"])
def test_an_evaluation_of_an_untrained_model_says_so_in_a_line(folder, tmp_path, architecture):
    describe(folder, MAX)
    data = write(tmp_path / "dev.jsonl", [{"query": "rice", "candidates": ["boil", "cat"], "labels": [1, 0]}])
    arguments = ["evaluate", str(data), "--backbone", str(folder), "--architecture", architecture, "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert " ".join(done.stderr.split()).startswith("warning: the encoder in")
    assert "trained with max pooling" in " ".join(done.stderr.split())


def test_supported_kinds_are_those_that_are_documented():
    guide = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in guide for kind in SUPPORTED)
