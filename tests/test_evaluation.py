"""Ranking measures against values computed by hand."""

import json
import math

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.errors import DataError
from mixencoder.evaluation import RankingTask, evaluate_ranking, read_ranking_task


class Fixed:
    """Stands in for a model: a document's score is its number in the text."""

    def encode_document(self, texts, **_):
        return torch.tensor([float(text) for text in texts])

    def encode_query(self, texts, **_):
        class State:
            def select(self, row):
                return row

        return State()

    def interact(self, row, encoded, *, score):
        return encoded.unsqueeze(0)


def test_measures_equal_those_by_hand():
    documents = ["3.0", "2.0", "1.0"]
    task = RankingTask(
        "t", ["a", "b"], documents, [[0, 1, 2], [0, 1, 2]], [{"0": 0, "1": 1, "2": 0}, {"0": 1, "absent d": 1}]
    )
    result = evaluate_ranking(Fixed(), task, measures=["nDCG@10", "RR@10", "Success@1"])["full"]
    assert result["RR@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["Success@1"] == pytest.approx(1 / 2)
    # the second query has a right document that the first stage missed: the ideal ranking has both
    second = 1 / (1 + 1 / math.log2(3))
    assert result["nDCG@10"] == pytest.approx((1 / math.log2(3) + second) / 2)


def test_ties_count_against_the_model():
    task = RankingTask("t", ["a"], ["1.0", "1.00"], [[0, 1]], [{"0": 1, "1": 0}])
    assert evaluate_ranking(Fixed(), task, measures=["Success@1"])["full"]["Success@1"] == 0
    task = RankingTask("t", ["a"], ["1.0", "1.00"], [[0, 1]], [{"0": 0, "1": 1}])
    assert evaluate_ranking(Fixed(), task, measures=["Success@1"])["full"]["Success@1"] == 0


def test_an_unknown_measure_is_refused():
    task = RankingTask("t", ["a"], ["1.0"], [[0]], [{"0": 1}])
    with pytest.raises(DataError, match="not known"):
        evaluate_ranking(Fixed(), task, measures=["precision-ish"])


def test_rank_files_and_beir_folders_are_read(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [{"query": f"q{i}", "candidates": ["a", "b"], "labels": [0, 1]} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = read_ranking_task(path, limit=2)
    assert (task.name, task.queries, task.documents) == ("dev", ["q0", "q1"], ["a", "b"])
    assert task.qrels[0] == {"0": 0, "1": 1}
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": i, "title": "", "text": i}) for i in "xyz"))
    (folder / "queries.test.jsonl").write_text(json.dumps({"_id": "q", "text": "?"}))
    (folder / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tz\t1\nq\ty\t2\n")
    (folder / "bm25.test.run").write_text("q Q0 y 1 9.5 r\nq Q0 x 2 8.5 r\n")
    task = read_ranking_task(folder)
    assert (task.documents, task.candidates) == (["y", "x"], [[0, 1]])
    assert task.qrels == [{"absent z": 1, "0": 2}]
    (folder / "bm25.test.run").write_text("q Q0 w 1 9.5 r\n")
    with pytest.raises(DataError, match="line 1: document 'w' is not in the corpus"):
        read_ranking_task(folder)


def test_a_real_model_is_evaluated_by_parts(tmp_path, backbone_path):
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps({"query": "the cat", "candidates": ["the cat sat", "boil rice"], "labels": [1, 0]}))
    model = MixEncoder.from_backbone(backbone_path, dual_term=True)
    task = read_ranking_task(path)
    result = evaluate_ranking(model, task, scores=["full", "interaction", "dual"])
    assert set(result) == {"full", "interaction", "dual"}
    best = model.rank("the cat", ["the cat sat", "boil rice"], top_k=1, score="dual")[0]["corpus_id"]
    assert result["dual"]["Success@1"] == float(best == 0)
