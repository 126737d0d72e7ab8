"""What columns and values mean: by name before order, whatever types a file holds them in, and what is said aloud."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from mixencoder.data.columns import recognise
from mixencoder.data.examples import Example, class_names, read_ranking_rows, read_source, warn_of_similar_names
from mixencoder.errors import DataError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def plain(source) -> list[tuple]:
    """Return query, right and wrong documents of every example."""
    return [example[:3] for example in source.examples]


@pytest.mark.parametrize(
    ("header", "cells", "unread"),
    [
        (",question,answer", "0,q,a", "''"),
        ("Unnamed: 0,question,answer", "0,q,a", "Unnamed: 0"),
        ("query_id,query,answer", "x1,q,a", "query_id"),
        ("qid,query,docid,passage", "1,q,2,a", "qid, docid"),
        ("idx,Question,Answer", "7,q,a", "idx"),
        ("index,answer,question", "7,a,q", "index"),
        ("positive,query,row_id", "a,q,7", "row_id"),
    ],
)
def test_numbers_and_names_of_rows_are_passed_over_and_said_once(tmp_path, caplog, header, cells, unread):
    path = write(tmp_path / "a.csv", f"{header}\n{cells}\n{cells}\n")
    assert plain(read_source(path)) == [("q", ("a",), ())] * 2
    assert [record.message for record in caplog.records] == [
        f"{path}: columns {unread} are not read: by their names they hold ids or row numbers"
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "a", "query": "q"},
        {"document": "a", "QUERY": "q"},
        {"sentence2": "a", "sentence1": "q"},
        {"response": "a", "anchor": "q"},
        {"passage": "a", "question": "q"},
        {"text_b": "a", "text_a": "q"},
        {"text": "a", "question": "q"},
    ],
)
def test_columns_are_told_by_their_names_whatever_their_order(row, caplog):
    assert plain(read_source([row])) == [("q", ("a",), ())]
    assert not caplog.records


def test_what_is_told_by_order_is_said(caplog):
    rows = [{"left": "q", "right": "a", "other": "w"}]
    assert plain(read_source(rows, name="mine")) == [("q", ("a",), ("w",))]
    (record,) = caplog.records
    assert "mine: columns are read by their order" in record.message
    assert "left (the query), right (the right document), other (wrong documents)" in record.message
    # one name that is known is enough to place that column
    assert plain(read_source([{"note": "a", "query": "q"}])) == [("q", ("a",), ())]
    assert plain(read_source([{"answer": "a", "text": "q"}])) == [("q", ("a",), ())]


def test_further_columns_beside_pos_and_neg_are_passed_over_and_said(caplog):
    row = {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1.0, 2.0], "neg_scores": [3.0], "prompt": "p"}
    assert plain(read_source([row, row], name="mine")) == [("q", ("a", "b"), ("c",))] * 2
    assert [record.message for record in caplog.records] == [
        "mine: columns pos_scores, neg_scores, prompt are not read, only query, pos, neg; call columns of wrong "
        "documents negative, negative_2 and so on"
    ]


def test_numbers_of_rows_alone_make_no_pair():
    with pytest.raises(DataError, match="rows, row 0: fields are idx, text; expected query, positive"):
        read_source([{"idx": "1", "text": "a"}])
    assert recognise({"query": "q", "positive": "p", "label": 1}, "").unread == ("label",)


@pytest.mark.parametrize(
    "values",
    [
        {"positives": ("a", "b"), "negatives": ("c",)},
        {"positives": np.array(["a", "b"]), "negatives": np.array(["c"], dtype=object)},
        {"positives": '["a", "b"]', "negatives": '["c"]'},
        {"positives": ["a", "b"], "negatives": ["c", None, ""]},
    ],
    ids=["tuples", "arrays", "JSON in a text", "empty cells"],
)
def test_lists_are_read_from_whatever_holds_them(values):
    assert plain(read_source([{"query": "q", **values}])) == [("q", ("a", "b"), ("c",))]


@pytest.mark.parametrize("missing", [None, float("nan"), "", " ", []])
def test_a_row_without_a_wrong_document_has_none(missing):
    rows = [{"query": "q", "positive": "a", "negative": "c"}, {"query": "r", "positive": "b", "negative": missing}]
    assert plain(read_source(rows)) == [("q", ("a",), ("c",)), ("r", ("b",), ())]


@pytest.mark.parametrize(
    "labels", [[1, 0], [True, False], ["1", "0"], np.array([1.0, 0.0]), "[1, 0]", (Decimal(1), -1), [np.True_, False]]
)
def test_labels_of_candidates_are_numbers_in_whatever_they_are_held(tmp_path, labels):
    row = {"query": "q", "candidates": ["a", "c"], "labels": labels}
    assert plain(read_source([row])) == [("q", ("a",), ("c",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "q", "positive": "a", "negatives": "['c', 'd']"},
            "negatives is .*expected a list of strings, as valid JSON",
        ),
        ({"query": "q", "positives": "['a']"}, "positives is a str; expected a list of strings, as valid JSON"),
        ({"query": "q", "positive": None}, "positive is a NoneType; expected a string"),
        ({"query": float("nan"), "positive": "a"}, "query is a float; expected a string"),
        ({"query": "q", "positive": b"a"}, "positive is a bytes"),
        ({"query": "q", "positives": {"text": ["a"]}}, "positives is a dict"),
        ({"query": "q", "positives": ["a", None]}, "positives is a NoneType"),
        ({"query": "q", "candidates": ["a", "b"], "labels": [1, None]}, "labels are .* a list of numbers"),
        (
            {"query": "q", "candidates": ["a", "b"], "labels": [1, float("nan")]},
            "labels are .*; expected a list of numbers",
        ),
        ({"query": "q", "candidates": ["a", "b"], "labels": [1, 1e300]}, "labels are .* a list of numbers"),
        ({"query": "q", "candidates": ["a", "b"], "labels": "x"}, "labels are 'x'; expected a list of numbers"),
        ({"premise": "q", "hypothesis": "a", "label": ["x"]}, r"label is \['x'\]"),
        ({"premise": "q", "hypothesis": "a", "label": " "}, "label is ' '"),
        ({"premise": "q", "hypothesis": "a", "label": "nan"}, "label is 'nan'"),
        ({"sentence1": "q", "sentence2": "a", "score": "inf"}, "score is 'inf'; expected a number"),
        ({"sentence1": "q", "sentence2": "a", "score": True}, "score is True; expected a number"),
        ({"query": "q \ud83d", "positive": "a"}, "'query' holds half of a surrogate pair"),
        ({"query": "q", "positives": ["a", "b \udc00"]}, "'positives' holds half of a surrogate pair"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_row(row, message):
    with pytest.raises(DataError, match=f"mine, row 1: {message}"):
        read_source([{**row, **_sound(row)}, row], name="mine", label2id={"x": 0, "y": 1})


def _sound(row):
    """Return the row's fields with values that can be read."""
    sound = {"query": "q", "premise": "q", "sentence1": "q", "positive": "a", "hypothesis": "a", "sentence2": "a"}
    sound |= {
        "positives": ["a"],
        "candidates": ["a", "b"],
        "labels": [1, 0],
        "label": "x",
        "score": 1,
        "negatives": "c",
    }
    return {name: value for name, value in sound.items() if name in row}


