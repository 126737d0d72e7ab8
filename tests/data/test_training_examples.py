"""Training data: which shapes are read, from which files, and what a wrong one is told."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from mixencoder.data.examples import Example, class_names, read_source
from mixencoder.errors import DataError, InputError


def write(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


def examples(source) -> list[Example]:
    """Return a source's examples without where they stand."""
    return [example._replace(where="") for example in source.examples]


def write_beir(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "corpus.jsonl.gz", [{"_id": f"d{i}", "title": f"title {i}", "text": f"text {i}"} for i in range(4)])
    write(folder / "queries.train.jsonl", [{"_id": "q1", "text": "a question"}])
    (folder / "qrels.train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    (folder / "bm25.train.run").write_text("q1 Q0 d0 1 3.0 bm25\nq1 Q0 d2 2 2.0 bm25\nq1 Q0 d3 3 2.5 bm25\n")
    return folder


def test_every_shape_is_read(tmp_path):
    pair = read_source(write(tmp_path / "pair.jsonl.gz", [{"query": "q", "positive": "p"}]), weight=2.0)
    assert (pair.name, pair.task, pair.weight) == ("pair", "ranking", 2.0)
    assert examples(pair) == [Example("q", ("p",))]
    multi = read_source(write(tmp_path / "multi.jsonl", [{"query": "q", "positives": ["p", " ", "r"]}]))
    assert examples(multi) == [Example("q", ("p", "r"))]
    rows = [{"query": "q", "candidates": ["n", "p", "", "g"], "labels": [0, 1, 0, 0.5]}]
    rank = read_source(write(tmp_path / "rank.jsonl", rows))
    assert examples(rank) == [Example("q", ("p", "g"), ("n",), grades=(1.0, 0.5))]
    # grades that differ are learned as such
    assert rank.task == "graded"
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("neutral", "entailment")]
    nli = read_source(write(tmp_path / "nli.jsonl", rows), label2id={"entailment": 0, "neutral": 1})
    assert (nli.task, examples(nli)[0]) == ("classification", Example("a", ("b",), target=1))
    assert nli.examples[1].where == f"{tmp_path / 'nli.jsonl'}, line 2"
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (3.5, 2)]
    sts = read_source(write(tmp_path / "sts.jsonl", rows))
    assert (sts.task, sts.examples[0].target) == ("similarity", 3.5)
    beir = read_source(write_beir(tmp_path / "beir"))
    # the run is read by its scores, best first
    wrong = ("title 0 text 0", "title 3 text 3")
    assert examples(beir) == [Example("a question", ("title 2 text 2",), wrong, grades=(1.0,))]


def test_lists_without_a_right_candidate_are_left_out_and_counted_once(tmp_path, caplog):
    rows = [{"query": "q", "candidates": ["a", "b"], "labels": labels} for labels in ([0, 0], [0, 1], [0, 0])]
    source = read_source(write(tmp_path / "rank.jsonl", rows))
    assert len(source.examples) == 1
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'rank.jsonl'}: 2 of 3 rows have no right candidate and are left out"
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "line 1: fields are text; expected query, positive or query, positives or"),
        ([{"a": "x", "b": "y", "c": "z", "label": 1}], "line 1: fields are a, b, c, label; expected"),
        ([{"query": "q", "positive": "p"}, {"query": "q"}], "line 2: fields are query; expected query, positive"),
        ([{"query": 1, "positive": "p"}], "line 1: query is a int; expected a string"),
        ([{"query": "q", "positives": "p"}], "line 1: positives is a str; expected a list"),
        ([{"query": "q", "candidates": ["a"], "labels": [1, 0]}], "line 1: 1 candidates but 2 labels"),
        ([{"query": "q", "candidates": ["a"], "labels": ["x"]}], "line 1: labels are"),
        ([{"premise": "a", "hypothesis": "b", "label": "maybe"}], "label is 'maybe'; expected one of no, yes"),
        ([{"premise": "a", "hypothesis": "b", "label": 2}], "label is 2; expected a class from 0 to 1"),
        ([{"premise": "a", "hypothesis": "b", "label": None}], "line 1: label is None; expected a number"),
        (
            [{"premise": "a", "hypothesis": "b", "label": 1}, {"premise": "a", "hypothesis": "b", "label": None}],
            "line 2",
        ),
        ([{"premise": "a", "hypothesis": "b", "label": "yes"}] * 2, "all 2 examples have the class number 1; expected"),
        ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "score is 'high'; expected a number"),
        ([{"sentence1": "a", "sentence2": "b", "score": float("nan")}], "score is nan; expected a number"),
        (
            [{"sentence1": "a", "sentence2": "b", "score": 2}] * 3,
            "all 3 examples have the score 2; expected at least two",
        ),
        ([{"query": "q", "candidates": ["a"], "labels": [0]}], "holds no usable example"),
        ([], "holds no usable example"),
    ],
)
def test_a_wrong_file_names_file_line_found_and_expected(tmp_path, rows, words):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_source(path, label2id={"no": 0, "yes": 1})
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_files_that_are_no_json_or_no_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n{"query"\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_source(path)
    path.write_bytes(b'{"query": "q", "positive": "p"}\n{"query": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_source(path)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_source(tmp_path / "nothing.jsonl")
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "q", "positive": "p"}\n' * 100, mtime=0)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_source(path)


def test_labelled_pairs_need_a_classification_head(tmp_path):
    path = write(tmp_path / "nli.jsonl", [{"premise": "a", "hypothesis": "b", "label": "x"}])
    with pytest.raises(DataError, match="need a classification head"):
        read_source(path)


def test_any_column_names_serve_in_their_order(tmp_path):
    pairs = read_source(write(tmp_path / "a.jsonl", [{"anchor": "a", "answer": "b", "id": 7}]))
    assert examples(pairs) == [Example("a", ("b",))]
    rows = [{"anchor": "a", "positive": "b", "negative": "c", "negative_2": "d"}]
    assert examples(read_source(write(tmp_path / "b.jsonl", rows))) == [Example("a", ("b",), ("c", "d"))]
    rows = [{"question": "a", "right": ["b"], "wrong": ["c", "d"]}]
    assert examples(read_source(write(tmp_path / "c.jsonl", rows))) == [Example("a", ("b",), ("c", "d"))]
    rows = [{"question": "a", "docs": ["b", "c"], "scores": [2, 1]}]
    lists = read_source(write(tmp_path / "d.jsonl", rows))
    assert (lists.task, examples(lists)) == ("graded", [Example("a", ("b", "c"), grades=(2.0, 1.0))])


def test_wrong_documents_beside_a_named_pair_are_read_and_other_columns_said_once(tmp_path, caplog):
    rows = [{"negative": "c", "query": "a", "positive": "b", "negative_2": "d", "id": 1}] * 2
    assert examples(read_source(write(tmp_path / "a.jsonl", rows))) == [Example("a", ("b",), ("c", "d"))] * 2
    rows = [{"query": "a", "positive": "b", "negatives": ["c", "d"]}]
    assert examples(read_source(write(tmp_path / "b.jsonl", rows))) == [Example("a", ("b",), ("c", "d"))]
    rows = [{"query": "a", "positives": ["b"], "neg": "c"}]
    assert examples(read_source(write(tmp_path / "c.jsonl", rows))) == [Example("a", ("b",), ("c",))]
    assert not caplog.records
    rows = [{"query": "a", "positive": "b", "source": "forum", "hard": "c"}] * 2
    assert examples(read_source(write(tmp_path / "d.jsonl", rows))) == [Example("a", ("b",))] * 2
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'd.jsonl'}: columns source, hard are not read, only query, positive; call columns of wrong "
        "documents negative, negative_2 and so on"
    ]


