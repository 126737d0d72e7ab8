"""The command line's manners: what reaches a terminal, warnings, interruption, closed pipes, encodings, widths."""

import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mixencoder.base.empty_texts import Suspect, report_tokenless
from mixencoder.cli import app
from mixencoder.cli.messages import notice, say
from mixencoder.cli.shared import ModelOption, command, print_json, print_ranking
from mixencoder.errors import EmptyTextWarning, InputError, TruncationWarning

ROOT = Path(__file__).parents[2]
RED = "red \x1b[31mdog\x1b[0m \x9b1m \u202ebark\x7f"


def outcome(function, *arguments: str, **options):
    """Run a function as a command of the command line."""
    one = typer.Typer()
    one.command()(command(function))
    return CliRunner().invoke(one, list(arguments), **options)


def script(code: str, **options) -> subprocess.Popen:
    """Start a process that has the command line's parts and no model."""
    code = f"import sys\nfrom mixencoder.cli.shared import *\nfrom mixencoder.cli.messages import *\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def test_control_characters_never_reach_a_terminal():
    def show():
        print_ranking(RED, [{"score": 1.0, "id": RED, "text": RED}])
        say(RED)
        warnings.warn(RED, stacklevel=1)
        raise InputError(RED)

    result = outcome(show)
    assert result.exit_code == 2
    for stream, times in ((result.stdout, 3), (result.stderr, 3)):
        assert stream.count("[31mdog") == times
        assert not set(stream) & set("\x1b\x9b\x7f\u202e")


def test_json_keeps_control_characters_as_escapes():
    result = outcome(lambda: print_json([{"text": RED}]))
    assert json.loads(result.stdout) == [{"text": RED}]
    assert not set(result.stdout) & set("\x1b\x9b\x7f\u202e")
    assert "ü" in outcome(lambda: print_json("ü")).stdout


def test_json_knows_no_nan():
    result = outcome(lambda: print_json({"value": float("nan")}))
    assert result.exit_code == 2
    assert "cannot be written as JSON" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_escapes(encoding, monkeypatch):
    code = """
@command
def show():
    print_ranking("né ł", [{"score": 1.0, "text": "日本 😀"}])
    print_json("ł😀")
    say("ł")
    raise InputError("“ł”")
try:
    show()
except typer.Exit as stop:
    sys.exit(stop.exit_code)
"""
    process = script(code, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 2, messages
    assert b"\\u65e5\\u672c \\U0001f600" in output
    assert json.loads(output.splitlines()[-1]) == "ł😀"
    assert messages.splitlines() == [b"\\u0142", b"error: \\u201c\\u0142\\u201d"]


def test_a_closed_pipe_ends_it_quietly():
    code = """
app = typer.Typer()
@app.command()
@command
def show():
    for _ in range(10_000):
        print_ranking("a", [{"score": 1.0, "text": "word " * 20}])
app()
"""
    process = script(code)
    process.stdout.readline()
    process.stdout.close()
    messages = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert messages == b""


def test_ctrl_c_ends_with_130_and_one_line():
    code = """
import time
app = typer.Typer()
@app.command()
@command
def show():
    print("ready", flush=True)
    time.sleep(60)
app()
"""
    process = script(code)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages == b"interrupted\n"


def raiser(error: BaseException):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("no good"), "error: no good"),
        (MemoryError(), "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "error: out of memory"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied"),
    ],
)
def test_what_is_the_users_or_the_machines_is_one_line(error, words):
    result = outcome(raiser(error))
    assert result.exit_code == 2
    assert result.stderr.startswith(words)
    assert result.stderr.count("\n") == 1


def test_an_error_of_the_program_itself_stays_one():
    assert isinstance(outcome(raiser(RuntimeError("a bug"))).exception, RuntimeError)


