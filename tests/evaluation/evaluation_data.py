"""Small data of every kind that evaluation reads, with words that the tests' tokenizer knows."""

import json
from pathlib import Path

LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2}
LISTS = [
    {"query": "the cat", "candidates": ["the cat sat", "boil rice", "git commit"], "labels": [1, 0, 0]},
    {"query": "paris", "candidates": ["cook", "the capital of france", "the cat sat"], "labels": [0, 2, 1]},
    {"query": "undo", "candidates": ["git commit", "a dog"], "labels": [1, 0]},
]
LABELLED = [
    {"premise": "the cat sat", "hypothesis": "a cat sat", "label": "entailment"},
    {"premise": "the cat sat", "hypothesis": "a dog", "label": "contradiction"},
    {"premise": "boil water", "hypothesis": "cook rice", "label": "neutral"},
]
SCORED = [
    {"sentence1": "the cat sat", "sentence2": "a cat sat", "score": 5.0},
    {"sentence1": "the cat sat", "sentence2": "git commit", "score": 0.0},
    {"sentence1": "boil water", "sentence2": "cook rice", "score": 2.5},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_beir(folder: Path) -> Path:
    """Two judged queries: one has a right document that the first stage missed, one has no first stage at all."""
    folder.mkdir()
    corpus = [{"_id": f"d{text}", "title": "", "text": text} for text in ("1.5", "1.50", "0.5", "7")]
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.test.jsonl", [{"_id": "q1", "text": "?"}, {"_id": "q2", "text": "??"}])
    (folder / "qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1.5\t2\nq1\td7\t1\nq2\td7\t1\n")
    (folder / "bm25.test.run").write_text("q1 Q0 d1.5 1 9.5 r\nq1 Q0 d1.50 2 8.5 r\nq1 Q0 d0.5 3 9 r\n")
    return folder
