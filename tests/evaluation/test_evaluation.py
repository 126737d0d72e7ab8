"""Figures against values computed by hand, their intervals, run files, and what bad data get."""

import logging
import math
import os
import random
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from mixencoder.errors import DataError, InputError
from mixencoder.evaluation import bootstrap, evaluate, read_task, read_tasks, tasks
from mixencoder.evaluation.files import check_output, check_run_ids, check_writable, write_run, write_text
from mixencoder.evaluation.measures import Measured, with_intervals
from mixencoder.evaluation.model_scores import strict_ranking
from tests.evaluation.evaluation_data import LABELLED, LABELS, SCORED, write, write_beir

ALL = ("nDCG@10", "RR@10", "R@1", "R@2", "Success@1")


class Fixed:
    """Stands in for an engine: scores and logits are written in the second text; a 0 is read where it is blank."""

    def tokenizer(self, texts, **_):
        return {"input_ids": [text.split() for text in texts]}

    def predict(self, pairs, *, head, score="full", **_):
        rows = [[float(number) for number in text.split() or "0"] for _, text in pairs]
        return torch.tensor(rows if head == "classification" else [row[0] for row in rows])


def measure(task, **options):
    return evaluate(Fixed(), [task], **options)[task.name]


def values(figures) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def by_hand(ranked: list[int], judged: list[int]) -> dict[str, float]:
    """Measures of one query: grades of its candidates best first, and all grades that were judged."""

    def gain(grades):
        return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades[:10], start=1))

    right = [rank for rank, grade in enumerate(ranked, start=1) if grade > 0]
    count = sum(grade > 0 for grade in judged)
    return {
        "nDCG@10": gain(ranked) / gain(sorted(judged, reverse=True)) if count else 0,
        "RR@10": 1 / right[0] if right and right[0] <= 10 else 0,
        "R@1": sum(rank <= 1 for rank in right) / count if count else 0,
        "R@2": sum(rank <= 2 for rank in right) / count if count else 0,
        "Success@1": float(ranked[:1] > [0]),
    }


def test_ranking_figures_equal_those_by_hand(tmp_path):
    draw = random.Random(5)
    rows, expected = [], []
    for number in range(25):
        # few distinct scores, so that most queries have ties
        scores = [draw.randrange(4) / 2 for _ in range(draw.randint(1, 14))]
        labels = [draw.choice([0, 0, 1, 2]) for _ in scores]
        rows.append({"query": f"q{number}", "candidates": [f"{score}" for score in scores], "labels": labels})
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], labels[i]))
        expected.append(by_hand([labels[i] for i in order], labels))
    found = values(measure(read_task(write(tmp_path / "dev.jsonl", rows)), measures=ALL).figures["full"])
    for name in ALL:
        assert found[name] == pytest.approx(sum(row[name] for row in expected) / 25, abs=1e-6), name


def test_documents_that_the_first_stage_missed_count_in_the_ideal_ranking(tmp_path):
    task = read_task(write_beir(tmp_path / "beir"))
    assert (task.name, task.query_ids, task.documents) == ("beir.test", ["q1", "q2"], ["1.5", "0.5", "1.50"])
    assert task.document_ids == [["d1.5", "d0.5", "d1.50"], []]
    assert task.qrels == [{"d1.5": 2, "d7": 1}, {"d7": 1}]
    found = values(measure(task, measures=ALL).figures["full"])
    # d1.5 and d1.50 have one score; the wrong one comes first
    expected = by_hand([0, 2, 0], [2, 1])
    for name in ALL:
        assert found[name] == pytest.approx(expected[name] / 2, abs=1e-6), name


