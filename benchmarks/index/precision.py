"""Quality by stored precision, layout, int8 products and prefilter:
``python -m benchmarks.index.precision BEIR_FOLDER --device cpu-zen3-2-threads``.

The bundled checkpoint ranks the folder's whole corpus for some of its test queries through an index of every format.
Reported: bytes per candidate, nDCG@10, and the share of float32's best ten that are found again. Writes
benchmarks/results/DEVICE/index_precision.json.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ir_measures
import torch

from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from mixencoder import MixEncoder
from mixencoder.data.beir import read_beir
from mixencoder.index import CandidateIndex

FORMATS = [(layout, precision) for layout in ("projected", "compact") for precision in
           ("float32", "float16", "bfloat16", "int8")]  # fmt: skip
PREFILTERS = (20, 50, 100, 200, 500)
TOP_K = 10


def measure(
    engine: MixEncoder, index: CandidateIndex, queries: dict[str, str], qrels: dict[str, dict[str, int]], **options: Any
) -> dict[str, Any]:
    """Quality and time per query of one way to rank."""
    engine.query_states(list(queries.values()))
    options = {"prefilter": None, **options}
    start = time.perf_counter()
    rankings = [engine.rank(text, index, TOP_K, **options) for text in queries.values()]
    seconds = (time.perf_counter() - start) / len(queries)
    best = [[entry["id"] for entry in ranking] for ranking in rankings]
    return {"ndcg_at_10": ndcg(queries, best, qrels), "seconds_per_query": seconds, "best": best}


def ndcg(queries: Iterable[str], best: Iterable[Sequence[str]], qrels: dict[str, dict[str, int]]) -> float:
    """nDCG@10, mean over queries, which are given by id, each with the ids of its best documents in order."""
    run = {
        query: {name: float(-rank) for rank, name in enumerate(names)}
        for query, names in zip(queries, best, strict=True)
    }
    found = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], {name: qrels[name] for name in run}, run)
    return float(next(iter(found.values())))


def overlap(found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """Share of the expected best candidates that are found, mean over queries."""
    shares = [len({*one} & {*other}) / len(other) for one, other in zip(found, expected, strict=True)]
    return sum(shares) / len(shares)


def run(folder: Path, count: int) -> dict[str, Any]:
    engine = MixEncoder.from_pretrained().with_limits(max_document_length=192)
    split = read_beir(folder, "test")
    queries = {name: split.queries[name] for name in list(split.qrels)[:count]}
    ids, texts = list(split.corpus), list(split.corpus.values())
    embeddings = engine.encode_document(texts, show_progress_bar=True)
    records, expected = [], None
    for layout, precision in FORMATS:
        index = engine.index(ids=ids, embeddings=embeddings, layout=layout, precision=precision, store_text=False)
        ways: list[dict[str, Any]] = [{}]
        if (layout, precision) == ("projected", "float16"):
            ways += [{"products": "int8"}, *({"prefilter": kept} for kept in PREFILTERS), {"score": "dual"}]
        for options in ways:
            record = measure(engine, index, queries, split.qrels, **options)
            expected = expected or record["best"]
            record["overlap_at_10"] = overlap(record.pop("best"), expected)
            record |= {"layout": layout, "precision": precision, **options}
            record["bytes_per_candidate"] = index.info()["row_bytes"]
            records.append(record)
            print(record, flush=True)
    return {"candidates": len(ids), "queries": len(queries), "records": records}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args(arguments)
    document = {
        "provenance": {
            "command": f"python -m benchmarks.index.precision {options.folder.name} --queries {options.queries}",
            "model": "bundled default",
            "max_document_length": 192,
            "commit": commit(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        },
        **run(options.folder, options.queries),
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_precision.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
