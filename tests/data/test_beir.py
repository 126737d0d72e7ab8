"""Folders in BEIR layout: as they are downloaded, with judgements and runs in their common forms, and bad ones."""

import gzip
import json
import logging

import pytest

from mixencoder.data.beir import read_beir
from mixencoder.errors import DataError
from mixencoder.evaluation import read_task
from tests.evaluation.evaluation_data import write, write_beir


@pytest.fixture
def folder(tmp_path):
    return write_beir(tmp_path / "beir")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bm25.test.run", "q1 Q0 w 1 9.5 r\n", "bm25.test.run, line 1: document 'w' is not in the corpus"),
        ("bm25.test.run", "q1 Q0 d7 1 high r\n", "line 1: score is 'high'; expected a number"),
        ("bm25.test.run", "q1 Q0 d7 1 nan r\n", "line 1: score is 'nan'; expected a number"),
        ("bm25.test.run", "q1 Q0 d7 1 -inf r\n", "line 1: score is '-inf'; expected a number"),
        (
            "bm25.test.run",
            "q1 Q0 d7 1 2 r\n\nq1 Q0 d7 2 1 r\n",
            "line 3: document 'd7' is listed twice for query 'q1', with 2 in line 1 and 1 here",
        ),
        ("bm25.test.run", "q1 Q0 d7\n", "line 1: 3 fields; expected 6"),
        ("other.test.run", "", "holds 2 files *.test.run[.gz], bm25.test.run, other.test.run"),
        ("qrels.test.tsv", "q9\td7\t1\n", "query 'q9' is judged in qrels.test.tsv but queries.test.jsonl lacks it"),
        ("qrels.test.tsv", "q1\td7\tx\n" * 2, "line 2: 'q1\\td7\\tx'; expected query-id, corpus-id, integer score"),
        ("qrels.test.tsv", "q1 d7 ²\n", "line 1: 'q1 d7 ²'; expected"),
        ("qrels.test.tsv", "q1 d7 --1\n", "line 1: 'q1 d7 --1'; expected"),
        ("qrels.test.tsv", "q1 d7 1.5\n", "line 1: 'q1 d7 1.5'; expected"),
        ("qrels.test.tsv", f"q1 d7 {'9' * 5000}\n", "line 1: 'q1 d7 999"),
        (
            "qrels.test.tsv",
            "a b c\nq1 d7 1\nq1 d1.5 2\nq1 d7 0\n",
            "line 4: document 'd7' is listed twice for query 'q1', with 1 in line 2 and 0 here",
        ),
        ("corpus.jsonl", '{"_id": "d7", "text": "a"}\n{"_id": "d7", "text": "b"}', "line 2: _id 'd7' has another text"),
        ("corpus.jsonl", '{"_id": "d7", "text": "\\ud83d"}', "corpus.jsonl, line 1: 'text' holds half of a surrogate"),
        ("queries.test.jsonl", '{"_id": null, "text": "b"}', "line 1: no text in '_id', fields are _id, text"),
    ],
)
def test_a_bad_folder_is_named_with_file_and_line(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_task(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        "q1\td1.5\t2\nq1\td7\t1\nq2\td7\t1\n",
        "query-id\tcorpus-id\tscore\nq1\td1.5\t2\nq1\td7\t1\nq2\td7\t1",
        "query-id corpus-id score \n\nq1 d1.5 2 \nq1\td7 1\t\r\nq2 \t d7\t1.0\n\n",
        "q1 0 d1.5 2\nq1\tQ0\td7\t+1.\nq2 0 d7 1.0\n",
        "q1 d1.5 2\nq1 d7 1\nq1 d7 1.0\nq2 d7 1\n",
    ],
    ids=["bare", "BEIR", "blanks and tabs", "TREC", "said twice alike"],
)
def test_judgements_are_read_in_every_common_form(folder, lines):
    (folder / "qrels.test.tsv").write_text(lines, newline="")
    assert read_beir(folder, "test").qrels == {"q1": {"d1.5": 2, "d7": 1}, "q2": {"d7": 1}}