def test_half_of_a_surrogate_pair_names_file_and_line(tmp_path):
    good, bad = {"query": "q", "positive": "p"}, {"query": "q", "positive": "bad \ud83d"}
    path = write(tmp_path / "a.jsonl", f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2.*half of a surrogate pair"):
        read_source(path)
    lists = {"query": "q", "candidates": ["bad \ud83d"], "labels": [1]}
    with pytest.raises(DataError, match=r"b\.jsonl, line 1.*half of a surrogate pair"):
        list(read_ranking_rows(write(tmp_path / "b.jsonl", json.dumps(lists))))


def test_true_and_false_are_classes_in_every_file(tmp_path):
    as_json = "\n".join(json.dumps({"premise": "a", "hypothesis": "b", "label": label}) for label in (True, False))
    as_csv = "premise,hypothesis,label\na,b,true\na,b,false\n"
    for path in (write(tmp_path / "a.jsonl", as_json), write(tmp_path / "a.csv", as_csv)):
        assert class_names(path) == {"true", "false"}
        source = read_source(path, label2id={"false": 0, "true": 1})
        assert [example.target for example in source.examples] == [1, 0]


def test_names_of_classes_lose_blanks_and_those_of_another_case_are_said(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "premise,hypothesis,label\na,b, yes\na,c,yes \na,d,Yes\na,e,no\n")
    assert class_names(path) == {"yes", "Yes", "no"}
    source = read_source(path, label2id={"Yes": 0, "no": 1, "yes": 2})
    assert [example.target for example in source.examples] == [2, 2, 0, 1]
    warn_of_similar_names(class_names(path), "data")
    assert "data: the classes 'Yes', 'yes' differ only in case or spaces" in caplog.text


def test_names_and_numbers_of_classes_are_not_mixed():
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in ("no", "1")]
    with pytest.raises(DataError, match="mine, row 1: label is '1', but that of mine, row 0 is a name; expected"):
        read_source(rows, name="mine", label2id={"no": 0, "yes": 1})


def test_right_documents_that_are_their_query_are_counted(caplog):
    rows = [{"query": "a", "positive": "a "}, {"query": "b", "positive": "c"}, {"query": "d", "positive": "d"}]
    read_source(rows, name="mine")
    assert [record.message for record in caplog.records] == [
        "mine: in 2 of 3 rows a right document is the query itself; the first: mine, row 0"
    ]


def test_wrong_documents_that_are_right_are_left_out_and_counted(caplog):
    rows = [
        {"query": "a", "positive": "b", "negatives": ["b ", "c", "e"]},
        {"query": " a", "positive": "e", "negatives": ["c"]},
        {"query": "f", "positive": "c", "negatives": ["b"]},
    ]
    source = read_source(rows, name="mine")
    assert [example.negatives for example in source.examples] == [("c",), ("c",), ("b",)]
    assert [example.known_right for example in source.examples] == [{"b", "e"}, {"b", "e"}, frozenset()]
    assert [record.message for record in caplog.records] == [
        "mine: 2 listed wrong documents are right for their query, in their own row or another, and are left out; "
        "the first: mine, row 0"
    ]


def test_a_candidate_listed_twice_counts_once_by_its_best_label():
    row = {"query": "q", "candidates": ["a", "a", "b", "b"], "labels": [1, 2, 0, 0]}
    (example,) = read_source([row, {"query": "r", "candidates": ["a"], "labels": [1]}]).examples[:1]
    assert example[:3] == ("q", ("a",), ("b",))
    assert example.grades == (2.0,)
    assert isinstance(example, Example)