def test_classes_are_measured_as_by_hand_and_ties_are_wrong(tmp_path):
    logits = ["3 1 0", "0 2 1", "0 1 2", "1 1 0", "2 0 0", "0 4 4"]
    labels = ["contradiction", "entailment", "entailment", "contradiction", "neutral", "contradiction"]
    rows = [{"premise": "a", "hypothesis": row, "label": label} for row, label in zip(logits, labels, strict=True)]
    gold = [LABELS[label] for label in labels]
    # the fourth is a tie with the right class, so entailment; the sixth a tie of two wrong ones
    predicted = [0, 1, 2, 1, 0, 1]
    found = values(measure(read_task(write(tmp_path / "nli.jsonl", rows), label2id=LABELS)).figures["full"])
    assert found["accuracy"] == pytest.approx(2 / 6)
    scores = []
    for label in range(3):
        both = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        precision, recall = both / max(predicted.count(label), 1), both / gold.count(label)
        scores.append(2 * precision * recall / (precision + recall) if both else 0)
    assert found["macro-F1"] == pytest.approx(sum(scores) / 3)


def test_correlations_equal_those_by_hand(tmp_path):
    scores, targets = [0.5, 2.0, 2.0, -1.0, 3.5, 0.5], [1.0, 4.0, 5.0, 1.0, 4.0, 0.0]
    rows = [{"sentence1": "a", "sentence2": str(s), "score": t} for s, t in zip(scores, targets, strict=True)]

    def correlate(x, y):
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return top / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))

    def ranks(x):
        # equal values share the mean of their places
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

    found = values(measure(read_task(write(tmp_path / "sts.jsonl", rows))).figures["full"])
    assert found["Pearson"] == pytest.approx(correlate(scores, targets))
    assert found["Spearman"] == pytest.approx(correlate(ranks(scores), ranks(targets)))


def test_a_model_that_tells_nothing_apart_has_no_correlation(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "1", "score": target} for target in (0, 1, 3)]
    found = measure(read_task(write(tmp_path / "sts.jsonl", rows))).figures["full"]
    assert values(found) == {"Pearson": 0, "Spearman": 0}
    assert found["Pearson"].interval == (0, 0)


def test_statistics_of_a_resample_are_those_of_its_rows_written_out():
    generator = np.random.default_rng(3)
    # so many classes that resamples lack some
    gold, predicted = generator.integers(6, size=(2, 12))
    scores, targets = generator.integers(6, size=(2, 12)).astype(float)
    counts = np.concatenate([np.ones((1, 12)), generator.multinomial(12, np.full(12, 1 / 12), size=20)])

    def f1(rows):
        return metrics.f1_score(gold[rows], predicted[rows], average="macro")

    cases = {
        "mean": (bootstrap.mean(scores), lambda rows: scores[rows].mean()),
        "macro-F1": (bootstrap.macro_f1(gold, predicted), f1),
        "Pearson": (
            bootstrap.pearson(scores, targets),
            lambda rows: stats.pearsonr(scores[rows], targets[rows]).statistic,
        ),
        "Spearman": (
            bootstrap.spearman(scores, targets),
            lambda rows: stats.spearmanr(scores[rows], targets[rows]).statistic,
        ),
    }
    for name, (statistic, written) in cases.items():
        expected = [written(np.repeat(np.arange(12), row.astype(int))) for row in counts]
        np.testing.assert_allclose(statistic(counts.astype(float)), expected, atol=1e-12, err_msg=name)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(11)
    covered = 0
    for seed in range(60):
        sample = (generator.random(120) < 0.6).astype(float)
        low, high = bootstrap.intervals({"": bootstrap.mean(sample)}, 120, seed)[""]
        assert low <= sample.mean() <= high
        covered += low <= 0.6 <= high
    # 57 are expected; a right interval covers 51 or fewer once in 300 times
    assert covered >= 52


def test_intervals_are_reproducible_and_narrower_with_more_rows():
    values = np.random.default_rng(2).random(400)

    def interval(rows, seed=0):
        return bootstrap.intervals({"": bootstrap.mean(values[:rows])}, rows, seed)[""]

    assert interval(50) == interval(50)
    assert interval(50) != interval(50, seed=1)
    few, many = interval(50), interval(400)
    # the width falls with the root of the count, here 2.8
    assert 2 < (few[1] - few[0]) / (many[1] - many[0]) < 4
    error = values.std() / math.sqrt(400)
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_row_and_sums_have_no_interval(tmp_path):
    task = read_task(write(tmp_path / "dev.jsonl", [{"query": "q", "candidates": ["1", "2"], "labels": [0, 1]}]))
    assert measure(task).figures["full"]["RR@10"] == (1.0, None)
    rows = [{"query": "q", "candidates": ["1", "2"], "labels": [0, 1]}] * 3
    found = measure(read_task(write(tmp_path / "dev.jsonl", rows)), measures=["NumRel", "RR@10"]).figures["full"]
    assert found["NumRel"] == (3, None)
    assert str(found["RR@10"]) == "1.000 [1.000, 1.000]"


