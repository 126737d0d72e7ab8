"""Texts without a token in every command: read in the same way, with a warning, or refused with --on-empty error."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app

BLANK = "  "


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    path = tmp_path / "answers.data"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("boil the rice", BLANK, "the dog")))
    return path


def test_an_index_reads_them_or_refuses_them_and_takes_a_format(checkpoint, candidates, tmp_path):
    options = ["--candidates", candidates, "--format", "jsonl", "--model", checkpoint]
    code, output = run("index", "build", tmp_path / "index", *options)
    assert code == 0, output
    assert "1 of 3 documents hold no token" in output
    with MixEncoder.from_pretrained(checkpoint).open_index(tmp_path / "index") as index:
        assert len(index) == 3
    code, output = run("index", "build", tmp_path / "strict", *options, "--on-empty", "error")
    assert code == 2
    assert "document 1 holds no token" in output
    code, output = run("index", "add", tmp_path / "index", *options, "--on-empty", "nothing")
    assert code == 2
    assert "expected one of special, error" in output


def test_a_model_learns_from_data_that_hold_one(checkpoint, tmp_path):
    data = tmp_path / "pairs.jsonl"
    rows = [("cook rice", "boil the rice"), ("the dog", BLANK), ("undo a git commit", "git reset"), (BLANK, "a cat")]
    data.write_text(
        "".join(json.dumps({"sentence1": a, "sentence2": b, "score": n}) + "\n" for n, (a, b) in enumerate(rows))
    )
    options = ["--data", data, "--model", checkpoint, "--steps", 2, "--batch-size", 4]
    code, output = run("train", *options, "--output", tmp_path / "out")
    assert code == 0, output
    assert "2 texts hold no token" in output
    assert "pairs.jsonl, line 2" in output
    MixEncoder.from_pretrained(tmp_path / "out")
    code, output = run("train", *options, "--output", tmp_path / "strict", "--on-empty", "error")
    assert code == 2
    assert "line 2: '  ' holds no token" in output
    assert not (tmp_path / "strict").exists()
