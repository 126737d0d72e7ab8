"""`mixencoder demo`: the bundled list, one query, queries from standard input, and a terminal that asks."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app
from mixencoder.cli.demo import ANSWERS

EVERYDAY = {
    "How do I undo my last git commit?": "git reset --soft HEAD~1",
    "What is the capital of Australia?": "Canberra",
    "how long should I boil an egg": "six minutes",
    "my wifi does not work": "Restart the router",
    "why is the sky blue": "Air scatters",
}


def run(*arguments: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(app, ["demo", *arguments], input=stdin)


def test_the_list_has_a_hundred_different_short_answers():
    answers = ANSWERS.read_text(encoding="utf-8").splitlines()
    assert 50 <= len(set(answers)) == len(answers)
    assert all(10 < len(answer) <= 110 for answer in answers)


def test_the_bundled_model_finds_the_answers_of_everyday_questions():
    result = run("--top-k", "3", stdin="".join(f"{query}\n" for query in EVERYDAY))
    assert result.exit_code == 0, result.output
    tables = result.stdout.split("“")[1:]
    assert len(tables) == len(EVERYDAY)
    for table, (query, answer) in zip(tables, EVERYDAY.items(), strict=True):
        title, _, *rows = table.strip().splitlines()
        assert title.startswith(query)
        assert answer in " ".join(" ".join(rows).split())
    # the list is encoded once, and every query is timed
    assert result.stderr.count("encoded, once,") == 1
    assert result.stderr.count("answers ranked in") == len(EVERYDAY)


def test_one_query_asks_for_no_more(checkpoint):
    result = run("--query", "undo", "--top-k", "2", "--model", checkpoint, stdin="never read\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip().splitlines()) == 4
    assert "never read" not in result.stdout


def test_an_empty_line_ends_it(checkpoint):
    result = run("--model", checkpoint, stdin="rice\n\nparis\n")
    assert result.exit_code == 0, result.output
    assert "“rice”" in result.stdout
    assert "“paris”" not in result.stdout


def test_a_calibrated_model_shows_probabilities(checkpoint, tmp_path):
    model = MixEncoder.from_pretrained(checkpoint)
    assert "probability" not in run("--query", "rice", "--model", checkpoint).stdout
    model.config.calibration = {"temperature": 2.0, "bias": 0.0}
    model.save_pretrained(tmp_path / "calibrated")
    result = run("--query", "rice", "--model", str(tmp_path / "calibrated"))
    assert "probability" in result.stdout
    assert "%" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["--query", " "], None, "the query is empty"),
        (["--top-k", "0"], None, "top-k"),
        ([], b"rice\n\xff\n", "standard input, line 2: not UTF-8"),
    ],
)
def test_errors_end_with_exit_code_2_and_one_message(checkpoint, arguments, stdin, words):
    result = run("--model", checkpoint, *arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_terminal_asks_until_ctrl_d():
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "mixencoder", "demo", "--top-k", "1"]
    pipes = {"stdin": its_end, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        # typed ahead: two queries, the first of which has no token, then ctrl-d at the start of a line
        os.write(terminal, "\u200b\nrice\n\x04".encode())
        output, messages = process.communicate(timeout=300)
    os.close(its_end)
    os.close(terminal)
    assert process.returncode == 0, messages.decode()
    assert output.decode().count("query:") == 3
    assert "“rice”" in output.decode()
    assert "the query '\\u200b' holds no token" in messages.decode()
