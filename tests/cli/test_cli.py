"""The command line as its user meets it: files, tables, JSON, errors with exit code 2 and no traceback."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.architectures import ARCHITECTURES, engine_class, load_engine
from mixencoder.cli import app
from mixencoder.data.candidates import read_candidates
from mixencoder.errors import DataError

LINES = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france"]


@pytest.fixture
def lines(tmp_path) -> str:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([LINES[0], "", *LINES[1:]]) + "\n")
    return str(path)


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_rank_prints_a_table_and_the_times_apart(checkpoint, lines):
    result = run("rank", "undo a commit", "--candidates", lines, "--model", checkpoint)
    assert result.exit_code == 0, result.output
    for line in LINES:
        assert line in result.stdout
    assert "encoding 3 candidates" in result.stderr
    assert "ranking" in result.stderr
    assert "ms" not in result.stdout


def test_square_brackets_of_a_query_are_printed_as_they_are(checkpoint, lines):
    result = run("rank", "a[0] [/b]", "--candidates", lines, "--model", checkpoint)
    assert result.exit_code == 0, result.output
    assert "“a[0] [/b]”" in result.stdout


def test_json_alone_stands_on_stdout(checkpoint, lines):
    result = run("rank", "undo a commit", "--candidates", lines, "--json", "--top-k", "2", "--model", checkpoint)
    ranking = json.loads(result.stdout)
    assert len(ranking) == 2
    assert set(ranking[0]) == {"corpus_id", "score", "text"}
    assert ranking[0]["score"] >= ranking[1]["score"]
    assert LINES[ranking[0]["corpus_id"]] == ranking[0]["text"]
    expected = MixEncoder.from_pretrained(checkpoint).rank("undo a commit", LINES, top_k=2)
    assert [entry["corpus_id"] for entry in ranking] == [entry["corpus_id"] for entry in expected]


def test_candidates_from_standard_input(checkpoint):
    result = run("rank", "git", "--candidates", "-", "--json", "--model", checkpoint, stdin="\n".join(LINES))
    assert {entry["text"] for entry in json.loads(result.stdout)} == set(LINES)


def test_every_kind_of_file(tmp_path):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text('{"text": "x", "id": "one"}\n\n{"text": "y", "id": 2}\n')
    assert read_candidates(str(jsonl))[:2] == (["x", "y"], ["one", "2"])
    table = tmp_path / "a.csv"
    table.write_text('\ufeffid,body,other\n1,"x, with\nline",z\n2,y,z\n', encoding="utf-8")
    assert read_candidates(str(table), column="body")[:2] == (["x, with\nline", "y"], ["1", "2"])
    table = tmp_path / "a.tsv"
    table.write_text("text\tother\nx\t1\n")
    assert read_candidates(str(table))[:2] == (["x"], None)
    single = tmp_path / "single.csv"
    single.write_text("anything\nx\ny\n")
    assert read_candidates(str(single))[:2] == (["x", "y"], None)


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.txt", b"fine\nbad \xff line\n", None, "line 2: not UTF-8 (byte 0xff at column 5)"),
        ("a.txt", b"\n\n", None, "holds no candidate"),
        ("a.csv", b"one,two\nx,y\n", None, "has no column 'text'; its columns are one, two"),
        ("a.csv", b"one,two\nx,y\n", "three", "has no column 'three'; its columns are one, two"),
        ("a.csv", b"one,two\nx\n", "one", "line 2: 1 fields; expected 2"),
        ("a.csv", b"", "one", "holds no candidate"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', None, 'line 2: no string in "text", fields are body'),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', None, "line 2: a JSON list; expected an object"),
        ("a.jsonl", b'{"text": "x"}\nx\n', None, "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x", "id": 1}\n{"text": "y"}\n', None, 'line 2: no "id", but candidates before'),
        ("a.pdf", b"x", None, "'.pdf' are not read; expected .txt, .jsonl"),
        ("a.txt", b"x", "text", "column 'text' was given, but a txt file has no columns"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, column, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_candidates(str(path), column=column)
    assert words in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rank", " ", "--candidates", "LINES"], "the query is empty"),
        (["rank", "a", "--candidates", "missing.txt"], "missing.txt cannot be read"),
        (["rank", "a", "--candidates", "LINES", "--model", "missing"], "cannot be loaded|is not a directory"),
        (["rank", "a", "--candidates", "LINES", "--model", "MODEL", "--dtype", "float3"], "dtype 'float3'"),
        (["rank", "a", "--candidates", "LINES", "--model", "MODEL", "--device", "warp"], "device 'warp'"),
        (["rank", "a", "--candidates", "LINES", "--model", "MODEL", "--backend", "x"], "no backend 'x'"),
        (["rank", "a", "--candidates", "LINES", "--top-k", "0"], "top-k"),
        (["rank", "a"], "candidates"),
        (["frobnicate"], "frobnicate"),
        (["evaluate", "missing.jsonl", "--model", "MODEL"], "missing.jsonl is neither a file nor a folder"),
        (["train", "--data", "x"], "no output directory"),
        (["train", "--config", "missing.yaml"], "missing.yaml cannot be read"),
    ],
)
def test_errors_end_with_exit_code_2_and_one_message(checkpoint, lines, arguments, words, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    filled = [{"LINES": lines, "MODEL": checkpoint}.get(argument, argument) for argument in arguments]
    result = run(*filled)
    assert result.exit_code == 2, result.output
    assert re.search(words, result.stderr), result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_unknown_fields_of_a_training_file_are_named(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("output: out\nstep: 5\n")
    result = run("train", "--config", str(path))
    assert result.exit_code == 2
    assert "unknown fields step" in result.stderr


def test_train_then_evaluate(tmp_path, backbone_path, words):
    pairs = [{"query": f"the {word}", "positive": f"{word} a"} for word in words]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "train.yaml").write_text("steps: 2\nbatch_size: 4\nconfig:\n  dual_term: true\ndata: [pairs.jsonl=2]\n")
    where = ["--data-dir", str(tmp_path), "--backbone", str(backbone_path), "--output", str(tmp_path / "out")]
    result = run("train", "--config", str(tmp_path / "train.yaml"), *where)
    assert result.exit_code == 0, result.output
    rank = [{"query": "the cat", "candidates": ["cat a", "boil water"], "labels": [1, 0]}]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rank)))
    options = ["--model", str(tmp_path / "out"), "--score", "full", "--score", "dual", "--measure", "RR@10"]
    result = run("evaluate", str(tmp_path / "dev.jsonl"), *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["results"]["dev"]["full"]) == {"RR@10"}
    assert report["provenance"]["queries"] == {"dev": 1}
    table = run("evaluate", str(tmp_path / "dev.jsonl"), *options)
    assert "dual" in table.stdout
    untrained = run("evaluate", str(tmp_path / "dev.jsonl"), "--backbone", str(backbone_path), "--score", "dual")
    assert untrained.exit_code == 0


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> dict[str, str]:
    """Training files of three kinds, and what to evaluate on."""
    folder = tmp_path_factory.mktemp("lessons")
    texts = ["cook rice", "undo the commit", "boil water", "the cat sat", "a dog", "paris is the capital"]
    rows = {
        "pairs": [{"query": text, "positive": f"{text} the"} for text in texts],
        "nli": [{"premise": text, "hypothesis": "a", "label": "xy"[i % 2]} for i, text in enumerate(texts)],
        "sts": [{"sentence1": text, "sentence2": "a", "score": i} for i, text in enumerate(texts)],
        "dev": [{"query": text, "candidates": texts, "labels": [int(text == t) for t in texts]} for text in texts],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_set_of_flags_trains_and_evaluates_every_architecture(tmp_path, backbone_path, lessons, architecture):
    data = [word for name in ("pairs", "nli", "sts") for word in ("--data", lessons[name])]
    flags = ["--backbone", str(backbone_path), "--steps", "3", "--batch-size", "3", "--mini-batch-size", "2"]
    result = run("train", "--architecture", architecture, *data, *flags, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    model = load_engine(tmp_path / "out")
    assert type(model) is engine_class(architecture)
    assert model.config.heads == ["ranking", "classification"]
    result = run("evaluate", lessons["dev"], lessons["nli"], lessons["sts"], "--model", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]
    # nDCG@10 written out: one right document, whose place counts all others that score at least as much
    rows = [json.loads(line) for line in Path(lessons["dev"]).read_text().splitlines()]
    gains = []
    for row in rows:
        scores = model.predict([(row["query"], text) for text in row["candidates"]], head="ranking")
        place = int((scores >= scores[row["labels"].index(1)]).sum())
        gains.append(1 / math.log2(place + 1))
    assert found["dev"]["full"]["nDCG@10"] == pytest.approx(sum(gains) / len(gains), abs=1e-6)
    assert set(found) == {"dev", "nli", "sts"}


def test_mined_negatives_and_a_teacher_come_from_the_command_line(tmp_path, backbone_path, lessons):
    start = ["--backbone", str(backbone_path), "--steps", "1", "--batch-size", "3", "--output"]
    teach = ["train", "--architecture", "cross-encoder", "--data", lessons["pairs"], *start, str(tmp_path / "teacher")]
    dual = ["train", "--architecture", "dual-encoder", "--data", lessons["pairs"], *start, str(tmp_path / "miner")]
    mined = str(tmp_path / "mined.jsonl")
    mine = ["mine", lessons["pairs"], "--model", str(tmp_path / "miner"), "--negatives", "2", "--output", mined]
    for arguments in (teach, dual, mine):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    distil = ["train", "--data", mined, "--teacher", str(tmp_path / "teacher"), "--distillation-weight", "1", *start]
    students = []
    for how in ("kl", "margin-mse"):
        result = run(*distil, str(tmp_path / how), "--distillation", how)
        assert result.exit_code == 0, result.output
        students.append(load_engine(tmp_path / how).model.state_dict())
        assert json.loads((tmp_path / how / "training.json").read_text())["settings"]["teacher"] == "teacher"
    assert any(not torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())


def test_info_says_which_backend_and_why():
    result = run("info")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "backend triton", "backend auto", "default model"):
        assert word in result.stdout


def test_python_dash_m_works_and_says_which_extra_is_missing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "mixencoder", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "rank" in done.stdout
    code = "import sys; sys.modules['rich'] = None; from mixencoder.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "pip install 'mixencoder[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
