"""Evaluation of every architecture, from Python and from the command line: what is asked of it and what is reported."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.architectures import ARCHITECTURES, engine_class
from mixencoder.cli import app
from mixencoder.errors import DataError
from mixencoder.evaluation import bootstrap, evaluate, read_task
from mixencoder.evaluation.model_scores import score_candidates
from tests.evaluation.evaluation_data import LABELLED, LABELS, LISTS, SCORED, write


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request, backbone_path):
    torch.manual_seed(1)
    labels = {"num_labels": 3, "label2id": LABELS, "id2label": {number: name for name, number in LABELS.items()}}
    options = {"dual_term": True} if request.param == "mixencoder" else {}
    return engine_class(request.param).from_backbone(
        backbone_path, heads=("ranking", "classification"), **labels, **options
    )


def test_what_is_measured_is_what_the_engine_ranks(engine, tmp_path):
    task = read_task(write(tmp_path / "dev.jsonl", LISTS))
    options = {"batch_size": 4, "show_progress_bar": False}
    scores = score_candidates(engine, task, engine.score_terms, options)
    assert set(scores) == set(engine.score_terms)
    for part, rows in scores.items():
        for row, found in zip(LISTS, rows, strict=True):
            expected = engine.predict([(row["query"], text) for text in row["candidates"]], score=part, head="ranking")
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", [name for name in ARCHITECTURES if name != "cross-encoder"], indirect=True)
def test_every_distinct_document_is_encoded_once(engine, tmp_path, monkeypatch):
    seen = []
    encode = type(engine).encode_document

    def count(self, texts, **options):
        seen.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(type(engine), "encode_document", count)
    evaluate(engine, [read_task(write(tmp_path / "dev.jsonl", LISTS))], scores=engine.score_terms)
    assert sorted(seen) == sorted({text for row in LISTS for text in row["candidates"]})


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def data(tmp_path) -> list[Path]:
    (tmp_path / "labelled.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, LABELLED)).encode()))
    lists, scored = write(tmp_path / "lists.jsonl", LISTS), write(tmp_path / "scored.jsonl", SCORED)
    return [lists, tmp_path / "labelled.jsonl.gz", scored]


def test_every_architecture_is_evaluated_from_the_command_line(engine, data, tmp_path):
    engine.save_pretrained(tmp_path / "model")
    result = run(*data, "--model", tmp_path / "model", "--json", "--run-dir", tmp_path / "runs", "--batch-size", 2)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = report["results"]
    assert {name: list(figures["full"]) for name, figures in found.items()} == {
        "lists": ["nDCG@10", "RR@10", "R@1", "R@10", "Success@1"],
        "labelled": ["accuracy", "macro-F1"],
        "scored": ["Pearson", "Spearman"],
    }
    for name, figures in found.items():
        for measure, value in figures["full"].items():
            low, high = report["intervals"][name]["full"][measure]
            assert low <= value <= high
    pairs = [(row["premise"], row["hypothesis"]) for row in LABELLED]
    predicted = engine.predict(pairs, head="classification").argmax(axis=1)
    right = [LABELS[row["label"]] == int(number) for row, number in zip(LABELLED, predicted, strict=True)]
    assert found["labelled"]["full"]["accuracy"] == pytest.approx(sum(right) / 3)
    scores = engine.predict([(row["sentence1"], row["sentence2"]) for row in SCORED], head="ranking")
    expected = stats.pearsonr(scores.astype(float), [row["score"] for row in SCORED]).statistic
    assert found["scored"]["full"]["Pearson"] == pytest.approx(expected, abs=1e-4)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lists.full.run"]
    ranked = engine.rank(LISTS[1]["query"], LISTS[1]["candidates"])
    lines = [line.split() for line in (tmp_path / "runs" / "lists.full.run").read_text().splitlines()]
    assert [line[2] for line in lines if line[0] == "1"] == [str(entry["corpus_id"]) for entry in ranked]
    architecture = report["provenance"]["architecture"]
    assert engine_class(architecture) is type(engine)
    assert {line[5] for line in lines} == {architecture}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_evaluated_untrained_and_the_same_each_time(architecture, data, backbone_path):
    arguments = (data[0], "--backbone", backbone_path, "--architecture", architecture, "--json")
    first, second = (json.loads(run(*arguments).stdout) for _ in range(2))
    assert first == second
    assert first["provenance"]["untrained"]
    assert first["provenance"]["architecture"] == architecture


def test_the_report_says_what_was_measured_with_what_and_names_no_machine(data, backbone_path, tmp_path):
    MixEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / "model")
    output = tmp_path / "new" / "report.json"
    limits = ["--limit", 2, "--sample", 7, "--max-query-length", 8, "--max-document-length", 9, "--seed", 5]
    result = run(data[0], "--model", tmp_path / "model", "--output", output, *limits)
    assert result.exit_code == 0, result.output
    assert "nDCG@10" in result.stdout
    text = output.read_text()
    provenance = json.loads(text)["provenance"]
    weights = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    expected = {
        "model": "model",
        "architecture": "mixencoder",
        "untrained": False,
        "weights_sha256": {"model.safetensors": weights},
        "queries": {"lists": 2},
        "files": {"lists": {"lists.jsonl": hashlib.sha256(data[0].read_bytes()).hexdigest()}},
        "limit": 2,
        "sample": 7,
        "max_query_length": 8,
        "max_document_length": 9,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "bootstrap": {"seed": 5, "resamples": bootstrap.RESAMPLES, "level": 0.95},
    }
    assert {name: provenance[name] for name in expected} == expected
    assert provenance["versions"]["torch"] == torch.__version__
    for folder in (tmp_path, Path.home(), Path(__file__).parents[2]):
        assert str(folder) not in text


def test_the_table_shows_figures_with_their_intervals_and_scores_side_by_side(data, backbone_path):
    result = run(*data[::2], "--backbone", backbone_path, "--score", "full", "--score", "dual")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["task", "measure", "full", "dual"]
    assert len(lines) == 1 + 5 + 2
    name, measure, *cells = lines[1].split()
    assert (name, measure, len(cells)) == ("lists", "nDCG@10", 6)
    assert cells[1].startswith("[")
    assert cells[2].endswith("]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["LISTS", "--model", "MODEL", "--score", "dual"], 'lists.jsonl cannot be scored.*"dual".*no dual term'),
        (["LISTS", "--model", "MODEL", "--score", "best"], "expected one of full, interaction, dual"),
        (["LISTS", "--backbone", "B", "--architecture", "poly-encoder", "--score", "dual"], "expected one of full"),
        (["LABELLED", "--model", "MODEL"], "labelled contradiction.*no classification head"),
        (["LISTS", "--backbone", "B", "--model", "MODEL"], "expected one of them"),
        (["LISTS", "--architecture", "deformer"], "expected --backbone"),
        (["LISTS", "--backbone", "B", "--architecture", "gpt"], "expected one of mixencoder, cross-encoder"),
        (["LISTS", "--backbone", "B", "--architecture", "deformer", "--backend", "torch"], "expected none with a def"),
        (["LISTS", "--model", "MODEL", "--sample", "3"], "expected a limit"),
        (["LISTS", "--model", "MODEL", "--measure", "nope"], "measure of nope is not known"),
        (["LISTS", "--model", "MODEL", "--max-document-length", "4096"], "expected 3 to 40 tokens"),
        (["LISTS", "--model", "MODEL", "--output", "LISTS/x.json"], "cannot be written"),
        (["SCORED", "--model", "MODEL", "--run-dir", "runs"], "none of the data are candidate lists"),
    ],
)
def test_bad_usage_ends_with_one_message_before_anything_is_scored(
    arguments, words, data, backbone_path, tmp_path, monkeypatch
):
    import re

    monkeypatch.chdir(tmp_path)
    MixEncoder.from_backbone(backbone_path).save_pretrained("saved")
    monkeypatch.setattr(MixEncoder, "encode_document", None)
    names = {"LISTS": data[0], "LABELLED": data[1], "SCORED": data[2], "MODEL": "saved", "B": backbone_path}
    result = run(*(names.get(argument, argument.replace("LISTS", str(data[0]))) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert re.search(words, result.stderr), result.stderr
    assert result.stdout == ""


def test_a_missing_extra_is_named_before_anything_is_scored(data, backbone_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    monkeypatch.setattr(MixEncoder, "encode_document", None)
    result = run(data[0], "--backbone", backbone_path)
    assert result.exit_code == 2
    assert "pip install 'mixencoder[eval]'" in result.stderr


def test_class_logits_have_no_parts(engine, data):
    with pytest.raises(DataError, match="class logits have no parts"):
        evaluate(engine, [read_task(data[1], label2id=LABELS)], scores=["interaction"])


def test_the_help_names_every_architecture():
    help_text = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "400"}).stdout
    for name in ARCHITECTURES:
        assert name in help_text