def test_warnings_are_said_once_a_kind_with_their_final_count():
    logger = logging.getLogger("mixencoder.anything")

    def work():
        for cut in (1, 2):
            text = f"{cut},000 of 4,000 documents are longer than 9 tokens; the first is {cut}"
            warnings.warn(text, TruncationWarning, stacklevel=1)
            warnings.warn("2 of 4 queries are odd", UserWarning, stacklevel=1)
            warnings.warn(f"{cut} texts are odd", UserWarning, stacklevel=1)
            warnings.warn("no\n  count", UserWarning, stacklevel=1)
            logger.warning("%s: %d rows are odd", "FILE", 3)

    result = outcome(work)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "warning: no count",
        "warning: FILE: 3 rows are odd",
        "warning: 3,000 of 8,000 documents are longer than 9 tokens; the first is 1",
        "warning: 4 of 8 queries are odd",
        "warning: 3 texts are odd",
    ]


def test_of_texts_without_a_token_the_warning_that_knows_the_place_is_said():
    def work():
        for place in ("a.csv, line 3", "b.csv, line 9"):
            report_tokenless(lambda texts, **_: {"input_ids": [[]]}, [Suspect(place, " ")])
        warnings.warn("1,001 of 2,000 documents hold no token; the first is 5", EmptyTextWarning, stacklevel=1)

    (line,) = outcome(work).stderr.splitlines()
    assert line.startswith("warning: 2 texts hold no token and are read as")
    assert line.endswith("; the first: a.csv, line 3")


def test_warnings_come_before_the_error():
    def work():
        warnings.warn("3 of 4 texts are odd", UserWarning, stacklevel=1)
        raise InputError("no good")

    assert outcome(work).stderr.splitlines() == ["warning: 3 of 4 texts are odd", "error: no good"]


def test_a_command_leaves_python_as_it_was():
    before = warnings.showwarning, list(warnings.filters), list(logging.getLogger("mixencoder").handlers)
    outcome(lambda: None)
    outcome(raiser(InputError("no good")))
    assert (warnings.showwarning, list(warnings.filters), list(logging.getLogger("mixencoder").handlers)) == before


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    def show(
        query: str, data: list[Path], model: ModelOption = None, output: Path | None = None, name: str = "~/x"
    ) -> None:
        seen.append((query, data, model, output, name))

    result = outcome(show, "~/q", "~/a", "b", "--model", "~/m", "--output", "~/o")
    assert result.exit_code == 0, result.output
    assert seen == [("~/q", [tmp_path / "a", Path("b")], str(tmp_path / "m"), tmp_path / "o", "~/x")]
    result = outcome(show, "q", "~nobody-of-this-name/a")
    assert result.exit_code == 2
    assert "no home folder is known for ~nobody-of-this-name/a" in result.stderr