def test_equal_scores_are_told_apart_by_the_least_step_and_nothing_else_changes():
    ids, scores = ["a", "b", "c", "d", "e"], [0.1, 0.5, 0.5, 0.5, 0.0]
    ranking = strict_ranking(ids, scores, {"b": 2, "c": 0, "d": 1})
    assert [name for name, _ in ranking] == ["c", "d", "b", "a", "e"]
    found = np.array([score for _, score in ranking], dtype=np.float32)
    assert (np.diff(found) < 0).all()
    np.testing.assert_array_equal(found, [score for _, score in ranking])
    assert (found[0], found[3], found[4]) == (np.float32(0.5), np.float32(0.1), 0)
    assert found[1] == np.nextafter(np.float32(0.5), np.float32(0))
    # the step below an equal pair is taken: it moves on
    steps = strict_ranking(["x", "y", "z"], [0.5, 0.5, float(found[1])], {})
    assert [score for _, score in steps] == [float(score) for score in found[:3]]


def test_a_run_file_read_back_gives_the_same_figures(tmp_path):
    task = read_task(write_beir(tmp_path / "beir"))
    found = measure(task, measures=ALL)
    path = write_run(tmp_path, task, "full", found.rankings["full"], "tag")
    assert path.name == "beir.test.full.run"
    fields = [line.split() for line in path.read_text().splitlines()]
    assert [line[:4] for line in fields] == [
        ["q1", "Q0", "d1.50", "1"],
        ["q1", "Q0", "d1.5", "2"],
        ["q1", "Q0", "d0.5", "3"],
    ]
    assert {line[5] for line in fields} == {"tag"}
    parsed = [ir_measures.parse_measure(name) for name in ALL]
    qrels = {"q1": {"d1.5": 2, "d7": 1}, "q2": {"d7": 1}}
    again = ir_measures.calc_aggregate(parsed, qrels, ir_measures.read_trec_run(str(path)))
    assert {str(name): value for name, value in again.items()} == pytest.approx(values(found.figures["full"]))


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match=r"report\.json cannot be written: No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(path / "below")


def test_results_overwrite_no_data_and_no_folder(tmp_path):
    data = write(tmp_path / "dev.jsonl", [])
    (tmp_path / "link.json").symlink_to(data)
    check_output(tmp_path / "new" / "report.json", [data])
    for name, words in [
        ("dev.jsonl", "is among the data"),
        ("link.json", "is among the data"),
        ("new", "is a folder; expected a file"),
        ("dev.jsonl/x.json", "cannot be written: "),
    ]:
        with pytest.raises(InputError, match=words):
            check_output(tmp_path / name, [data])
    with pytest.raises(InputError, match="/proc/none cannot be written"):
        check_output(Path("/proc/none/report.json"), [data])


def test_ids_with_blanks_make_no_run_file(tmp_path):
    task = read_task(write_beir(tmp_path / "beir"))
    check_run_ids(task)
    task.document_ids[0][1] = "d 1"
    with pytest.raises(InputError, match="id 'd 1' cannot be written to a run file"):
        check_run_ids(task)


def test_a_limit_takes_the_first_rows_and_a_sample_others_in_their_order(tmp_path):
    rows = [{"query": f"q{i}", "candidates": ["1", "2"], "labels": [0, 1]} for i in range(50)]
    path = write(tmp_path / "dev.jsonl", rows)
    assert read_task(path, limit=3).queries == ["q0", "q1", "q2"]
    sampled = read_task(path, limit=10, sample=4)
    numbers = list(map(int, sampled.query_ids))
    assert sampled.queries == [f"q{number}" for number in numbers]
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(10))
    assert read_task(path, limit=10, sample=4).query_ids == sampled.query_ids != read_task(path, limit=10).query_ids
    assert len(read_task(path, limit=99, sample=4)) == 50
    with pytest.raises(InputError, match="expected a limit"):
        read_task(path, sample=4)


