"""What shards cost: the same documents as one index, as shards read as one, and as shards in Ray actors.

``python -m benchmarks.index.sharded --data-dir DATA --device cpu-emerald-rapids-2-threads``

Real texts (those of `benchmarks.index.prefilter`) are encoded once, by the bundled model. The same rows make one index
and `--shards` shards. Every way to rank answers the same queries in turns, each from its text, with and without the
default prefilter; medians are recorded. Every ranking must equal that of the one index, bit for bit. An actor of Ray
has one thread, this process as many as PyTorch uses. Needs Ray (extra ``ray``).

`--prepare` only encodes, into the folder `--folder`; a later run with the same options takes the indexes from there, so
that it is short. Writes benchmarks/results/DEVICE/index_sharded.json.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.index.prefilter import MAX_TOKENS, read_pool
from benchmarks.measuring.noise import spread
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from benchmarks.measuring.timing import interleaved_samples
from mixencoder import MixEncoder
from mixencoder.ranking.query_cache import QueryStateCache

TOP_K, QUERIES, FEW, BLOCK = 10, 20, 2, 500
"""Results, different queries, shards of the second way with Ray (one per core), and texts encoded at once."""
ONE, READ_AS_ONE, ACTORS, FEW_ACTORS = "one", "read as one", "actors", "few actors"

Rank = Callable[[str], list[dict[str, Any]]]


def prepare(engine: MixEncoder, data: Path, documents: int, shards: int, folder: Path) -> list[str]:
    """Encode texts into the indexes of the folder, unless they are there; return the queries."""
    done = folder / "queries.json"
    if not done.exists():
        collection = read_pool(data, QUERIES, documents // 2)
        texts, ids = list(collection.documents.values()), list(collection.documents)
        embeddings = torch.cat([encoded(engine, texts, first, folder) for first in range(0, len(texts), BLOCK)])
        for name, number in (("one", 1), ("many", shards), ("few", FEW)):
            bounds = [len(texts) * part // number for part in range(number + 1)]
            for part, (first, last) in enumerate(itertools.pairwise(bounds)):
                path = folder / name / (f"shard-{part:03d}" if number > 1 else "")
                rows = slice(first, last)
                engine.index(texts[rows], ids[rows], path, embeddings=embeddings[rows]).close()
        write_json(done, {"queries": list(collection.queries.values())})
    return json.loads(done.read_text(encoding="utf-8"))["queries"]


def encoded(engine: MixEncoder, texts: Sequence[str], first: int, folder: Path) -> torch.Tensor:
    """The embeddings of a block of texts: taken from the folder, or made, so that an interrupted run continues."""
    path = folder / f"block-{first:06d}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(engine.encode_document(texts[first : first + BLOCK], show_progress_bar=False), path)
        print(f"{first} of {len(texts)} texts are encoded", flush=True)
    return torch.load(path)


def timed_calls(ways: dict[str, Rank], queries: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Calls that rank the next query each time: every way gets all queries in the same order."""

    def call(rank: Rank) -> Callable[[], object]:
        remaining = itertools.cycle(queries)
        return lambda: rank(next(remaining))

    return {name: call(rank) for name, rank in ways.items()}


def ways_to_rank(
    engine: MixEncoder, one: Any, many: Any, actors: Any, few: Any, prefilter: str | None
) -> dict[str, Rank]:
    """Return the ways to rank a query, by name: two indexes in this process, and two `RayShards`."""
    return {
        ONE: lambda query: engine.rank(query, one, TOP_K, prefilter=prefilter),
        READ_AS_ONE: lambda query: engine.rank(query, many, TOP_K, prefilter=prefilter),
        ACTORS: lambda query: actors.rank(query, TOP_K, prefilter=prefilter).rankings[0],
        FEW_ACTORS: lambda query: few.rank(query, TOP_K, prefilter=prefilter).rankings[0],
    }


def measure(
    engine: MixEncoder, folder: Path, queries: Sequence[str], seconds: float
) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of documents, and a record for each prefilter.

    Raises:
        AssertionError: a ranking differs from that of the one index.
    """
    from mixencoder.distributed.ray_shards import RayShards

    records = []
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(engine.open_index(folder / "one", read_only=True))
        many = stack.enter_context(engine.open_index(folder / "many", read_only=True))
        actors = stack.enter_context(RayShards(engine, folder / "many"))
        few = stack.enter_context(RayShards(engine, folder / "few"))
        for prefilter in (None, "auto"):
            ways = ways_to_rank(engine, one, many, actors, few, prefilter)
            for query in queries:
                expected = ways[ONE](query)
                print(".", end="", flush=True)
                for name, rank in ways.items():
                    assert rank(query) == expected, f"{name} ranks {query!r} otherwise than one index"
            samples = interleaved_samples(timed_calls(ways, queries), seconds=seconds, least=len(queries), most=400)
            record = {
                "prefilter": prefilter,
                "seconds": {name: median(times) for name, times in samples.items()},
                "spread": {name: spread(times) for name, times in samples.items()},
                "samples": {name: len(times) for name, times in samples.items()},
            }
            print(record, flush=True)
            records.append(record)
        return len(one), records


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index.sharded", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with dialogue and answers")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--documents", type=int, default=10_000, help="about how many texts")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="rough time to spend on each way")
    parser.add_argument("--folder", type=Path, help="where the indexes are (default: made for this run)")
    parser.add_argument("--prepare", action="store_true", help="only make what --folder holds")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = MixEncoder.from_pretrained().with_limits(max_document_length=MAX_TOKENS)
        queries = prepare(engine, options.data_dir, options.documents, options.shards, folder)
        if options.prepare:
            return
        # Ray reports its usage to its makers unless this is set
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        # as many actors as are wanted, whatever the number of cores: they share them
        ray.init(num_cpus=options.shards + FEW, include_dashboard=False, configure_logging=False)
        # encode every query again, as if it were new
        engine._query_states = QueryStateCache(max_bytes=0)
        documents, records = measure(engine, folder, queries, options.seconds)
        ray.shutdown()
    document = {
        "provenance": {
            "command": "python -m benchmarks.index.sharded --data-dir DATA",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": "bundled default",
            "commit": commit(),
            "versions": versions() | {"ray": ray.__version__},
            "threads": torch.get_num_threads(),
        },
        "documents": documents,
        "shards": options.shards,
        "few": FEW,
        "queries": len(queries),
        "top_k": TOP_K,
        "records": records,
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_sharded.json", document)


if __name__ == "__main__":
    main()
