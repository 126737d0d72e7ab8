"""First stages of an index compared with the exact prefilter:
``python -m benchmarks.index.first_stage --data-dir DATA --device cpu-emerald-rapids-2-threads``.

The bundled model (or ``--model``) ranks the pool of `benchmarks.index.prefilter`: questions over replies of Ubuntu's
chat and answers of MedQuAD. Each first stage (`KINDS`) is compared with the exact prefilter of the same number of
documents, the default for ten results:

- recall: the share of the documents best by dual score that the first stage chooses too;
- other_set: the share of queries whose best ten after scoring in full are another set;
- seconds for one query, of the choice alone and of `rank` (the query is encoded already), medians of rounds in turns;
  of building; and bytes of a document.

Needs the extras faiss and usearch. The documents are encoded once into an index in ``--cache``; if interrupted, the
same command continues. Writes benchmarks/results/DEVICE/index_first_stage.json.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.index.prefilter import MAX_TOKENS, TOP_K, Collection, read_pool
from benchmarks.measuring.noise import quiet_medians
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from benchmarks.measuring.timing import interleaved_samples
from mixencoder import MixEncoder
from mixencoder.first_stage import VectorIndex
from mixencoder.first_stage.protocol import chosen_positions
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.ranking.candidate_buffer import Rows
from mixencoder.ranking.prefilter import chosen_prefilter
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import RowSource, StreamRanker

EXACT = "exact prefilter"
KINDS: dict[str, dict[str, Any]] = {
    "usearch, float16": {"kind": "usearch"},
    "FAISS, HNSW32": {"kind": "faiss"},
    "FAISS, IVF256,SQ8": {"kind": "faiss", "factory": "IVF256,SQ8"},
    "FAISS, Flat": {"kind": "faiss", "factory": "Flat"},
}
"""What a record calls a first stage -> options of `build_first_stage`."""
_TIMED = 10
"""Queries that are timed together."""


class ViewRows(RowSource):
    """The rows of a view, as an index is ranked."""

    def __init__(self, view: Snapshot) -> None:
        self._view = view

    def __iter__(self) -> Iterator[Rows]:
        for chunk in self._view.chunks(4096):
            yield torch.from_numpy(chunk.positions), chunk.fields

    def select(self, positions: torch.Tensor) -> Iterator[Rows]:
        chunk = self._view.gather(positions)
        yield torch.from_numpy(chunk.positions), chunk.fields


class Chooser(NamedTuple):
    """Chooses documents for a query without scoring them in full: exactly, or by a first stage."""

    engine: MixEncoder
    ranker: StreamRanker
    view: Snapshot
    kept: int

    def exact(self, query: str) -> np.ndarray:
        """The positions of the best by dual score, as the prefilter finds them."""
        states = self.engine.query_states([query])
        return self.ranker.rank(states, ViewRows(self.view), self.kept, score="dual").ids[0].numpy()

    def by(self, stage: VectorIndex, query: str) -> np.ndarray:
        """The positions that a first stage chooses."""
        found = []

        def choose(vectors: torch.Tensor) -> list[torch.Tensor]:
            found.extend(chosen_positions(stage, vectors, self.kept, len(self.view)))
            # nothing is scored
            return [positions[:0] for positions in found]

        self.ranker.rank_chosen(self.engine.query_states([query]), ViewRows(self.view), choose, 1)
        return found[0].numpy()


def index_of(engine: MixEncoder, collection: Collection, cache: Path) -> CandidateIndex:
    """Open the index of a collection in a folder, or build it there.

    Raises:
        SystemExit: the folder holds another collection.
    """
    documents = collection.documents
    if not (cache / "index.json").exists() or not CandidateIndex.read_manifest(cache).complete:
        engine.index(documents.values(), documents, cache, store_text=False, show_progress_bar=True).close()
    index = engine.open_index(cache, read_only=True)
    if list(index) != list(documents):
        raise SystemExit(f"{cache} holds other documents; delete it, or choose another --cache")
    return index


def compare(engine: MixEncoder, index: CandidateIndex, queries: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for the exact prefilter and one for each first stage."""
    view = index.snapshot()
    kept = chosen_prefilter("auto", len(view), TOP_K, has_dual=True)
    assert kept is not None, "there are too few documents for a prefilter"
    settings = index.settings
    ranker = StreamRanker(engine.model, RecordFormat(engine.model, settings["layout"], settings["precision"]))
    chooser = Chooser(engine, ranker, view, kept)
    exact = [chooser.exact(query) for query in queries]
    best = [best_ten(engine, view, query) for query in queries]
    common = {"documents": len(view), "queries": len(queries), "fully_scored": kept}
    records: list[dict[str, Any]] = [{**common, "stage": EXACT}]
    timed = queries[:: max(len(queries) // _TIMED, 1)][:_TIMED]
    calls = {EXACT: partial(each, chooser.exact, timed)}
    whole = {EXACT: partial(each, partial(engine.rank, documents=view, top_k=TOP_K), timed)}
    for name, options in KINDS.items():
        start = time.perf_counter()
        stage = engine.build_first_stage(view, **options)
        build = time.perf_counter() - start
        recall = [
            len(np.intersect1d(chooser.by(stage, query), truth)) / kept
            for query, truth in zip(queries, exact, strict=True)
        ]
        other = [
            best_ten(engine, view, query, first_stage=stage) != truth
            for query, truth in zip(queries, best, strict=True)
        ]
        record = {
            **common,
            "stage": name,
            "recall": sum(recall) / len(recall),
            "least_recall": min(recall),
            "other_set": sum(other) / len(other),
            "build_seconds": build,
            "bytes": size_of(stage) / len(view),
        }
        records.append(record)
        print(record, flush=True)
        calls[name] = partial(each, partial(chooser.by, stage), timed)
        whole[name] = partial(each, partial(engine.rank, documents=view, top_k=TOP_K, first_stage=stage), timed)
    for label, timings in (("choice_seconds", calls), ("rank_seconds", whole)):
        medians = quiet_medians(partial(interleaved_samples, timings, seconds=1.0, least=5, most=15))
        for record in records:
            record[label] = medians[record["stage"]] / len(timed)
    return records


def best_ten(engine: MixEncoder, view: Snapshot, query: str, **options: Any) -> set[int]:
    ranking = engine.rank(query, view, TOP_K, show_progress_bar=False, **options)
    return {entry["corpus_id"] for entry in ranking}


def each(call: Any, queries: Sequence[str]) -> None:
    for query in queries:
        call(query)


def size_of(stage: VectorIndex) -> int:
    """Bytes of a first stage's file."""
    with tempfile.TemporaryDirectory() as folder:
        stage.save(folder)
        return stage.info()["bytes"]


def libraries() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for name in ("usearch", "faiss-cpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index.first_stage", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with dialogue and answers")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--model", help="checkpoint with a dual term (default: the bundled one)")
    parser.add_argument("--queries", type=int, default=300, help="most queries")
    parser.add_argument("--limit", type=int, help="most documents of each source")
    parser.add_argument("--documents", type=int, help="most documents of the pool, in its order")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/first-stage"), help="folder for the encoded documents"
    )
    parser.add_argument("--encode-only", action="store_true", help="stop when the documents are encoded")
    options = parser.parse_args(arguments)
    engine = MixEncoder.from_pretrained(options.model)
    if not engine.config.dual_term:
        parser.error(f"{options.model} has no dual term, so nothing can be prefiltered")
    most_tokens = min(MAX_TOKENS, engine.config.backbone_config.max_position_embeddings)
    engine = engine.with_limits(max_document_length=most_tokens)
    collection = read_pool(options.data_dir, options.queries, options.limit)
    collection = collection._replace(documents=dict(list(collection.documents.items())[: options.documents]))
    index = index_of(engine, collection, options.cache)
    print(f"{len(index):,} documents, {len(collection.queries)} queries", flush=True)
    if options.encode_only:
        return
    limit = "" if options.limit is None else f" --limit {options.limit}"
    limit += "" if options.documents is None else f" --documents {options.documents}"
    document = {
        "provenance": {
            "command": f"python -m benchmarks.index.first_stage --data-dir DATA --queries {options.queries}{limit}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": "bundled default" if options.model is None else Path(options.model).name,
            "max_document_length": most_tokens,
            "top_k": TOP_K,
            "commit": commit(),
            "versions": {**versions(), **libraries()},
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "timing": "in one process, medians of interleaved rounds; one query at a time, files cached by the system",
        },
        "records": compare(engine, index, list(collection.queries.values())),
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_first_stage.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
