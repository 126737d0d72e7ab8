"""The README's Python runs as printed, and CI runs its set-up commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = r"<!-- command: (\w+) -->"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_and_does_what_it_says(tmp_path, monkeypatch):
    # it makes an index
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    # the last expression of each line is what a reader sees
    exec(code.replace("model.rank(", "ranking = model.rank(", 1), names)
    assert names["ranking"][0]["corpus_id"] == 1
    assert names["ranking"][0]["text"] in code
    rankings = names["model"].rank(
        ["What is the capital of France?", "How long does an egg take?"], names["candidates"], top_k=1
    )
    assert [ranking[0]["corpus_id"] for ranking in rankings] == [2, 0]


def test_ci_runs_the_documents_own_commands():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (steps,) = re.findall(r"^for step in (.*); do$", script, flags=re.M)
    steps = [step.split(":") for step in steps.split()]
    # every command that the README marks is run, and every step finds its command
    assert {name for name, document in steps if document == "README.md"} == set(re.findall(MARK, README))
    for name, document in steps:
        text = (ROOT / document).read_text(encoding="utf-8")
        (command,) = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*)\n```", text)
        assert ".venv/bin/" in command
        if document == "README.md":
            assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
            assert "-c constraints.txt" in command
