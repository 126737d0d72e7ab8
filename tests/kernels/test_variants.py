"""Backbones and variants through `MixEncoder`: files, heads, and scores that do not notice their neighbours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from mixencoder import MixEncoder
from mixencoder.architectures import ARCHITECTURES, engine_class
from mixencoder.base.backbones import SUPPORTED, encoder_layers, layout_of
from mixencoder.base.configuration import HEADS
from mixencoder.errors import InputError
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.conftest import backbone_config

DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat", "water"]
QUERIES = ["how to undo a commit", "boil water", "the capital of france"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
BOTH = {"heads": HEADS, "num_labels": 3}

VARIANTS = {
    "published": {},
    "k16": {"num_context_embeddings": 16},
    "three layers": {"interaction_layers": (0, -2, 2), "num_context_embeddings": 3},
    "no state row": {"state_row": False, "num_context_embeddings": 3, "dual_term": True},
    "first token": {"pooling": "first", "dual_term": True},
    "no context update": {"context_update": False, "num_context_embeddings": 3, "interaction_layers": (0, -1)},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """The folder of a tiny random encoder of every kind."""
    torch.manual_seed(0)
    paths = {}
    for kind in SUPPORTED:
        paths[kind] = tmp_path_factory.mktemp(kind)
        config = backbone_config(kind, initializer_range=0.3)
        AutoModel.from_config(config, **layout_of(config).model_options).save_pretrained(paths[kind])
        tokenizer.save_pretrained(paths[kind])
    return paths


def make(path: Path, **options) -> MixEncoder:
    torch.manual_seed(1)
    return MixEncoder.from_backbone(path, **options)


def check(model: MixEncoder, folder: Path) -> None:
    """Both heads: scores are those of the model's own forward, of the saved model, and of each pair alone."""
    model.save_pretrained(folder)
    again = MixEncoder.from_pretrained(folder)
    for head in HEADS:
        scores = model.predict(PAIRS, head=head)
        assert np.array_equal(again.predict(PAIRS, head=head), scores)
        assert len(np.unique(scores)) > len(PAIRS) // 2
        for pair, score in list(zip(PAIRS, scores, strict=True))[::4]:
            assert np.array_equal(model.predict(pair, head=head), score)
            query, document = torch.tensor(model.read_query(pair[:1])), torch.tensor(model.read_document(pair[1:]))
            with torch.no_grad():
                own = model.model(query, torch.ones_like(query), document, torch.ones_like(document), head=head)
            own = own.full if head == "ranking" else own
            np.testing.assert_allclose(score, own[0, 0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_backbone_serves_the_front_door(kind, encoders, tmp_path):
    check(make(encoders[kind], interaction_layers=(1, -1), dual_term=True, **BOTH), tmp_path / "model")


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("architecture", ["mixencoder", "cross-encoder"])
def test_every_backbone_trains(architecture, kind, encoders, tmp_path):
    rows = [{"query": query, "positive": document} for query, document in zip(QUERIES, DOCUMENTS, strict=False)]
    fields = {"steps": 1, "batch_size": 3, "mini_batch_size": 2, "freeze_layers": 1, "learning_rate": 1e-3}
    config = TrainConfig(
        output=str(tmp_path / "out"),
        data=[DataSpec(rows, name="rows")],
        backbone=str(encoders[kind]),
        architecture=architecture,
        **fields,
    )
    after = train(config).model.backbone
    before = dict(engine_class(architecture).from_backbone(encoders[kind]).model.backbone.named_parameters())
    moved = {name for name, parameter in after.named_parameters() if not torch.equal(parameter, before[name])}
    # embeddings and the lowest layer are frozen, the others are not
    layers = encoder_layers(after)
    frozen = {id(parameter) for module in (after.embeddings, layers[0]) for parameter in module.parameters()}
    assert moved
    assert not any(id(parameter) in frozen for name, parameter in after.named_parameters() if name in moved)
    last = {id(parameter) for parameter in layers[-1].parameters()} - frozen
    assert any(id(parameter) in last for name, parameter in after.named_parameters() if name in moved)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_serves_the_front_door(variant, encoders, tmp_path):
    check(make(encoders["bert"], **variant, **BOTH), tmp_path / "model")


@pytest.mark.parametrize("kind", SUPPORTED)
def test_from_backbone_takes_the_encoders_weights(kind, encoders):
    loaded = AutoModel.from_pretrained(encoders[kind]).state_dict()
    backbone = make(encoders[kind]).model.backbone.state_dict()
    assert backbone
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in backbone.items())
    # a pooler, made afresh where the file has none, is all that is left out
    assert all("pooler" in name for name in set(loaded) - set(backbone))


@pytest.mark.parametrize("kind", SUPPORTED)
def test_low_precision_is_the_same_before_saving_and_after_loading(kind, encoders, tmp_path):
    # ModernBERT's frequencies of rotation are a buffer that a cast of the whole model would round
    model = make(encoders[kind], dtype="bfloat16")
    model.save_pretrained(tmp_path / "model")
    again = MixEncoder.from_pretrained(tmp_path / "model", dtype="bfloat16")
    assert again.dtype == model.dtype == torch.bfloat16
    pair = ("cook rice undo git commit water in pot " * 4, "the cat sat")
    assert again.predict(pair) == model.predict(pair)


def test_rank_uses_the_ranking_head_whatever_the_default(encoders):
    model = make(encoders["bert"], heads=("classification", "ranking"), num_labels=3)
    assert model.predict(PAIRS).shape == (15, 3)
    scores = model.predict([(QUERIES[0], document) for document in DOCUMENTS], head="ranking")
    ranked = model.rank(QUERIES[0], DOCUMENTS)
    assert [entry["score"] for entry in ranked] == sorted(scores.tolist(), reverse=True)
    with pytest.raises(InputError, match="no head 'regression'; its heads are classification, ranking"):
        model.predict(PAIRS, head="regression")


def test_an_ablation_scores_otherwise_than_the_whole(encoders):
    whole = make(encoders["bert"]).predict(PAIRS)
    for ablation in ({"state_row": False}, {"context_update": False}):
        assert not np.allclose(make(encoders["bert"], **ablation).predict(PAIRS), whole, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_misspelt_field_is_refused_and_the_right_ones_named(backbone_path, architecture):
    with pytest.raises(InputError, match=r"there is no field dual_trem; the fields are .*max_query_length.*num_labels"):
        engine_class(architecture).from_backbone(backbone_path, dual_trem=True)
