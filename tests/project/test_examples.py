"""The programs of docs/examples, run as a reader runs them, with the bundled model."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [name])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out

    return run


def test_search_results_that_help_move_up(run):
    names, printed = run("rerank_search_results.py")
    passages, found = names["PASSAGES"], names["keyword_search"](names["QUERY"], names["PASSAGES"])
    reranked = [line.split("  ", 2)[-1].strip() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    reranked = [next(passage for passage in passages if line.endswith(passage)) for line in reranked]
    assert sorted(reranked) == sorted(passages)
    # every second passage is advice on storing bread; the others share its words
    advice = set(passages[::2])
    assert len(advice & set(found[:5])) <= 1
    assert len(advice & set(reranked[:5])) > len(advice & set(found[:5]))
    assert reranked[0] in advice


def test_the_customer_gets_fitting_replies(run):
    names, printed = run("pick_a_reply.py")
    replies = [line.split("  ", 1)[1].strip() for line in printed.splitlines() if line.startswith("reply")]
    fitting = ["reset your password", "spam folder", "Glad to hear", "arrived broken"]
    assert len(replies) == len(names["CUSTOMER"]) == len(fitting)
    for reply, words in zip(replies, fitting, strict=True):
        assert words in reply


def test_hypotheses_are_classified(run):
    names, printed = run("classify_nli.py")
    hypotheses = names["HYPOTHESES"]
    _, _, header, *rows = printed.splitlines()
    assert sorted(header.split()) == ["contradiction", "entailment", "neutral"]
    assert len(rows) == len(hypotheses)
    found = {hypothesis: row.split()[3] for hypothesis, row in zip(hypotheses, rows, strict=True)}
    assert all(row.endswith(hypothesis) for hypothesis, row in zip(hypotheses, rows, strict=True))
    # the plainest two: a model that tells nothing apart fails here
    assert found["Somebody wears a red jacket."] == "entailment"
    assert found["Nobody is on the square."] == "contradiction"
