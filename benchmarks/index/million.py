"""A million candidates on disk: ``python -m benchmarks.index.million --device cpu-zen3-2-threads``.

Uses random embeddings, since encoding a million texts takes a day on two cores. Compact float16 records: time to fill,
to open, to rank all candidates and to rank with the default prefilter, bytes of the array files and of the arrays in
them, and the process's anonymous memory before ranking and its peak while ranking all. Linux only. Writes
benchmarks/results/DEVICE/index_million.json.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from mixencoder import MixEncoder

BLOCK = 50_000
TOP_K = 10


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class PeakMemory:
    """Measures the peak of anonymous memory inside a with block."""

    def __enter__(self) -> "PeakMemory":
        self.most, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._done.wait(0.05):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def run(count: int) -> dict[str, Any]:
    engine = MixEncoder.from_pretrained()
    generator = torch.Generator().manual_seed(0)
    shape = (engine.config.num_context_embeddings, engine.config.hidden_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        start = time.perf_counter()
        options = {"layout": "compact", "store_text": False}
        index = engine.index(embeddings=torch.randn(BLOCK, *shape, generator=generator), path=path, **options)
        for _ in range(count // BLOCK - 1):
            index.add(embeddings=torch.randn(BLOCK, *shape, generator=generator))
        filled = time.perf_counter() - start
        found = index.info()
        index.close()
        files = sum(file.stat().st_size for file in path.glob("generation-*/shard-*"))
        start = time.perf_counter()
        index = engine.open_index(path, read_only=True)
        documents = len(index.snapshot())
        opened = time.perf_counter() - start
        # the first ranking prepares weights and buffers
        engine.rank("what is this about", index, TOP_K, ids=list(index.snapshot().ids(range(1000))), prefilter=None)
        before = anonymous_bytes()
        with PeakMemory() as peak:
            start = time.perf_counter()
            engine.rank("how does this end", index, TOP_K, prefilter=None)
            ranked = time.perf_counter() - start
        start = time.perf_counter()
        engine.rank("how does this end", index, TOP_K, prefilter="auto")
        prefiltered = time.perf_counter() - start
    return {
        "documents": documents,
        "seconds": {"fill": filled, "open": opened, "rank": ranked, "rank with prefilter": prefiltered},
        "array_file_bytes": files,
        "array_bytes": documents * found["row_bytes"],
        "catalogue_bytes": found["catalogue_bytes"],
        "anonymous_bytes": {"before ranking": before, "most while ranking": peak.most},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args(arguments)
    document = {
        "provenance": {
            "command": f"python -m benchmarks.index.million --count {options.count}",
            "model": "bundled default",
            "candidates": "given embeddings, random",
            "commit": commit(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        },
        **run(options.count),
    }
    print(document)
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_million.json", document)


if __name__ == "__main__":
    main(sys.argv[1:])
