"""PyTerrier pipelines rank with our transformers."""

import pytest

pytest.importorskip("pyterrier", reason="pyterrier is not installed")

import pandas as pd
import pyterrier as pt

from mixencoder.integrations.pyterrier import MixEncoderIndex, MixEncoderReranker
from tests.integrations.texts import TEXTS

QUERIES = pd.DataFrame({"qid": ["q1", "q2"], "query": ["how to cook rice", "how to undo a commit"], "topic": [7, 8]})


@pytest.fixture
def frame():
    """Return what a first stage found: every text for both queries, out of order."""
    rows = QUERIES.merge(pd.DataFrame({"docno": [f"d{n}" for n in range(4)], "text": TEXTS}), how="cross")
    return rows.assign(score=1.0, rank=0).iloc[::-1].reset_index(drop=True)


def rankings(frame):
    return {qid: list(zip(rows["docno"], rows["score"], strict=True)) for qid, rows in frame.groupby("qid")}


def expected(model):
    found = [model.rank(query, TEXTS, ids=[f"d{n}" for n in range(4)]) for query in QUERIES["query"]]
    return {
        qid: [(entry["id"], entry["score"]) for entry in ranking]
        for qid, ranking in zip(QUERIES["qid"], found, strict=True)
    }


def test_rows_are_scored_and_ranked(model, checkpoint, frame):
    before = frame.copy(deep=True)
    scored = MixEncoderReranker(checkpoint).transform(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert rankings(scored) == expected(model)
    assert scored["rank"].tolist() == [0, 1, 2, 3] * 2
    # columns of queries and documents survive
    assert set(scored.columns) == set(frame.columns)
    assert (scored["topic"] == scored["qid"].map({"q1": 7, "q2": 8})).all()


def test_it_is_a_part_of_pipelines(model, frame):
    retrieve = pt.Transformer.from_df(frame)
    pipeline = retrieve >> MixEncoderReranker(model) % 2
    found = rankings(pipeline.transform(QUERIES))
    assert found == {qid: ranking[:2] for qid, ranking in expected(model).items()}
    # lists of dictionaries work too
    assert len(MixEncoderReranker(model)(frame.to_dict(orient="records"))) == len(frame)


def test_what_it_needs_and_gives_is_told_before_it_runs(model, frame, tmp_path):
    reranker = MixEncoderReranker(model, text_field="body")
    with pytest.raises(pt.validate.InputValidationError, match="body"):
        reranker.transform(frame)
    columns = pt.inspect.transformer_outputs(MixEncoderReranker(model), ["qid", "query", "docno", "text"])
    assert set(columns) == {"qid", "query", "docno", "text", "score", "rank"}
    columns = pt.inspect.transformer_outputs(MixEncoderIndex(tmp_path / "no", model), ["qid", "query"])
    assert set(columns) == {"qid", "query", "docno", "score", "rank"}


def test_stored_candidates_are_retrieved_and_scored_again(model, frame, tmp_path):
    documents = ({"docno": f"d{n}", "text": text} for n, text in enumerate(TEXTS))
    index = MixEncoderIndex(tmp_path / "index", model)
    index.index(documents, precision="float32")
    opened = MixEncoderIndex(tmp_path / "index", model, num_results=3)
    order = {qid: [docno for docno, _ in ranking] for qid, ranking in expected(model).items()}
    found = opened.transform(QUERIES)
    assert {qid: [docno for docno, _ in ranking] for qid, ranking in rankings(found).items()} == {
        qid: docnos[:3] for qid, docnos in order.items()
    }
    assert found["topic"].tolist() == [7] * 3 + [8] * 3
    scored = index.transform(frame.drop(columns="text"))
    assert {qid: [docno for docno, _ in ranking] for qid, ranking in rankings(scored).items()} == order
    assert len(opened.search("how to cook rice")) == 3
    assert (opened >> MixEncoderReranker(model)) is not None