def test_numbers_are_classes_for_a_model_with_classes_and_scores_otherwise(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "label": label} for label in (0, 1)])
    assert read_source(path).task == "similarity"
    assert read_source(path, label2id={"no": 0, "yes": 1}).task == "classification"
    assert read_source(path, label2id={"no": 0, "yes": 1}, task="similarity").task == "similarity"
    scored = write(tmp_path / "b.jsonl", [{"a": "x", "b": "y", "score": label} for label in (0, 1)])
    assert read_source(scored, label2id={"no": 0, "yes": 1}).task == "similarity"


def test_class_names_are_read_off_labelled_pairs_alone(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("yes", "no", "yes")]
    assert class_names(write(tmp_path / "a.jsonl", rows)) == {"no", "yes"}
    assert class_names(write(tmp_path / "b.jsonl", [{"a": "x", "b": "y", "label": 1}])) == set()
    assert class_names(write(tmp_path / "c.jsonl", [{"query": "x", "positive": "y"}])) == set()


def test_a_task_that_does_not_fit_or_exist_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "x", "positive": "y"}])
    with pytest.raises(DataError, match="holds examples of ranking; expected classification"):
        read_source(path, task="classification")
    with pytest.raises(InputError, match="task is 'rank'; expected one of ranking, graded"):
        read_source(path, task="rank")


def test_tables_hold_the_same_examples_as_json_lines(tmp_path):
    rows = [{"sentence1": "a, b", "sentence2": "c\nd", "score": 1.5}, {"sentence1": "e", "sentence2": "f", "score": 2}]
    expected = examples(read_source(write(tmp_path / "a.jsonl", rows)))
    for name in ("a.csv", "a.tsv"):
        source = read_source(write_csv(tmp_path / name, rows))
        assert (source.name, source.task, examples(source)) == ("a", "similarity", expected)
    assert source.examples[1].where.endswith("a.tsv, line 4")
    labelled = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1)]
    source = read_source(write_csv(tmp_path / "b.csv", labelled), label2id={"x": 0, "y": 1})
    assert [example.target for example in source.examples] == [0, 1]


def test_a_parquet_file_holds_the_same_examples(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"query": "q", "candidates": ["a", "b"], "labels": [0, 1]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert examples(read_source(tmp_path / "a.parquet")) == [Example("q", ("b",), ("a",), grades=(1.0,))]
    (tmp_path / "b.parquet").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        read_source(tmp_path / "b.parquet")


def test_rows_of_a_datasets_object_serve_as_they_are():
    rows = [{"query": "q", "positive": "p"}, {"query": "r", "positive": "s"}]
    source = read_source(rows, name="mine")
    assert (source.name, examples(source)) == ("mine", [Example("q", ("p",)), Example("r", ("s",))])
    with pytest.raises(DataError, match="mine, row 1: fields are query; expected query, positive"):
        read_source([rows[0], {"query": "q"}], name="mine")
    datasets = pytest.importorskip("datasets")
    assert examples(read_source(datasets.Dataset.from_list(rows))) == examples(source)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "query,positive\na\n", "line 2: 1 fields; expected 2"),
        ("a.csv", "query,query\na,b\n", "expected unique names"),
        ("a.tsv", "one\nx\n", "line 2: fields are one; expected query, positive"),
        ("a.txt", "x", "files ending in '.txt' are not read; expected .jsonl"),
    ],
)
def test_a_wrong_table_names_file_and_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_source(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert words in str(caught.value)
