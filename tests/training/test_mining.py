"""Hard negatives: the wrong documents that a model ranks highest."""

import gzip
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder.architectures import engine_class
from mixencoder.cli import app
from mixencoder.data.examples import Example, Source, read_source
from mixencoder.errors import DataError, InputError
from mixencoder.training.mining import mine_negatives, write_candidate_lists

EXAMPLES = [
    Example("undo a git commit", ("git commit undo", "undo the commit")),
    Example("boil water in a pot", ("water in pot",), ("rice",)),
    Example("paris is the capital", ("capital of france",)),
]
POOL = ["git commit undo", "undo the commit", "water in pot", "rice", "capital of france", "the dog sat"]


@pytest.fixture(scope="module", params=["mixencoder", "dual-encoder", "late-interaction"])
def engine(request, backbone_path):
    return engine_class(request.param).from_backbone(backbone_path)


@pytest.mark.parametrize("margin", [None, 0.0])
def test_negatives_are_the_highest_ranked_wrong_documents(engine, margin):
    """With a margin those alone that stand below the right ones; without, what the model gets wrong is kept."""
    source = Source("s", "ranking", EXAMPLES)
    mined = mine_negatives(engine, source, documents=["the dog sat"], negatives=3, skip=1, margin=margin)
    for before, after in zip(EXAMPLES, mined, strict=True):
        scores = {POOL[entry["corpus_id"]]: entry["score"] for entry in engine.rank(before.query, POOL)}
        ceiling = math.inf if margin is None else min(scores[text] for text in before.positives)
        wrong = [text for text in scores if text not in before.positives and scores[text] <= ceiling]
        assert after == before._replace(negatives=tuple(wrong[1:4]))


def test_a_query_whose_right_document_scores_lowest_keeps_its_hard_negatives(engine, caplog):
    texts = [text for text in POOL if text != "rice"]
    scores = {text: engine.rank("cook", [text])[0]["score"] for text in POOL}
    worst, *others = sorted(scores, key=scores.__getitem__)
    source = Source("s", "ranking", [Example("cook", (worst,), where="data.jsonl, line 1")])
    (mined,) = mine_negatives(engine, source, documents=texts, negatives=2)
    assert mined.negatives == tuple(sorted((t for t in texts if t in others), key=scores.__getitem__)[:-3:-1])
    assert not caplog.records
    # with a margin none is left, which is said
    (mined,) = mine_negatives(engine, source, documents=texts, negatives=2, margin=0.0)
    assert mined.negatives == ()
    assert "1 of 1 queries are left without negatives" in caplog.text
    assert "data.jsonl, line 1" in caplog.text


def test_what_is_right_for_the_query_in_another_row_is_no_negative(engine):
    rows = [Example("undo a git commit", ("git commit undo",)), Example(" undo a git commit", ("undo the commit",))]
    mined = mine_negatives(engine, Source("s", "ranking", rows), documents=["undo the commit ", "rice"])
    assert [example.negatives for example in mined] == [("rice",), ("rice",)]


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


def test_files_beside_the_written_one_stay(tmp_path):
    other = tmp_path / ".mined.jsonl.tmp"
    other.write_text("mine")
    write_candidate_lists(EXAMPLES, tmp_path / "mined.jsonl")
    assert other.read_text() == "mine"


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, checkpoint):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"query": "cat", "positive": "the cat"}\n{"query": "dog", "positive": "the dog"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    before = data.read_text()
    for output, message in (
        (data, "is a file that is read here"),
        (tmp_path / "folder.jsonl", "is a folder"),
        (tmp_path / "none" / "x.jsonl", "cannot be written"),
        (data / "x.jsonl", "cannot be written"),
        (Path("/proc/x/y.jsonl"), "cannot be written"),
    ):
        result = CliRunner().invoke(app, ["mine", str(data), "--model", "none", "--output", str(output)])
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert data.read_text() == before
    # and what can be is written
    arguments = ["mine", str(data), "--model", checkpoint, "--output", str(tmp_path / "out.jsonl")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [json.loads(line)["labels"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [[1, 0]] * 2


def test_what_cannot_mine_is_refused(backbone_path):
    cross = engine_class("cross-encoder").from_backbone(backbone_path)
    with pytest.raises(InputError, match="a CrossEncoder cannot encode documents ahead of time"):
        mine_negatives(cross, Source("s", "ranking", EXAMPLES))
    dual = engine_class("dual-encoder").from_backbone(backbone_path)
    with pytest.raises(DataError, match="s holds examples of similarity; expected ranking"):
        mine_negatives(dual, Source("s", "similarity", EXAMPLES))
    for options, message in (
        ({"negatives": 0}, "negatives is 0"),
        ({"skip": -1}, "skip is -1"),
        ({"margin": float("nan")}, "margin is nan"),
    ):
        with pytest.raises(InputError, match=message):
            mine_negatives(dual, Source("s", "ranking", EXAMPLES), **options)
