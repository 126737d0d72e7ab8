"""Time of a query for each contender: ``python -m benchmarks.comparison.latency --backbone MINILM --device NAME``.

A query of 16 tokens against 1,000 candidates of 128, float32: from the query's text to the best ten. Candidates are
encoded ahead and held in memory where the architecture allows it, MixEncoder's in an index with default settings
(projected, float16) and fully scored; "mixencoder, prefilter" is the same index with the default prefilter. In turns,
medians. Untrained models take the same time as trained ones.
Writes benchmarks/results/DEVICE/comparison_latency.json.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison.settings import CONTENDERS
from benchmarks.index.speed import texts_of
from benchmarks.measuring.noise import NoisyMeasurementError, quiet_medians
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from benchmarks.measuring.timing import interleaved_samples
from mixencoder import MixEncoder
from mixencoder.architectures import engine_class
from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.engine import Engine
from mixencoder.ranking.query_cache import QueryStateCache

CANDIDATES, QUERY_TOKENS, DOCUMENT_TOKENS, TOP_K = 1000, 16, 128, 10
PAIRS = 100
"""Pairs on which a model without encoded candidates is timed; its time is scaled to `CANDIDATES`."""


def stored_bytes(candidates: Any) -> int:
    """Bytes of the tensors that encoded candidates hold."""
    if isinstance(candidates, Tensor):
        return candidates.nbytes
    parts = candidates if isinstance(candidates, tuple | list) else vars(candidates).values()
    return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor | tuple | list))


def measure(backbone: Path) -> dict[str, Any]:
    """Return {contender: seconds of a query, bytes per candidate (None: it stores only the text)}.

    Raises:
        NoisyMeasurementError: times stayed too far apart.
    """
    engines: dict[str, Engine] = {}
    calls: dict[str, Callable[[], object]] = {}
    scale, sizes = {}, {}
    for name, contender in CONTENDERS.items():
        if contender.teacher is None:
            engines[name] = engine_class(contender.architecture).from_backbone(backbone, **contender.config)
    for name, engine in engines.items():
        query = texts_of(engine, QUERY_TOKENS, 1, seed=3)
        documents = texts_of(engine, DOCUMENT_TOKENS, CANDIDATES, seed=4)
        if isinstance(engine, EncodingEngine):
            scale[name] = 1.0
            if isinstance(engine, MixEncoder):
                # encode every query again, without a cache
                engine._query_states = QueryStateCache(max_bytes=0)
                index = engine.index(documents)
                sizes[name] = index.info()["row_bytes"]
                calls[name] = partial(engine.rank, query, index, TOP_K, prefilter=None)
                if engine.config.dual_term:
                    quick = f"{name}, prefilter"
                    scale[quick], sizes[quick] = scale[name], sizes[name]
                    calls[quick] = partial(engine.rank, query, index, TOP_K, prefilter="auto")
                continue
            candidates = engine.encode_document(documents)
            sizes[name] = stored_bytes(candidates) / CANDIDATES
            calls[name] = lambda engine=engine, query=query, candidates=candidates: engine.interact(
                engine.encode_query(query), candidates
            ).topk(TOP_K)
        else:
            pairs = [(query[0], document) for document in documents[:PAIRS]]
            sizes[name] = None
            scale[name] = CANDIDATES / PAIRS
            calls[name] = lambda engine=engine, pairs=pairs: engine.predict(pairs)
    medians = quiet_medians(lambda: interleaved_samples(calls, seconds=3.0))
    return {
        name: {"seconds": seconds * scale[name], "bytes_per_candidate": sizes[name]}
        for name, seconds in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.latency", description=__doc__)
    parser.add_argument("--backbone", type=Path, required=True, help="encoder that all contenders start from")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    options = parser.parse_args()
    try:
        found = measure(options.backbone)
    except NoisyMeasurementError as error:
        sys.exit(f"nothing is recorded: {error}")
    path = ROOT / "benchmarks" / "results" / options.device / "comparison_latency.json"
    write_json(
        path,
        {
            "shape": {"N": CANDIDATES, "m": QUERY_TOKENS, "n": DOCUMENT_TOKENS, "pairs of joint models": PAIRS},
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "contenders": found,
        },
    )
    for name, entry in found.items():
        print(f"{name}: {entry['seconds'] * 1000:.1f} ms, {entry['bytes_per_candidate']} bytes a candidate")


if __name__ == "__main__":
    main()
