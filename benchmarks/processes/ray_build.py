"""Building an index with Ray beside a plain build, and what a killed worker costs, on this machine.

``python -m benchmarks.processes.ray_build --data-dir DATA --device cpu-emerald-rapids-2-threads --documents 50000``

Real texts (of DATA/dialogue, answers, pairs and nli) are encoded by the bundled model into an index in the default
format, in three stages:

- plain: `MixEncoder.index` with `--workers` threads.
- ray: `mixencoder.distributed.ray_build.build_index` with `--workers` actors of one thread each.
- killed: the same, and one actor is killed (SIGKILL) when half of the shards are complete.

After each stage with Ray the rows, ids and texts are compared with those of the plain build; a difference is an error.
Each stage is recorded as it finishes, and a recorded one is left out when the command is run again; `--stage` runs one
alone. Needs Ray (extra ``ray``) and Linux. Writes benchmarks/results/DEVICE/ray_build.json.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from mixencoder import CandidateIndex, MixEncoder
from mixencoder.data.candidates import iterate_candidates
from mixencoder.data.tables import read_rows

PLAIN, RAY, KILLED = "plain", "ray", "killed"
STAGES = (PLAIN, RAY, KILLED)
SHARDS, FILES, LEAST_CHARACTERS, COMPARED = 10, 5, 20, 1000
"""Shards and files of a build, least characters of a text, and documents compared at once."""


def write_texts(data: Path, count: int, folder: Path) -> None:
    """Write distinct texts, evenly spread over the data, to files with ids."""
    if (folder / f"{FILES - 1}.jsonl").exists():
        return
    found: dict[str, None] = {}
    for kind in ("dialogue", "answers", "pairs", "nli"):
        for path in sorted((data / kind).glob("*.train.jsonl.gz")):
            for _, row in read_rows(path):
                found.update(
                    (value, None) for value in row.values() if isinstance(value, str) and len(value) >= LEAST_CHARACTERS
                )
    texts = list(found)
    if len(texts) < count:
        raise SystemExit(f"the data hold {len(texts):,} texts; --documents may be at most that")
    chosen = [texts[number * len(texts) // count] for number in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(FILES):
        rows = range(file * count // FILES, (file + 1) * count // FILES)
        lines = [json.dumps({"id": f"t{number}", "text": chosen[number]}) for number in rows]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_plain(texts: Path, out: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    engine = MixEncoder.from_pretrained()
    loaded = time.perf_counter()
    rows = [row for file in sorted(texts.glob("*.jsonl")) for row in iterate_candidates(str(file))]
    engine.index((text for text, _ in rows), (id for _, id in rows), out, show_progress_bar=False).close()
    end = time.perf_counter()
    return {"seconds": end - begin, "parts": {"model": loaded - begin, "encoding and writing": end - loaded}}


class Watcher:
    """Notes when the first shard is begun and when each is complete; kills a worker when half of them are."""

    def __init__(self, out: Path, *, kill: bool) -> None:
        self.first: float | None = None
        self.complete: dict[str, float] = {}
        self.killed: float | None = None
        self._out, self._kill, self._done = out, kill, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            now = time.perf_counter()
            names = [path.name for path in self._out.glob("*")] if self._out.exists() else []
            if self.first is None and any(name.startswith(".shard-") for name in names):
                self.first = now
            for name in names:
                if name.startswith("shard-"):
                    self.complete.setdefault(name, now)
            due = self._kill and self.killed is None and len(self.complete) >= SHARDS // 2
            if due and (found := actor_processes("_ShardEncoder")):
                os.kill(found[0], signal.SIGKILL)
                self.killed = now


def actor_processes(name: str) -> list[int]:
    """Return the process ids of Ray's actors of a class; Ray gives its processes such titles."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and re.search(rb"\b%s\b" % name.encode(), title):
            found.append(int(folder.name))
    return found


