"""The comparison's tooling, on tiny models and data; its figures are made by its own command."""

import json

import pytest

from benchmarks.comparison import cells as comparison
from benchmarks.comparison import curves
from benchmarks.comparison.cells import Cell, make_record
from benchmarks.comparison.lists import write_long_lists
from benchmarks.comparison.settings import ABLATIONS, CONTENDERS, TASKS, ComparedTask, Contender, Curve, Report, Setting
from benchmarks.comparison.tables import ablation_rows, cells, comparison_rows, growth_rows, part_rows, task_mean
from mixencoder.errors import InputError
from tests.training.synthetic import write


def lists(words, queries=6):
    pool = [" ".join(words[start : start + 2]) for start in range(12)]
    return [{"query": words[row], "candidates": pool[row : row + 4], "labels": [0, 1, 0, 0]} for row in range(queries)]


def test_long_lists_keep_their_own_candidates_and_labels_and_repeat_none(tmp_path, words):
    rows = lists(words)
    rows[0]["candidates"][3] = rows[0]["candidates"][0]
    source, target = write(tmp_path / "short.jsonl", rows), tmp_path / "made" / "long.jsonl"
    write_long_lists(source, target, 8, seed=0)
    made = [json.loads(line) for line in target.read_text().splitlines()]
    for before, after in zip(rows, made, strict=True):
        assert after["query"] == before["query"]
        assert len(set(after["candidates"])) == 8 == len(after["labels"])
        assert set(before["candidates"]) <= set(after["candidates"])
        right = [text for text, label in zip(after["candidates"], after["labels"], strict=True) if label]
        assert right == [before["candidates"][1]]
    again = tmp_path / "again.jsonl"
    write_long_lists(source, again, 8, seed=0)
    assert again.read_text() == target.read_text()
    with pytest.raises(ValueError, match="distinct candidates; expected at least 100"):
        write_long_lists(source, target, 100, seed=0)


def test_no_candidate_is_drawn_that_stands_in_the_query(tmp_path, words):
    rows = lists(words)
    # all but one of these would be drawn for a list of eight
    for text in {text for row in rows for text in row["candidates"]} - set(rows[1]["candidates"]):
        rows[1]["query"] = f"first {text} and more"
        source = write(tmp_path / "short.jsonl", rows)
        write_long_lists(source, tmp_path / "long.jsonl", 8, seed=0)
        made = json.loads((tmp_path / "long.jsonl").read_text().splitlines()[1])
        assert len(made["candidates"]) == 8
        assert text not in made["candidates"]


@pytest.fixture
def paths(tmp_path, backbone_path, words, monkeypatch):
    """One tiny task and setting in the place of the real ones."""
    data = tmp_path / "data"
    data.mkdir()
    write(data / "replies.dev.jsonl", lists(words))
    write(data / "train.jsonl", [{"query": word, "positive": f"{word} mat"} for word in words])
    task = ComparedTask(("train.jsonl",), (Report("replies.dev.jsonl", "R@1"),), 4, {"tiny": 2})
    setting = Setting(seeds=(0,), queries=5, pairs=5, joint_long_queries=2, bf16=False)
    monkeypatch.setitem(TASKS, "tiny", task)
    monkeypatch.setitem(comparison.SETTINGS, "tiny", setting)
    return comparison.Paths(data, backbone_path, tmp_path / "work")


@pytest.mark.parametrize("name", ["cross-encoder", "mixencoder", "no-dual-term"])
def test_a_cell_is_trained_once_and_measured_on_the_same_queries(paths, tmp_path, name):
    cell = Cell("tiny", name, {**CONTENDERS, **ABLATIONS}[name], 0)
    record = make_record(cell, "tiny", paths, tmp_path / "results")
    report = record["reports"]["replies.dev"]
    assert report["provenance"]["queries"] == {"replies.dev": 5}
    parts = {"mixencoder": {"full", "interaction", "dual"}, "no-dual-term": {"full", "interaction"}}.get(name, {"full"})
    assert set(report["results"]["replies.dev"]) == parts
    assert record["training"]["settings"]["steps"] == 2
    weights = (paths.model("tiny", "tiny", name, 0) / "model.safetensors").stat().st_mtime_ns
    again = comparison.run_cell(cell, "tiny", paths)
    assert (paths.model("tiny", "tiny", name, 0) / "model.safetensors").stat().st_mtime_ns == weights
    assert again["reports"]["replies.dev"]["results"] == report["results"]
    path = tmp_path / "results" / f"tiny.{name}.0.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("name", ["cross-encoder", "mixencoder"])
