"""The benchmark of the prefilter: its rankings are those of `MixEncoder.rank`, and it runs to its end."""

import gzip
import json

import pytest
import torch

from benchmarks.index import prefilter
from benchmarks.report import tables
from mixencoder import MixEncoder
from tests.conftest import WORDS

N = 600
QUERIES = ["how to cook rice", "undo the git commit"]


@pytest.fixture
def model(backbone_path) -> MixEncoder:
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True, dual_scale_init=0.5)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


def test_its_rankings_are_those_of_rank(model):
    names = [str(number) for number in range(N)]
    index = model.index(ids=names, embeddings=torch.randn(N, 1, 32, generator=torch.Generator().manual_seed(0)))
    scores = prefilter.score(model, index, QUERIES)
    collection = prefilter.Collection(dict.fromkeys(names, ""), dict.fromkeys(QUERIES, ""), None, [550])
    for count in (550, N):
        positions = prefilter._positions(N, count)
        ids = [names[position] for position in positions]
        for kept in (None, 25, 100):
            for number, query in enumerate(QUERIES):
                found = prefilter.best_ten(scores.full[number], scores.dual[number], positions, kept)
                ranking = model.rank(query, index, 10, ids=ids, prefilter=kept)
                assert found == [entry["corpus_id"] for entry in ranking]
    records = {(one["documents"], one["prefilter"]): one for one in prefilter.compare(scores, collection)}
    ways = ("all", "25", "50", "100", "200", "400", "auto")
    assert set(records) == {(count, way) for count in (550, N) for way in ways}
    everything, few = records[N, "all"], records[N, "25"]
    assert (everything["other_set"], everything["other_order"], everything["overlap_at_10"]) == (0, 0, 1)
    assert few["other_order"] >= few["other_set"] > 0
    assert few["overlap_at_10"] < 1
    assert records[N, "auto"]["fully_scored"] == 128
    wrong = scores._replace(default=[ranking[::-1] for ranking in scores.default])
    with pytest.raises(AssertionError, match="does not find what prefilter=128 finds"):
        list(prefilter.compare(wrong, collection))


def test_the_command_writes_a_record_and_its_table(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    texts = [f"{one} {other}" for one in WORDS for other in WORDS]
    data, scifact = tmp_path / "data", tmp_path / "data" / "rerank" / "scifact"
    pairs = [{"query": text, "positive": f"{text} water"} for text in texts[:60]]
    # twice the same answer is one document
    write(data / "dialogue" / "ubuntu_irc.train.jsonl.gz", [*pairs, pairs[0]])
    write(data / "dialogue" / "ubuntu_irc_1in10.dev.jsonl.gz", pairs[:5])
    write(data / "answers" / "medquad.train.jsonl.gz", [{"query": one, "positive": one} for one in texts[:40]])
    write(scifact / "corpus.jsonl.gz", [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)])
    write(scifact / "queries.test.jsonl.gz", [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)])
    write(scifact / "qrels.test.tsv", ["query-id\tcorpus-id\tscore\n", "q0\td3\t1\n", "q1\td5\t1\n"])
    write(scifact / "bm25.test.run", ["q0 Q0 d3 1 2.0 x\n", "q1 Q0 d5 1 2.0 x\n"])
    monkeypatch.setattr(prefilter, "ROOT", tmp_path)
    results = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.prefilter_changes_table().startswith("Not recorded yet")
    arguments = ["--data-dir", str(data), "--device", "cpu-here", "--model", str(tmp_path / "model"), "--queries", "5"]
    prefilter.main(arguments)
    document = json.loads((results / "cpu-here" / "index_prefilter.json").read_text())
    sizes = {(one["collection"], one["documents"], one["queries"]) for one in document["records"]}
    assert sizes == {("scifact", len(texts), 2), ("pool", 100, 5)}
    for record in document["records"]:
        assert ("ndcg_at_10" in record) == (record["collection"] == "scifact")
    table = tables.prefilter_changes_table().splitlines()
    # scoring all is a row only where it has a measure
    assert len(table) == 2 + len(document["records"]) - 1
    prefilter.main([*arguments, "--limit", "30"])
    limited = json.loads((results / "cpu-here" / "index_prefilter.json").read_text())
    assert limited["provenance"]["command"].endswith("--queries 5 --limit 30")
    assert {one["documents"] for one in limited["records"]} == {30, 60}


def test_a_model_without_a_dual_term_is_refused(backbone_path, tmp_path, capsys):
    MixEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        prefilter.main(["--data-dir", str(tmp_path), "--device", "x", "--model", str(tmp_path / "model")])
    assert "has no dual term" in capsys.readouterr().err
