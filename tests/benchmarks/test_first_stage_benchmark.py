"""The benchmark of first stages: an exact one finds all that the prefilter finds, and the command runs to its end."""

import json

import pytest
import torch

from benchmarks.index import first_stage
from benchmarks.report import index_tables
from mixencoder import MixEncoder
from mixencoder.first_stage.libraries import LIBRARIES
from tests.benchmarks.test_prefilter_benchmark import write
from tests.conftest import WORDS
from tests.first_stage.first_stages import ExactLibrary


class Half(ExactLibrary):
    """Finds every second one of the best."""

    kind = "half"

    def search(self, vectors, count):
        found = super().search(vectors, count)
        found[:, 1::2] = -1
        return found


@pytest.fixture
def model(backbone_path, tmp_path):
    torch.manual_seed(0)
    engine = MixEncoder.from_backbone(backbone_path, dual_term=True, dual_scale_init=0.5)
    engine.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    pairs = [{"query": f"{one} {other}", "positive": f"{other} {one} rice"} for one in WORDS for other in WORDS]
    write(tmp_path / "data" / "dialogue" / "ubuntu_irc.train.jsonl.gz", pairs)
    write(tmp_path / "data" / "dialogue" / "ubuntu_irc_1in10.dev.jsonl.gz", pairs[:5])
    answers = [{"query": pair["query"], "positive": f"{pair['positive']} water"} for pair in pairs]
    write(tmp_path / "data" / "answers" / "medquad.train.jsonl.gz", answers)
    return tmp_path / "data"


def test_the_command_writes_a_record_and_its_table(model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "exact", ExactLibrary)
    monkeypatch.setitem(LIBRARIES, "half", Half)
    monkeypatch.setattr(first_stage, "KINDS", {"all": {"kind": "exact"}, "some": {"kind": "half"}})
    monkeypatch.setattr(first_stage, "ROOT", tmp_path)
    monkeypatch.setattr(first_stage, "interleaved_samples", lambda calls, **_: {name: [0.5] for name in calls})
    results = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(index_tables, "RESULTS", results)
    assert index_tables.first_stage_table().startswith("Not recorded yet")
    arguments = [
        "--data-dir",
        data,
        "--device",
        "cpu-here",
        "--model",
        model,
        "--queries",
        4,
        "--cache",
        tmp_path / "c",
    ]
    arguments = list(map(str, arguments))
    first_stage.main([*arguments, "--encode-only"])
    assert not results.exists()
    first_stage.main(arguments)
    document = json.loads((results / "cpu-here" / "index_first_stage.json").read_text())
    exact, everything, some = document["records"]
    assert exact == {
        "documents": 2 * len(WORDS) ** 2,
        "queries": 4,
        "fully_scored": 128,
        "stage": first_stage.EXACT,
        "choice_seconds": 0.125,
        "rank_seconds": 0.125,
    }
    assert (everything["recall"], everything["least_recall"], everything["other_set"]) == (1, 1, 0)
    assert (some["recall"], some["least_recall"]) == (0.5, 0.5)
    assert some["other_set"] > 0
    assert some["bytes"] > 32 * 4
    table = index_tables.first_stage_table().splitlines()
    assert table[0] == "cpu-here:"
    assert len(table) == 2 + 2 + 3
    with pytest.raises(SystemExit, match="holds other documents; delete it"):
        first_stage.main([*arguments, "--limit", "50"])


def test_a_model_without_a_dual_term_is_refused(backbone_path, data, tmp_path, capsys):
    MixEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit):
        first_stage.main(["--data-dir", str(data), "--device", "x", "--model", str(tmp_path / "plain")])
    assert "has no dual term" in capsys.readouterr().err
