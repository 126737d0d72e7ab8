"""Ranking several indexes read as one gives what one index with the same documents gives, bit for bit."""

import itertools

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.errors import UnknownIdError
from mixencoder.index import ShardedIndex
from mixencoder.ranking import index_ranker
from tests.conftest import WORDS

TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[:10], WORDS[:8], WORDS[:9])]
# equal texts give equal scores, in one shard and over two
TEXTS[600:] = TEXTS[: len(TEXTS) - 600]
IDS = [f"id {number}" for number in range(len(TEXTS))]
QUERIES = ["boil water", f"{WORDS[3]} {WORDS[5]}", "the"]
BOUNDS = (0, 301, 301, 302, 650, len(TEXTS))


def pair_of(model, **options):
    """One index, and the same documents in five shards, one of them empty."""
    shards = [model.index(TEXTS[a:b], IDS[a:b], **options) for a, b in itertools.pairwise(BOUNDS)]
    return model.index(TEXTS, IDS, **options), ShardedIndex(shards)


@pytest.fixture(scope="module")
def model(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, num_context_embeddings=2, dual_term=True, dual_scale_init=0.5)


@pytest.fixture(scope="module")
def indexes(model):
    return pair_of(model)


@pytest.mark.parametrize("prefilter", [None, "auto", 5, 200])
@pytest.mark.parametrize("top_k", [1, 12, None])
def test_all_documents_are_ranked_alike(model, indexes, prefilter, top_k):
    one, many = indexes
    found = model.rank(QUERIES, many, top_k, prefilter=prefilter, return_documents=True)
    assert found == model.rank(QUERIES, one, top_k, prefilter=prefilter, return_documents=True)
    best = [entry["score"] for entry in model.rank(QUERIES[0], many, None, prefilter=None)]
    assert len(set(best)) < len(best), "there are ties"


@pytest.mark.parametrize("score", ["full", "interaction", "dual"])
@pytest.mark.parametrize("products", ["native", "int8"])
def test_every_score_is_ranked_alike(model, indexes, score, products):
    one, many = indexes
    assert model.rank(QUERIES, many, score=score, products=products) == model.rank(
        QUERIES, one, score=score, products=products
    )


@pytest.mark.parametrize("prefilter", [None, 4])
def test_documents_with_given_ids_are_ranked_alike(model, indexes, prefilter):
    one, many = indexes
    # out of order, from all shards, with equal texts
    chosen = [IDS[number] for number in (700, 3, 301, 302, 603, 0, 649, 650, 719, 5)]
    each = [chosen, chosen[::-1], chosen[:1]]
    for ids in (chosen, each):
        expected = model.rank(QUERIES, one, 6, ids=ids, prefilter=prefilter)
        assert model.rank(QUERIES, many, 6, ids=ids, prefilter=prefilter) == expected
    with pytest.raises(UnknownIdError, match="'id 720'"):
        model.rank(QUERIES, many, ids=["id 720"])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_size_of_chunks_changes_nothing(model, indexes, rows, monkeypatch):
    one, many = indexes
    expected = model.rank(QUERIES, one, 20, prefilter=100)
    monkeypatch.setattr(index_ranker, "CHUNK_ROWS", rows)
    assert model.rank(QUERIES, many, 20, prefilter=100) == expected


@pytest.mark.parametrize("layout", ["projected", "compact"])
def test_documents_of_several_rows_are_ranked_alike(backbone_path, layout):
    torch.manual_seed(0)
    short = MixEncoder.from_backbone(backbone_path, dual_term=True).with_limits(max_document_length=4)
    one, many = pair_of(short, on_overflow="chunk", layout=layout)
    assert many.snapshot().rows > len(many)
    for prefilter in (None, 50):
        assert short.rank(QUERIES, many, 30, prefilter=prefilter) == short.rank(QUERIES, one, 30, prefilter=prefilter)