def test_a_curve_measures_the_model_after_each_of_its_steps(paths, monkeypatch, name):
    curve = Curve(TASKS["tiny"].train, TASKS["tiny"].reports, CONTENDERS, batch_size=4, learning_rate=1e-2)
    monkeypatch.setitem(curves.CURVES, "tiny", curve)
    record = curves.run_curve("tiny", name, 0, paths, bf16=False, points=(1, 3))
    assert [point["steps"] for point in record["points"]] == [1, 3]
    first, last = (point["reports"]["replies.dev"]["provenance"]["weights_sha256"] for point in record["points"])
    assert first != last
    assert record["training"]["settings"]["schedule"] == "stable"
    # what was trained and measured is not done again
    monkeypatch.setattr(curves, "train", None)
    monkeypatch.setattr(curves, "measure", None)
    assert curves.run_curve("tiny", name, 0, paths, bf16=False, points=(1, 3))["points"] == record["points"]


def test_a_student_waits_for_its_teacher_and_learns_from_it(paths):
    student = Contender("dual-encoder", teacher="teacher")
    with pytest.raises(InputError, match="learns from teacher"):
        comparison.run_cell(Cell("tiny", "student", student, 0), "tiny", paths)
    comparison.run_cell(Cell("tiny", "teacher", Contender("dual-encoder"), 0), "tiny", paths)
    record = comparison.run_cell(Cell("tiny", "student", student, 0), "tiny", paths)
    assert record["training"]["settings"]["teacher"] == "teacher.0"


def record(contender, seed, figures, parts=("full",)):
    reports = {
        name: {
            "measure": "R@1",
            "results": {name: {part: {"R@1": value} for part in parts}},
            "intervals": {name: {part: {"R@1": [value - 0.1, value + 0.1]} for part in parts}},
            "provenance": {"queries": {name: 7}},
        }
        for name, value in figures.items()
    }
    return {"contender": contender, "seed": seed, "reports": reports}


ALL = {
    "mnli_matched.dev": 0.5,
    "ubuntu_irc_1in10.dev": 0.6,
    "ubuntu_irc_1in100.dev": 0.4,
    "ubuntu_irc_1in1000": 0.1,
    "wikiqa.test": 0.8,
    "trecqa.dev": 1.0,
    "scifact.test": 0.7,
}


def test_tables_average_tasks_then_compare_and_hold_what_was_measured():
    better = {name: value / 2 for name, value in ALL.items()}
    records = [record("cross-encoder", 0, ALL), record("mixencoder", 0, better, ("full", "dual"))]
    found = cells(records)
    # longer lists are no part of the mean, and a task's two reports are one
    assert task_mean(found["cross-encoder"]) == pytest.approx((0.5 + 0.5 + 0.9 + 0.7) / 4)
    latency = {
        "cross-encoder": {"seconds": 30.0, "bytes_per_candidate": None},
        "mixencoder": {"seconds": 0.05, "bytes_per_candidate": 1536.0},
    }
    _, _, cross, ours = comparison_rows(records, latency, intervals=False)
    assert cross[-3:] == ["100.0%", "30,000 ms", "its text"]
    assert ours[-3:] == ["50.0%", "50 ms", "1,536"]
    assert ours[1:3] == ["0.250", "0.300"]
    assert comparison_rows(records, latency, intervals=True)[3][1] == "0.250 (0.150 to 0.350)"
    assert [row[0] for row in part_rows(records)[2:]] == ["mixencoder", "mixencoder, dual term alone"]
    assert growth_rows(records)[2][1:] == [
        "0.600 (0.500 to 0.700)",
        "0.400 (0.300 to 0.500)",
        "0.100 (0.000 to 0.200)",
        "7",
    ]


def test_seeds_are_averaged_and_a_missing_task_leaves_the_mean_empty():
    records = [record("cross-encoder", seed, {"scifact.test": value}) for seed, value in enumerate([0.6, 0.7])]
    found = cells(records)["cross-encoder"]
    assert found["scifact.test"].value == pytest.approx(0.65)
    assert found["scifact.test"].interval is None
    assert task_mean(found) is None


def test_ablations_stand_below_what_they_change_and_have_no_dual_term_where_they_took_it_out():
    names = ("ubuntu_irc_1in10.dev", "ubuntu_irc_1in100.dev")

    def made(contender, value, parts):
        return {**record(contender, 0, dict.fromkeys(names, value), parts), "task": "replies"}

    base = [made("mixencoder", 0.7, ("full", "interaction")), made("dual-encoder", 0.1, ("full",))]
    varied = [made("no-dual-term", 0.5, ("full",)), made("k-2", 0.8, ("full", "interaction"))]
    found = ablation_rows(base, varied)[2:]
    assert [row[1:] for row in found] == [["0.700"] * 4, ["0.800"] * 4, ["0.500"] * 4]
    assert [row[0] for row in found[1:]] == [ABLATIONS[name].varied for name in ("k-2", "no-dual-term")]
