"""The code of docs/scale.md that needs Ray runs as printed, and ranks as the index in the page's first block does."""

import re
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
pytestmark = pytest.mark.usefixtures("cluster")

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    first, *_ = re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)
    (ranking,) = re.findall(
        r"^    from mixencoder\.distributed\.ray_shards .*\n(?:    .*\n|\n(?=    ))*", text, flags=re.M
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(first, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == "ShardedIndex 3 ['git', 'screen']\n"
    exec(compile(dedent(ranking), str(PAGE), "exec"), names)
    found, model = names["found"], names["model"]
    assert not found.partial
    with model.open_index("shards") as index:
        assert found.rankings == model.rank(["undo a commit"], index, 10)
    # the line on copies
    (line,) = re.findall(r"`shards\.(rank_states\(.*\))`", text)
    with names["RayShards"](model, "shards") as shards:
        assert eval(f"shards.{line}", {"shards": shards, "model": model}).rankings == found.rankings