@pytest.mark.parametrize("width", [1, 3, 8, 16, 40])
def test_a_narrow_terminal_gets_all_that_fits(width):
    results = [{"score": 12.25, "text": "some words thataretoolongforaline"}]
    result = outcome(lambda: print_ranking("a query", results), env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert "\x1b" not in result.stdout
    if width > 12:
        lines = result.stdout.splitlines()
        assert "12.25" in result.stdout
        cells = "".join(line[10:].strip() for line in lines[lines.index(next(x for x in lines if "12.25" in x)) :])
        assert cells.replace(" ", "") == "somewordsthataretoolongforaline"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_notice_is_shown_on_a_terminal_alone_and_taken_back(monkeypatch):
    for stream, expected in ((Terminal(), "loading ...\r           \r"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with notice("loading ..."):
            assert stream.getvalue() == expected[:11]
        assert stream.getvalue() == expected


def test_a_message_takes_the_place_of_a_notice(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with notice("loading ..."):
        say("a warning")
    assert sys.stderr.getvalue() == "loading ...\r           \ra warning\n"


def test_closed_streams_are_written_to_by_nobody():
    code = """
@command
def show():
    with notice("loading ..."):
        say("a")
    print_json("b")
    print_ranking("a", [{"score": 1.0, "text": "c"}])
    sys.exit(3)
show()
"""
    process = script(code, preexec_fn=lambda: os.closerange(1, 3))
    assert process.wait(timeout=60) == 3
    process.stdout.close()
    process.stderr.close()


def test_rank_says_that_it_loads_before_it_imports_a_model(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    terminal, its_end = pty.openpty()
    code = f"""
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.stderr.flush()
            import os
            os._exit(7)
sys.meta_path.insert(0, Watch())
from mixencoder.cli import app
app(["rank", "a", "--candidates", {str(tmp_path / "a.txt")!r}])
"""
    process = script(code, stderr=its_end)
    assert process.wait(timeout=60) == 7
    assert os.read(terminal, 1000) == b"loading ..."
    process.stdout.close()
    os.close(its_end)
    os.close(terminal)


def last_line(result) -> str:
    """What a command said last; a bar of transformers may stand before, where a test imported it first."""
    return result.stderr.splitlines()[-1]


def run(*arguments: str, **options):
    result = CliRunner().invoke(app, list(map(str, arguments)), **options)
    assert "Traceback" not in result.output
    return result


def test_rank_reads_other_names_and_standard_input_by_format(tmp_path, checkpoint):
    path = tmp_path / "odd.name"
    path.write_text('{"text": "the cat", "id": "x"}\n{"text": "a dog", "id": "y"}\n')
    for source, options in ((path, {}), ("-", {"input": path.read_text()})):
        found = run(
            "rank", "cat", "--candidates", source, "--format", "jsonl", "--json", "--model", checkpoint, **options
        )
        assert found.exit_code == 0, found.output
        assert {entry["id"] for entry in json.loads(found.stdout)} == {"x", "y"}
    refused = run("rank", "cat", "--candidates", path, "--format", "xml", "--model", checkpoint)
    assert refused.exit_code == 2
    assert "format is 'xml'; expected one of txt, jsonl, csv, tsv, parquet" in refused.stderr
    both = run("rank", "cat", "--index", tmp_path, "--format", "csv")
    assert "--column and --format are for --candidates" in both.stderr


def test_texts_without_a_token_are_refused_with_their_place_where_asked(tmp_path, checkpoint):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,the cat\n2," "\n')
    result = run("rank", "cat", "--candidates", path, "--on-empty", "error", "--model", checkpoint)
    assert result.exit_code == 2
    assert last_line(result).startswith(f"error: {path}, line 3 (id 2): ' ' holds no token; expected some text")
    rows = [{"query": "cat", "candidates": ["the cat", ""], "labels": [1, 0]}]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("evaluate", tmp_path / "dev.jsonl", "--on-empty", "error", "--model", checkpoint)
    assert result.exit_code == 2
    assert f"{tmp_path}/dev.jsonl, line 1, candidate 1: '' holds no token" in result.stderr
    for name in ("rank", "evaluate"):
        options = ["q", "--candidates", path] if name == "rank" else [tmp_path / "dev.jsonl"]
        assert "expected one of special, error" in run(name, *options, "--on-empty", "drop").stderr


@pytest.mark.parametrize("query", ["", " \t", "\udcff", "  "])
def test_a_query_without_text_is_an_error(tmp_path, checkpoint, query):
    (tmp_path / "a.txt").write_text("a\n")
    result = run("rank", query, "--candidates", tmp_path / "a.txt", "--model", checkpoint)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the query ")


@pytest.mark.parametrize("place", ["data.jsonl", "data.jsonl/x.json", "/proc/none/x.json", ""])
def test_an_output_that_cannot_be_is_one_line_before_anything_is_scored(tmp_path, checkpoint, place, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text('{"query": "cat", "candidates": ["the cat", "a dog"], "labels": [1, 0]}\n')
    monkeypatch.setattr("mixencoder.evaluation.evaluate", None)
    result = run("evaluate", path, "--model", checkpoint, "--output", tmp_path / place)
    assert result.exit_code == 2
    assert last_line(result).startswith("error: ")
    assert path.read_text().startswith('{"query"')
