"""`mixencoder explain`: text, JSON, a picture, and errors with exit code 2."""

import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app, explain

QUERY, DOCUMENT = "how to undo a git commit", "undo the git commit in paris"


def run(*arguments: str):
    return CliRunner().invoke(app, ["explain", *arguments])


def test_text_shows_the_terms_the_texts_and_every_token(checkpoint):
    result = run(QUERY, DOCUMENT, "--model", checkpoint)
    assert result.exit_code == 0, result.output
    found = MixEncoder.from_pretrained(checkpoint).explain(QUERY, DOCUMENT)
    assert (
        f"score {found.score:.2f} = interaction {found.interaction:.2f} + dual term {found.dual:.2f}" in result.stdout
    )
    assert QUERY in result.stdout
    assert DOCUMENT in result.stdout
    assert "\x1b" not in result.stdout
    rows = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if "%" in line and "sums" not in line
    }
    state, context = found.state_attention[0].mean(0), found.context_attention[0].mean(0)[0]
    for number, token in enumerate(found.query_tokens):
        assert rows[token.text] == [f"{state[number]:.1%}", f"{context[number]:.1%}"]
    assert rows["contexts"] == [f"{context[-1]:.1%}"]


def test_on_a_terminal_the_words_with_most_weight_are_coloured(checkpoint, monkeypatch):
    written = []

    class Terminal(Console):
        def __init__(self, **options):
            super().__init__(**options, force_terminal=True, color_system="truecolor", width=200, record=True)
            written.append(self)

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(explain, "Console", Terminal)
    assert run(QUERY, DOCUMENT, "--model", checkpoint).exit_code == 0
    words = MixEncoder.from_pretrained(checkpoint).explain(QUERY, DOCUMENT).query_words()
    best = max(words, key=lambda word: word.weight)
    html = written[0].export_html(inline_styles=True)
    assert re.search(rf"color: #000000;[^>]*background-color: #f08000\">{best.text}<", html)
    assert min(words, key=lambda word: word.weight).text in html


def test_json_holds_everything(checkpoint):
    result = run(QUERY, DOCUMENT, "--json", "--model", checkpoint)
    assert json.loads(result.stdout) == MixEncoder.from_pretrained(checkpoint).explain(QUERY, DOCUMENT).as_dict()


def test_control_characters_do_not_reach_the_terminal(checkpoint):
    result = run("dog \x1b[31mcat", "\x1b]0;x\x07 mat", "--model", checkpoint)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


def test_a_picture_is_written(checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    for name in ("x.png", "x.svg"):
        assert run(QUERY, DOCUMENT, "--picture", str(tmp_path / name), "--heads", "--model", checkpoint).exit_code == 0
        assert (tmp_path / name).stat().st_size > 1000
    for name in ("x.docx", "absent/x.png"):
        result = run(QUERY, DOCUMENT, "--picture", str(tmp_path / name), "--model", checkpoint)
        assert result.exit_code == 2
        assert name in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ", DOCUMENT), "the query is empty"),
        ((QUERY, ""), "the document is empty"),
        ((QUERY, "\udc80"), "surrogate"),
        ((QUERY, DOCUMENT, "--heads"), "--picture"),
    ],
)
def test_what_cannot_be_explained_is_one_message(checkpoint, arguments, message):
    result = run(*arguments, "--model", checkpoint)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_text_without_a_token_is_an_error():
    # the bundled model's tokenizer drops this character
    result = run(QUERY, "\u200b")
    assert result.exit_code == 2
    assert "holds no token" in result.stderr
