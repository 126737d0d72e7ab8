"""In how many queries a prefilter changes the best ten:
``python -m benchmarks.index.prefilter --data-dir DATA --device cpu-emerald-rapids-2-threads``.

A model (the bundled one, or ``--model``) ranks two collections in the index's default format, and every prefilter is
compared with scoring all documents: the share of queries whose best ten differ (as a set, and in order), the mean
overlap of the two, and nDCG@10 where there are judgements. Nothing is timed.

- scifact: ``DATA/rerank/scifact``, its corpus and test queries.
- pool: answers of ``DATA/dialogue/ubuntu_irc.train.jsonl.gz`` and ``DATA/answers/medquad.train.jsonl.gz``, each text
  once, and parts of them. Half of the queries are of Ubuntu's dev set, half are MedQuAD's training questions.

Scores do not depend on what else is ranked (docs/determinism.md). So each query is ranked twice, by full and by dual
score, and all prefilters and parts follow; the default ``prefilter="auto"`` is also called and must agree.
Writes benchmarks/results/DEVICE/index_prefilter.json.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.index.precision import ndcg, overlap
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from mixencoder import MixEncoder
from mixencoder.data.beir import read_beir
from mixencoder.data.tables import read_rows
from mixencoder.index import CandidateIndex
from mixencoder.ranking.prefilter import chosen_prefilter

TOP_K = 10
PREFILTERS = (25, 50, 100, 200, 400)
COUNTS = (1000, 5000, 20_000)
"""Sizes of the parts of the pool, besides all of it."""
MAX_TOKENS = 192
"""Most tokens that are read of a document, as in `benchmarks.index.precision`."""


class Collection(NamedTuple):
    """Documents and queries, both by id."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: dict[str, dict[str, int]] | None
    """None: there are no judgements."""
    counts: Sequence[int]
    """Numbers of documents to rank, besides all; such a part is spread evenly over the collection."""


class Scores(NamedTuple):
    """Scores of all documents for all queries, (Q, N) float32 each, and the best ten that `rank` finds by default."""

    full: np.ndarray
    dual: np.ndarray
    default: list[list[int]]


def read_scifact(data: Path, queries: int, limit: int | None) -> Collection:
    split = read_beir(data / "rerank" / "scifact", "test")
    names = list(split.qrels)[:queries]
    documents = dict(list(split.corpus.items())[:limit])
    return Collection(documents, {name: split.queries[name] for name in names}, split.qrels, ())


