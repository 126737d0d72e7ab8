"""What faster products cost in quality:
``python -m benchmarks.index.products --data-dir DATA --device cpu-emerald-rapids-2-threads``.

The bundled checkpoint reranks the candidate lists of three sets through an index (projected, float16; bfloat16 for the
model in bfloat16) in every way that this processor supports. Reported: nDCG@10, and the share of float32's best ten
that is found again. Nothing is timed. Writes benchmarks/results/DEVICE/index_products.json.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.index.precision import ndcg, overlap
from benchmarks.measuring.machine import machine_facts
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from mixencoder import MixEncoder
from mixencoder.evaluation.tasks import RankingTask, read_task
from mixkernels.devices import multiplies_natively

SETS = ("rerank/scifact", "answers/wikiqa.test.jsonl.gz", "dialogue/ubuntu_irc_1in100.dev.jsonl.gz")
"""Relative to the folder of the data. The shipped model was trained on none of them."""
TOP_K = 10
MAX_TOKENS = 192
WAYS: dict[str, tuple[str, str]] = {
    "float32": ("float32", "native"),
    "bfloat16 products": ("float32", "bfloat16"),
    "int8 products": ("float32", "int8"),
    "bfloat16 model": ("bfloat16", "native"),
}
"""Name -> dtype of the model, products of the ranking."""


def best_tens(task: RankingTask, ways: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield for every way, in order, the ids of the best ten of every list, best first.

    Texts are encoded once for each dtype.
    """
    index, loaded = None, ""
    for way, (dtype, products) in ways.items():
        if dtype != loaded:
            engine, loaded = MixEncoder.from_pretrained(dtype=dtype).with_limits(max_document_length=MAX_TOKENS), dtype
            index = engine.index(
                task.documents,
                ids=map(str, range(len(task.documents))),
                precision="float16" if dtype == "float32" else dtype,
                store_text=False,
                show_progress_bar=False,
            )
        found = []
        for query, candidates, names in zip(task.queries, task.candidates, task.document_ids, strict=True):
            # a list may hold a document twice, an index holds it once
            distinct = dict(zip(map(str, candidates), names, strict=True))
            ranking = engine.rank(query, index, TOP_K, ids=list(distinct), prefilter=None, products=products)
            found.append([distinct[entry["id"]] for entry in ranking])
        yield way, found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args(arguments)
    native = multiplies_natively(torch.bfloat16)
    ways = {name: way for name, way in WAYS.items() if native or "bfloat16" not in way}
    document: dict[str, Any] = {
        "provenance": {
            "command": f"python -m benchmarks.index.products --data-dir DATA --queries {options.queries}",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": "bundled default",
            "max_document_length": MAX_TOKENS,
            "commit": commit(),
            "versions": versions(),
            "machine": machine_facts(),
        },
        "records": [],
    }
    for path in SETS:
        task = read_task(options.data_dir / path, limit=options.queries, sample=0)
        assert isinstance(task, RankingTask), "all sets hold candidate lists"
        qrels = {str(number): grades for number, grades in enumerate(task.qrels)}
        expected: list[list[str]] = []
        for name, best in best_tens(task, ways):
            expected = expected or best
            record = {"set": path, "way": name, "queries": len(task), "candidates": len(task.documents)}
            record |= {"ndcg_at_10": ndcg(qrels, best, qrels), "overlap_at_10": overlap(best, expected)}
            document["records"].append(record)
            print(record, flush=True)
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_products.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