def test_an_id_may_hold_blanks_where_tabs_separate(folder):
    (folder / "qrels.test.tsv").write_text("q1\td 7\t1\nq1\td1.5\t1\n")
    assert read_beir(folder, "test").qrels == {"q1": {"d 7": 1, "d1.5": 1}}


def test_a_run_is_ordered_by_its_scores_and_its_ranks_are_not_read(folder):
    lines = "q1 Q0 d7 x 1e-3 r\nq1\tQ0\td0.5\t1\t2\tr\n\nq1 Q0 d1.5 9 2.0 r \n"
    (folder / "bm25.test.run").write_text(lines)
    assert read_beir(folder, "test").run == {"q1": ["d0.5", "d1.5", "d7"]}


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_as_downloaded_is_read(folder, packed):
    (folder / "queries.test.jsonl").rename(folder / "queries.jsonl")
    (folder / "qrels").mkdir()
    (folder / "qrels.test.tsv").rename(folder / "qrels" / "test.tsv")
    expected = read_beir(folder, "test")
    if packed:
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()
    found = read_beir(folder, "test")
    assert (found.corpus, found.queries) == (expected.corpus, expected.queries)
    assert (found.qrels, found.run) == (expected.qrels, expected.run)
    task = read_task(folder)
    assert task.query_ids == ["q1", "q2"]
    assert all(path.is_file() for path in task.files)


def test_without_a_run_the_message_says_which_form_is_wanted_and_that_beir_has_none(folder):
    (folder / "bm25.test.run").unlink()
    with pytest.raises(DataError, match=r"BEIR's own folders lack.*`qid Q0 docid rank score tag`.*docs/files\.md"):
        read_task(folder)


def test_numbers_are_read_as_texts_and_a_title_may_be_missing(folder):
    rows = [
        {"_id": 1984, "title": 1984, "text": "orwell"},
        {"_id": "d2", "title": None, "text": 3.5},
        {"_id": "d3", "text": "bare"},
    ]
    write(folder / "corpus.jsonl", rows)
    write(folder / "queries.test.jsonl", [{"_id": 1, "text": 2001}])
    (folder / "qrels.test.tsv").write_text("1\t1984\t1\n")
    (folder / "bm25.test.run").write_text("1 Q0 1984 1 2 r\n1 Q0 d2 2 1 r\n")
    split = read_beir(folder, "test")
    assert split.corpus == {"1984": "1984 orwell", "d2": "3.5", "d3": "bare"}
    assert split.queries == {"1": "2001"}


def test_what_is_not_measured_is_counted_aloud(folder, caplog):
    (folder / "qrels.test.tsv").write_text("q1 d1.5 1\nq1 lost 1\n")
    (folder / "bm25.test.run").write_text("q1 Q0 d1.5 1 2 r\nq2 Q0 d1.5 1 2 r\n")
    with caplog.at_level(logging.WARNING):
        read_beir(folder, "test")
    assert [record.message for record in caplog.records] == [
        f"{folder}/qrels.test.tsv: 1 of 2 judgements are of documents that corpus.jsonl lacks; they count as not found",
        f"{folder}/bm25.test.run: 1 of 2 queries have no judgement and are not used",
    ]


def test_texts_that_may_hold_no_token_are_known_by_file_line_and_id(folder):
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    rows[1]["text"], rows[3]["text"] = " ", "\u200b"
    write(folder / "corpus.jsonl", rows)
    task = read_task(folder)
    # document 7 is no candidate, and the queries are question marks
    assert [suspect.where for suspect in task.suspects] == [
        f"{folder}/corpus.jsonl, line 2 (_id d1.50)",
        f"{folder}/queries.test.jsonl, line 1 (_id q1)",
        f"{folder}/queries.test.jsonl, line 2 (_id q2)",
    ]