def test_queries_that_can_tell_nothing_are_counted_once(tmp_path, caplog):
    rows = [
        {"query": "a", "candidates": ["1", "0"], "labels": [1, 0]},
        {"query": "b", "candidates": ["1", "2"], "labels": [0, 0]},
        {"query": "c", "candidates": ["1", "2"], "labels": [1, 2]},
        {"query": "d", "candidates": [], "labels": []},
    ]
    path = tmp_path / "dev.jsonl"
    with caplog.at_level(logging.WARNING):
        task = read_task(write(path, rows))
    assert [record.message for record in caplog.records] == [
        f"{path}: 2 of 4 queries have no right document; each counts as 0",
        f"{path}: 1 of 4 queries have no candidate; each counts as 0",
        f"{path}: 1 of 4 queries have only right candidates, so every order scores the same",
    ]
    assert values(measure(task, measures=["Success@1"]).figures["full"])["Success@1"] == pytest.approx(2 / 4)


def test_texts_without_a_token_keep_their_places_and_are_counted_or_refused(tmp_path):
    rows = [
        {"query": "a", "candidates": [" ", "1"], "labels": [0, 1]},
        {"query": " ", "candidates": ["-1", ""], "labels": [0, 1]},
    ]
    path = write(tmp_path / "dev.jsonl", rows)
    task = read_task(path)
    assert task.document_ids == [["0", "1"], ["0", "1"]]
    with pytest.warns(UserWarning, match=f"^3 texts hold no token.*the first: {path}, line 1, candidate 0$"):
        found = measure(task, measures=["Success@1"])
    assert values(found.figures["full"])["Success@1"] == 1
    with pytest.raises(DataError, match=f"{path}, line 1, candidate 0: ' ' holds no token"):
        measure(task, on_empty="error")
    with pytest.raises(InputError, match="on_empty is 'drop'; expected one of special, error"):
        measure(task, on_empty="drop")


def test_right_and_wrong_documents_are_measured_as_training_reads_them(tmp_path, caplog):
    tuples = [{"query": "a", "positive": "2", "negative": "1", "negative_2": "3"}]
    lists = [{"query": "a", "positives": ["2", "4"], "negatives": ["1", "3"]}, {"query": "b", "positives": ["1"]}]
    found = measure(read_task(write(tmp_path / "a.jsonl", tuples)), measures=["RR@10"])
    assert values(found.figures["full"]) == {"RR@10": 0.5}
    task = read_task(write(tmp_path / "b.jsonl", [lists[0], {**lists[1], "negatives": []}]))
    assert task.qrels == [{"0": 1, "1": 1, "2": 0, "3": 0}, {"0": 1}]
    assert "1 of 2 queries have only right candidates" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_json_cannot_hold_is_refused(value):
    with pytest.raises(DataError, match=f"AP is {value} for these data"):
        with_intervals({"full": {"AP": Measured(value, None)}}, 3, 0)


def test_data_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "dev.jsonl", [{**GOOD, "candidates": ["1", "2"]}])
    read = tasks.read_ranking_rows

    def write_on(source):
        yield from list(read(source))
        path.write_text(path.read_text() + " ")

    monkeypatch.setattr(tasks, "read_ranking_rows", write_on)
    with pytest.raises(DataError, match=r"dev\.jsonl changed while it was read"):
        read_task(path)


def test_a_task_is_read_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "dev.jsonl", [GOOD])
    assert read_task("~/dev.jsonl").source == path


def test_a_pipe_is_refused_as_data_are_read_several_times(tmp_path):
    os.mkfifo(tmp_path / "dev.jsonl")
    with pytest.raises(DataError, match="is a pipe or a device; expected a regular file"):
        read_task(tmp_path / "dev.jsonl")