def read_pool(data: Path, queries: int, limit: int | None) -> Collection:
    ubuntu = _column(data / "dialogue" / "ubuntu_irc.train.jsonl.gz", "positive", limit)
    medquad = _column(data / "answers" / "medquad.train.jsonl.gz", "positive", limit)
    asked = [
        *_spread(_column(data / "dialogue" / "ubuntu_irc_1in10.dev.jsonl.gz", "query"), queries - queries // 2),
        *_spread(_column(data / "answers" / "medquad.train.jsonl.gz", "query"), queries // 2),
    ]
    texts = dict.fromkeys([*ubuntu, *medquad])
    return Collection(_numbered(texts), _numbered(asked), None, [count for count in COUNTS if count < len(texts)])


def _column(path: Path, name: str, limit: int | None = None) -> list[str]:
    rows = [row[name] for _, row in read_rows(path)]
    return rows if limit is None else _spread(rows, limit)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` of the texts, evenly spread."""
    return [texts[position] for position in _positions(len(texts), min(count, len(texts)))]


def _positions(total: int, count: int) -> np.ndarray:
    return np.arange(count) * total // count


def _numbered(texts: Any) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts)}


def score(engine: MixEncoder, index: CandidateIndex, queries: Sequence[str]) -> Scores:
    """Rank the whole index for every query, by each score."""
    shape = len(queries), len(index)
    found = {name: np.empty(shape, np.float32) for name in ("full", "dual")}
    default = []
    for number, query in enumerate(queries):
        for name, scores in found.items():
            for entry in engine.rank(query, index, prefilter=None, score=name, show_progress_bar=False):
                scores[number, entry["corpus_id"]] = entry["score"]
        default.append([entry["corpus_id"] for entry in engine.rank(query, index, TOP_K, show_progress_bar=False)])
        if number % 20 == 0:
            print(f"{number} of {len(queries)} queries are ranked", flush=True)
    return Scores(**found, default=default)


def best_ten(full: np.ndarray, dual: np.ndarray, positions: np.ndarray, prefilter: int | None) -> list[int]:
    """The best ten for one query among the documents at ascending positions, as `MixEncoder.rank` finds them."""
    if prefilter is not None:
        positions = np.sort(positions[np.argsort(-dual[positions], kind="stable")[:prefilter]])
    return positions[np.argsort(-full[positions], kind="stable")[:TOP_K]].tolist()


def compare(scores: Scores, collection: Collection) -> Iterator[dict[str, Any]]:
    """Yield a record for every number of documents and every prefilter.

    Raises:
        AssertionError: `rank` finds something else by default.
    """
    total, names = scores.full.shape[1], list(collection.documents)
    for count in (*collection.counts, total):
        positions = _positions(total, count)
        auto = chosen_prefilter("auto", count, TOP_K, has_dual=True)
        ways = {"all": None, **{str(kept): kept for kept in PREFILTERS if kept < count}, "auto": auto}
        best = {
            way: [best_ten(full, dual, positions, kept) for full, dual in zip(scores.full, scores.dual, strict=True)]
            for way, kept in ways.items()
        }
        if count == total and best["auto"] != scores.default:
            raise AssertionError(f"rank(..., {TOP_K}) does not find what prefilter={auto} finds")
        for way, found in best.items():
            pairs = list(zip(found, best["all"], strict=True))
            record = {
                "documents": count,
                "prefilter": way,
                "fully_scored": count if ways[way] is None else ways[way],
                "other_set": sum({*one} != {*other} for one, other in pairs) / len(pairs),
                "other_order": sum(one != other for one, other in pairs) / len(pairs),
                "overlap_at_10": overlap(found, best["all"]),
            }
            if collection.qrels is not None:
                named = [[names[position] for position in ranking] for ranking in found]
                record["ndcg_at_10"] = ndcg(collection.queries, named, collection.qrels)
            yield record


def run(engine: MixEncoder, data: Path, queries: int, limit: int | None) -> list[dict[str, Any]]:
    records = []
    for name, read in (("scifact", read_scifact), ("pool", read_pool)):
        collection = read(data, queries, limit)
        print(f"{name}: {len(collection.documents)} documents, {len(collection.queries)} queries", flush=True)
        embeddings = engine.encode_document(list(collection.documents.values()), show_progress_bar=True)
        index = engine.index(ids=collection.documents, embeddings=embeddings, store_text=False)
        for record in compare(score(engine, index, list(collection.queries.values())), collection):
            records.append({"collection": name, "queries": len(collection.queries), **record})
            print(records[-1], flush=True)
    return records


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index.prefilter", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with rerank, dialogue and answers")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--model", help="checkpoint with a dual term (default: the bundled one)")
    parser.add_argument("--queries", type=int, default=300, help="most queries of a collection")
    parser.add_argument("--limit", type=int, help="most documents of each source, to try the command")
    options = parser.parse_args(arguments)
    engine = MixEncoder.from_pretrained(options.model)
    if not engine.config.dual_term:
        parser.error(f"{options.model} has no dual term, so nothing can be prefiltered")
    most_tokens = min(MAX_TOKENS, engine.config.backbone_config.max_position_embeddings)
    engine = engine.with_limits(max_document_length=most_tokens)
    limit = "" if options.limit is None else f" --limit {options.limit}"
    document = {
        "provenance": {
            "command": f"python -m benchmarks.index.prefilter --data-dir DATA --queries {options.queries}{limit}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": "bundled default" if options.model is None else Path(options.model).name,
            "max_document_length": most_tokens,
            "top_k": TOP_K,
            "commit": commit(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        },
        "records": run(engine, options.data_dir, options.queries, options.limit),
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_prefilter.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
