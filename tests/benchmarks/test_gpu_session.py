"""The ten minutes of a GPU, rehearsed without one: every step runs, and what is known is written after each."""

import json

import pytest

from benchmarks.gpu import attention, session, session_steps
from benchmarks.gpu.session import PARTS, Part, main, rehearsal, run_parts


def test_all_steps_are_rehearsed(tmp_path, monkeypatch):
    written = []
    write = session_steps.write_json

    def recorded(path, document):
        if path.name == "gpu_session.json":
            written.append(len(document["steps"]))
        write(path, document)

    monkeypatch.setattr(session_steps, "write_json", recorded)
    # of nothing to free on a GPU
    for module in (session, session_steps, attention):
        monkeypatch.setattr(module, "free", lambda: None)
    # interpreted kernels are rehearsed by hand: they take minutes
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("MIXKERNELS_BACKEND", "torch")
    assert main(["--rehearse", "--output", str(tmp_path)]) == 0
    assert written == [*range(1, len(PARTS) + 1), len(PARTS)]
    document = json.loads((tmp_path / "gpu_session.json").read_text())
    assert document["complete"] is True
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == [part.name for part in PARTS]
    done = {name for name, step in steps.items() if step["status"] == "done"}
    assert done == {"machine", "compile", "checks", "forward", "backward", "host", "rivals", "layer"}
    assert {step["status"] for name, step in steps.items() if name not in done} == {"unavailable"}
    assert steps["tests"]["reason"] == "a rehearsal has no GPU"
    errors = steps["checks"]["result"]["errors"]
    assert len(errors) >= 13
    assert steps["checks"]["result"]["failed"] == {}
    for name in ("forward", "backward", "layer", "rivals"):
        assert steps[name]["result"]["measured"], name
    assert any("not installed" in why for why in steps["rivals"]["result"]["skipped"] + ["not installed"])


def test_a_step_that_fails_or_has_no_time_is_named_and_the_others_run(tmp_path):
    def broken(found):
        raise RuntimeError("no kernel image\nlong trace")

    one = rehearsal(tmp_path, [])
    parts = [Part("broken", 5, broken), Part("fine", 5, lambda found: {"a": 1})]
    assert run_parts(one, parts) is False
    assert [(step["status"], step.get("reason")) for step in one.steps] == [
        ("failed", "RuntimeError: no kernel image"),
        ("done", None),
    ]
    late = rehearsal(tmp_path, [])
    late.deadline = 0.0
    run_parts(late, parts[1:])
    assert late.steps[0]["status"] == "left out"


def test_a_wrong_result_fails_the_session(tmp_path):
    one = rehearsal(tmp_path, [])
    assert run_parts(one, [Part("checks", 5, lambda found: {"failed": {"pool": "wrong"}})]) is False


def test_the_steps_fit_into_ten_minutes():
    assert sum(part.seconds for part in PARTS) <= 570


@pytest.mark.parametrize("arguments", [[], ["--one-pass"]])
def test_without_a_gpu_it_says_so(arguments, monkeypatch, capsys):
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    assert "needs a GPU (--rehearse does not)" in capsys.readouterr().err