GOOD = {"query": "q", "candidates": ["a", "b"], "labels": [0, 1]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "dev.jsonl holds no row; expected query, candidates, labels"),
        ([{**GOOD, "labels": [0, 0]}] * 2, "dev.jsonl: none of 2 queries has a right document; expected some label"),
        ([GOOD, {**GOOD, "labels": [0]}], "dev.jsonl, line 2: 2 candidates but 1 labels"),
        ([GOOD, {"query": "q", "candidates": ["a"]}], "dev.jsonl, line 2: fields are query, candidates; expected"),
        ([GOOD, {**GOOD, "labels": [0, 1e300]}], "line 2: labels are [0, 1e+300]; expected a list of numbers"),
        ([GOOD, {**GOOD, "labels": [0, 1e30]}], "dev.jsonl, line 2: a label is 1e+30; expected grades up to"),
        ([GOOD, {**GOOD, "labels": [0, 0.5]}], "dev.jsonl, line 2: a label is 0.5; expected integers"),
        (
            [{"query": "q", "candidates": [], "labels": []}, GOOD | {"candidates": []}],
            "line 2: 0 candidates but 2 labels",
        ),
        ([{"query": "q", "positive": "p"}], "line 1: fields are query, positive, without wrong documents"),
        ([{"text": "q"}], "line 1: fields are text; expected query, positive"),
        ([LABELLED[0]] * 3, "dev.jsonl: all 3 examples have the class number 1"),
        ([LABELLED[0], {**LABELLED[1], "label": "maybe"}], "has labels entailment, maybe, but the model's"),
        ([{**SCORED[0], "score": 1}, {**SCORED[1], "score": "x"}], "line 2: score is 'x'; expected a number"),
    ],
)
def test_bad_data_are_named_with_line_found_and_expected(tmp_path, rows, words):
    with pytest.raises(DataError) as caught:
        read_task(write(tmp_path / "dev.jsonl", rows), label2id=LABELS)
    assert words in str(caught.value)


def test_pairs_that_a_limit_leaves_alike_are_refused(tmp_path):
    path = write(tmp_path / "nli.jsonl", LABELLED)
    with pytest.raises(DataError, match="all 1 chosen pairs have the same label or score; expected at least two"):
        read_task(path, limit=1, label2id=LABELS)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / folder / "dev.jsonl" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        write(path, [GOOD])
    with pytest.raises(DataError, match=r"a/dev\.jsonl and .*b/dev\.jsonl are both called dev"):
        read_tasks(paths)


class Unasked(Fixed):
    """An engine that is never to score anything."""

    def predict(self, pairs, **options):
        if pairs:
            raise AssertionError("texts were scored before everything was checked")
        return torch.empty(0)


@pytest.mark.parametrize(
    "name", ["precision-ish", "ndcg@10", "P", "RR@1.5", "", "R@0", "R@-3", "nDCG@", "nDCG(x=1)@3", "ERR@0", "accuracy"]
)
def test_a_measure_that_cannot_be_computed_is_refused_before_scoring(tmp_path, name):
    task = read_task(write(tmp_path / "dev.jsonl", [GOOD]))
    with pytest.raises(DataError, match=r"measure"):
        evaluate(Unasked(), [task], measures=[name])


def test_a_named_measure_leaves_the_defaults_of_other_kinds(tmp_path):
    tasks = read_tasks([write(tmp_path / "a.jsonl", [{**GOOD, "candidates": ["1", "2"]}])])
    tasks += read_tasks([write(tmp_path / "b.jsonl", [{**row, "sentence2": "1"} for row in SCORED])])
    found = evaluate(Fixed(), tasks, measures=["AP", "Spearman"])
    assert [list(found[name].figures["full"]) for name in "ab"] == [["AP"], ["Spearman"]]
    found = evaluate(Fixed(), tasks, measures=["AP"])
    assert list(found["b"].figures["full"]) == ["Pearson", "Spearman"]
    with pytest.raises(DataError, match="'accuracy' does not fit the data"):
        evaluate(Fixed(), tasks, measures=["accuracy"])