def build_with_ray(texts: Path, out: Path, documents: int, workers: int, *, kill: bool) -> dict[str, Any]:
    """Build, and return the seconds of the whole and of its parts.

    Raises:
        RuntimeError: no worker could be killed.
    """
    begin = time.perf_counter()
    engine = MixEncoder.from_pretrained()
    loaded = time.perf_counter()
    # Ray reports its usage to its makers unless this is set
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    import ray.data

    from mixencoder.distributed.ray_build import Workers, build_index

    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.init(num_cpus=workers, include_dashboard=False, configure_logging=False)
    started = time.perf_counter()
    try:
        with Watcher(out, kill=kill) as watcher:
            options: dict[str, Any] = {"shard_rows": documents // SHARDS, "workers": Workers(workers)}
            built = build_index(engine, out, str(texts / "*.jsonl"), **options)
            end = time.perf_counter()
    finally:
        ray.shutdown()
    first = end if watcher.first is None else watcher.first
    last = max(watcher.complete.values(), default=end)
    parts = {
        "model": loaded - begin,
        "start of Ray": started - loaded,
        "until the first shard is begun": first - started,
        "shards": last - first,
        "list of shards": end - last,
    }
    found = {"seconds": end - begin, "parts": parts, "shards": built.shards, "ray": ray.__version__}
    if kill:
        if watcher.killed is None:
            raise RuntimeError("no worker was found to be killed")
        found["killed after"] = watcher.killed - begin
    return found


def compare(plain: Path, sharded: Path) -> int:
    """Compare all documents of two indexes, and return their number.

    Raises:
        AssertionError: they differ.
    """
    engine = MixEncoder.from_pretrained()
    with engine.open_index(plain, read_only=True) as one, engine.open_index(sharded, read_only=True) as many:
        views = [index.snapshot() for index in (one, many)]
        assert len(views[0]) == len(views[1]), "the numbers of documents differ"
        for first in range(0, len(views[0]), COMPARED):
            positions = range(first, min(first + COMPARED, len(views[0])))
            expected, found = (view.gather(positions).fields for view in views)
            assert expected.keys() == found.keys()
            assert all(torch.equal(rows, found[name]) for name, rows in expected.items()), f"rows from {first} differ"
            assert views[0].entries_of(positions) == views[1].entries_of(positions), f"entries from {first} differ"
        return len(views[0])


def run_stage(stage: str, folder: Path, documents: int, workers: int) -> dict[str, Any]:
    texts, plain, out = folder / "texts", folder / PLAIN, folder / stage
    shutil.rmtree(out, ignore_errors=True)
    if stage == PLAIN:
        found = build_plain(texts, out, workers)
        with CandidateIndex.open(out, None, read_only=True) as index:
            return found | {"documents": len(index)}
    if not plain.exists():
        raise SystemExit(f"{plain} is missing, with which this stage is compared; run --stage plain first")
    found = build_with_ray(texts, out, documents, workers, kill=stage == KILLED)
    return found | {"documents": compare(plain, out), "equal": True}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes.ray_build", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with dialogue, answers, pairs and nli")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2, help="actors of Ray, and threads of the plain build")
    parser.add_argument("--stage", choices=STAGES, help="run this one, recorded or not (default: those not recorded)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "ray_build", help="for texts and indexes")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    target = ROOT / "benchmarks" / "results" / options.device / "ray_build.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    sizes = {"documents": options.documents, "workers": options.workers}
    stages = known.get("stages", {}) if all(known.get(name) == value for name, value in sizes.items()) else {}
    folder = options.folder / str(options.documents)
    write_texts(options.data_dir, options.documents, folder / "texts")
    for stage in [options.stage] if options.stage else [name for name in STAGES if name not in stages]:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        record = run_stage(stage, folder, options.documents, options.workers)
        stages[stage] = record | {"started": started, "commit": commit()}
        print(stage, stages[stage], flush=True)
        command = f"python -m benchmarks.processes.ray_build --data-dir DATA --documents {options.documents}"
        provenance = {"command": command, "model": "bundled default", "versions": versions()}
        write_json(target, {**sizes, "provenance": provenance, "stages": stages})


if __name__ == "__main__":
    main()
