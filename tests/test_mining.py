"""Hard negatives: the wrong documents that a model ranks highest."""

import gzip
import json

import pytest

from mixencoder.architectures import front_door
from mixencoder.errors import DataError, InputError
from mixencoder.training.examples import Example, Source, read_source
from mixencoder.training.mining import mine_negatives, write_candidate_lists

EXAMPLES = [
    Example("undo a git commit", ("git commit undo", "undo the commit")),
    Example("boil water in a pot", ("water in pot",), ("rice",)),
    Example("paris is the capital", ("capital of france",)),
]
POOL = ["git commit undo", "undo the commit", "water in pot", "rice", "capital of france", "the dog sat"]


@pytest.fixture(scope="module", params=["mixencoder", "dual-encoder", "late-interaction"])
def engine(request, backbone_path):
    return front_door(request.param).from_backbone(backbone_path)


def test_negatives_are_the_highest_ranked_wrong_documents_below_the_right_ones(engine):
    mined = mine_negatives(engine, Source("s", "ranking", EXAMPLES), documents=["the dog sat"], negatives=3, skip=1)
    for before, after in zip(EXAMPLES, mined, strict=True):
        scores = {POOL[entry["corpus_id"]]: entry["score"] for entry in engine.rank(before.query, POOL)}
        ceiling = min(scores[text] for text in before.positives)
        wrong = [text for text in scores if text not in before.positives and scores[text] <= ceiling]
        assert after == before._replace(negatives=tuple(wrong[1:4]))


def test_a_margin_keeps_away_from_the_right_ones(engine):
    (example,) = mine_negatives(engine, Source("s", "ranking", EXAMPLES[:1]), margin=1e9, documents=POOL)
    assert example.negatives == ()


def test_candidate_lists_are_read_back_as_training_data(tmp_path):
    mined = [EXAMPLES[0]._replace(negatives=("rice",)), EXAMPLES[1]]
    for name in ("mined.jsonl", "mined.jsonl.gz"):
        write_candidate_lists(mined, tmp_path / name)
        source = read_source(tmp_path / name)
        assert [e[:3] for e in source.examples] == [e[:3] for e in mined]
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with gzip.open(tmp_path / "mined.jsonl.gz", "rt") as file:
        assert json.loads(file.readline())["labels"] == [1, 1, 0]
    with pytest.raises(DataError, match="cannot be written"):
        write_candidate_lists(mined, tmp_path / "none" / "mined.jsonl")


def test_what_cannot_mine_is_refused(backbone_path):
    cross = front_door("cross-encoder").from_backbone(backbone_path)
    with pytest.raises(InputError, match="a CrossEncoder encodes nothing ahead of time"):
        mine_negatives(cross, Source("s", "ranking", EXAMPLES))
    dual = front_door("dual-encoder").from_backbone(backbone_path)
    with pytest.raises(DataError, match="s holds examples of similarity; expected ranking"):
        mine_negatives(dual, Source("s", "similarity", EXAMPLES))
    with pytest.raises(InputError, match="negatives is 0"):
        mine_negatives(dual, Source("s", "ranking", EXAMPLES), negatives=0)
