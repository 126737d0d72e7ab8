"""The commands that read settings and training data: odd files end in one message, never in a traceback or silence."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder.cli import app
from mixencoder.cli.settings_file import parse_value, read_settings
from mixencoder.errors import DataError
from tests.training.synthetic import write


def refused(*arguments: object) -> str:
    """Return the message of a command that ends with exit code 2 and one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.output.count("error: ") == 1
    return result.output


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "line 2: aliases (*name) are not read"),
        ("output: &o x\nmodel: *o", "line 2: aliases (*name) are not read"),
        ("output: " + "[" * 500_000, "line 1: values nest deeper than 20 levels"),
        ("output: " + "{a: " * 200_000, "line 1: values nest deeper than 20 levels"),
        ("output: x\n" + "# long\n" * 200_000, "more than 1,048,576 bytes"),
        ("output: !!python/object/apply:os.system [ls]", "line 1: tags (!name) are not read"),
        ("output: !!timestamp x", "line 1: tags (!name) are not read"),
        ("output: x\noutput: y", "line 2: output is set twice"),
        ("output: x\nconfig:\n  a: 1\n  a: 2", "line 4: a is set twice"),
        ("? [a, b]\n: c", "line 1: a key is not a plain name"),
        ("5: x", "the field 5 is not a name"),
        ("steps: " + "9" * 5000, "cannot be read"),
        ("output:\tx\n\ty: z", "line 1: found character"),
        ("output: [", "line 1: "),
        ("[1, 2]", "holds a list; expected fields with values"),
        ("", "holds a NoneType; expected fields with values"),
        ("just text", "holds a str"),
        ("a: 1\n---\nb: 2", "line 2: "),
        ("output: x\nstepps: 5", "unknown fields stepps; expected some of"),
        ("output: x\ndata: [5]", "data entry 5 is a int"),
        ("output: x\ndata: p\nseed: -1", "seed is -1; expected"),
        ("output: x\ndata: p\nsteps: null", "steps is None; expected"),
        ("output: x\ndata: p\nlearning_rate: .nan", "learning_rate is nan"),
        ("output: x\ndata: p\nlearning_rate: .inf", "learning_rate is inf"),
        ("output: [x]\ndata: p", "output is ['x']; expected a path"),
        ("output: x\ndata: p\nbf16: maybe", "bf16 is 'maybe'"),
        ("output: x\ndata: p\nconfig: [1]", "config is [1]; expected fields with values"),
        ("output: 2020-02-31\ndata: [{source: 1}]", "source of data is 1"),
        ("output: x\ndata: {p: 1}", "expected source, weight, task, name"),
        ("output: x", "no training data are named"),
    ],
)
def test_odd_settings_are_refused_by_file_and_place(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = Path("settings.yaml")
    path.write_text(text)
    start = time.monotonic()
    found = refused("train", "--config", path)
    assert time.monotonic() - start < 30
    assert message in found
    assert "settings.yaml" in found
    assert [entry.name for entry in tmp_path.iterdir()] == ["settings.yaml"]


def test_settings_that_are_no_text_or_no_file_are_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    for raw, message in ((b"output: \xff", "utf-8"), (b"output: \0", "special characters are not allowed")):
        path.write_bytes(raw)
        assert message in refused("train", "--config", path)
    assert "Is a directory" in refused("train", "--config", tmp_path)
    assert "No such file" in refused("train", "--config", tmp_path / "none.yaml")


def test_plain_settings_are_read_as_they_stand(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("\ufeffoutput: ~/x\nsteps: 5\ndata: [{source: a, weight: 2}]\nconfig: {a: 2020-02-31, b: null}\n")
    fields = read_settings(path)
    assert fields == {
        "output": "~/x",
        "steps": 5,
        "data": [{"source": "a", "weight": 2}],
        "config": {"a": "2020-02-31", "b": None},
    }
    assert parse_value("true", "") is True
    with pytest.raises(DataError, match="--set x, line 1: "):
        parse_value("[", "--set x")


def test_a_flag_that_cannot_be_read_is_refused(tmp_path):
    arguments = ["train", "--data", "p", "--output", tmp_path / "out", "--set"]
    for text, message in (
        ("x=[", "--set x"),
        ("x", "expected NAME=VALUE"),
        ("x=*a", "aliases"),
        ("no_such=1", "no_such"),
    ):
        data = write(tmp_path / "p.jsonl", [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}])
        arguments[2] = data
        assert message in refused(*arguments, text)
    assert not (tmp_path / "out.unfinished").exists()


GOOD = '{"query": "cat", "positive": "the cat"}\n{"query": "dog", "positive": "the dog"}\n'
ODD = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "list.jsonl": b"[1, 2]\n",
    "cut.jsonl": GOOD.encode() + b'{"query": "a", "positi',
    "latin.csv": "query,positive\ncafé,crème\n".encode("latin-1"),
    "zero.jsonl": b"\0" * 100,
    "half.jsonl": b'{"query": "a \\ud83d", "positive": "b"}\n',
    "no.jsonl.gz": b"not gzip",
    "no.parquet": b"PAR1 not parquet PAR1",
    "ragged.csv": b"query,positive\na,b,c\n",
    "header.tsv": b"query\tpositive\n",
    "numbers.jsonl": b'{"query": 1, "positive": 2}\n',
    "nested.jsonl": b'{"query": "a", "positive": {"text": "b"}}\n',
    "blank_texts.csv": b"query,positive\n,\n",
    "labels.jsonl": b'{"query": "a", "candidates": ["b", "c"], "labels": [1]}\n',
    "notes.txt": b"a\n",
    "blank_lists.jsonl": b'{"query": "a", "candidates": [" "], "labels": [1]}\n',
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_data_file_is_refused_by_its_name_in_every_command(tmp_path, checkpoint, name):
    path = tmp_path / name
    path.write_bytes(ODD[name])
    output = tmp_path / "out"
    commands = [
        ["train", "--data", path, "--model", checkpoint, "--output", output],
        ["mine", path, "--model", checkpoint, "--output", output.with_suffix(".jsonl")],
        ["calibrate", path, "--model", checkpoint],
    ]
    before = json.loads(Path(checkpoint, "config.json").read_text())
    for command in commands:
        assert name.split(".")[0] in refused(*command), command
    assert json.loads(Path(checkpoint, "config.json").read_text()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_run_says_what_it_learns_from_and_where_the_model_is(tmp_path, backbone_path):
    data = write(tmp_path / "pairs.jsonl", [{"left": w, "right": f"the {w}"} for w in ("cat", "dog", "pot")])
    arguments = ["train", "--data", data, "--backbone", backbone_path, "--output", tmp_path / "out", "--steps", 1]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert f"warning: {data}: columns are read by their order" in result.output
    assert "pairs: 3 examples, ranking" in result.output
    assert f"saved to {tmp_path / 'out'}" in result.output


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_run_that_is_ended_early_or_late_says_what_is_left(tmp_path, monkeypatch, is_saved):
    output = tmp_path / "out"

    def stop(_):
        if is_saved:
            output.mkdir()
            (output / "training.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("mixencoder.training.run.train", stop)
    result = CliRunner().invoke(app, ["train", "--data", "pairs.jsonl", "--output", str(output)])
    assert result.exit_code == 130
    left = f"the model was saved to {output} before" if is_saved else "there was no checkpoint yet (save_every)"
    assert f"interrupted: {left}" in result.output
