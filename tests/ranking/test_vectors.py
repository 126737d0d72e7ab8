"""Vectors that were made before, without their texts: `MixEncoder.from_vectors`."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.errors import IndexMismatchError, InputError
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import partner_pairs


@pytest.fixture
def model(backbone_path) -> MixEncoder:
    return MixEncoder.from_vectors(backbone_path)


def plain_vectors(backbone_path, texts: list[str]) -> torch.Tensor:
    """Return the mean token vectors of an encoder (N, d)."""
    return MixEncoder.from_backbone(backbone_path, dual_term=True).encode_document(texts)[:, 0]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("factor", ["as made", "normalised", "scaled"])
def test_vectors_of_any_length_rank_as_their_texts_do(model, backbone_path, words, factor, precision):
    texts = [f"{word} the {other}" for word, other in pairwise(words)]
    vectors = plain_vectors(backbone_path, texts)
    if factor == "normalised":
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    elif factor == "scaled":
        vectors = 37 * vectors
    index = model.index(embeddings=vectors.numpy(), ids=texts, precision=precision)
    by_texts = model.index(texts, ids=texts, precision=precision)
    found, wanted = (model.rank("how the cat", source) for source in (index, by_texts))
    scores = {entry["id"]: entry["score"] for entry in wanted}
    tolerance = 1e-4 if precision == "float32" else 0.2
    assert all(abs(entry["score"] - scores[entry["id"]]) < tolerance for entry in found)


def test_the_dual_score_is_the_cosine_before_training(model, backbone_path, words):
    vectors = plain_vectors(backbone_path, words)
    index = model.index(embeddings=vectors, ids=words, precision="float32")
    query = plain_vectors(backbone_path, ["how the cat"])
    cosines = torch.nn.functional.cosine_similarity(query, vectors)
    found = {entry["id"]: entry["score"] for entry in model.rank("how the cat", index, score="dual")}
    scale = model.config.dual_scale_init
    for word, cosine in zip(words, cosines.tolist(), strict=True):
        assert found[word] == pytest.approx(scale * cosine, abs=1e-4)


def test_labels_by_id_train_the_query_side_and_the_same_index_serves_the_result(tmp_path, model, backbone_path, words):
    rows = partner_pairs(words, 40)
    texts = sorted({row["positive"] for row in rows})
    model.save_pretrained(tmp_path / "model")
    model.index(None, texts, tmp_path / "index", embeddings=plain_vectors(backbone_path, texts)).close()
    config = TrainConfig(
        output=tmp_path / "out",
        data=[DataSpec(rows)],
        model=tmp_path / "model",
        freeze_encoder=True,
        index=tmp_path / "index",
        steps=5,
        batch_size=8,
        max_document_tokens=3,
    )
    trained = train(config)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["index"] == "index"
    index = trained.open_index(tmp_path / "index", read_only=True)
    assert trained.rank(rows[0]["query"], index, top_k=3) != model.rank(rows[0]["query"], index, top_k=3)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((3, 31)), r"expected context embeddings \(N, 1, 32\)"),
        (np.full((3, 32), np.nan), "embedding 0 holds NaN"),
        (np.zeros((3, 32)), "an embedding is zero"),
        (np.ones((3, 2, 32)), r"expected context embeddings \(N, 1, 32\)"),
        (np.ones(32), r"expected \(N, ...\)"),
    ],
    ids=["width", "nan", "zero", "two-each", "one"],
)
def test_vectors_that_cannot_be_used_are_refused(model, vectors, message):
    with pytest.raises(InputError, match=message):
        model.index(embeddings=vectors.astype(np.float32), ids=["a", "b", "c"])


def test_an_index_of_another_encoder_is_refused(tmp_path, model, words):
    model.index(words, path=tmp_path / "index").close()
    other = MixEncoder.from_pretrained()
    with pytest.raises(IndexMismatchError, match="encoder is"):
        other.open_index(tmp_path / "index")


def test_an_index_of_vectors_of_another_length_is_refused(backbone_path, model, words):
    index = model.index(words)
    other = MixEncoder.from_vectors(backbone_path, context_norm=2 * model.config.context_norm)
    with pytest.raises(IndexMismatchError, match="encoder is"):
        other.rank("how", index)


def test_fields_that_vectors_decide_cannot_be_chosen(backbone_path):
    with pytest.raises(InputError, match="num_context_embeddings cannot be chosen"):
        MixEncoder.from_vectors(backbone_path, num_context_embeddings=2)
    with pytest.raises(InputError, match="context_norm is -1"):
        MixEncoder.from_vectors(backbone_path, context_norm=-1)
