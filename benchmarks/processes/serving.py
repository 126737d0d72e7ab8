"""`mixencoder serve` under load: throughput, times of requests, memory, and whether every answer is the model's own.

``python -m benchmarks.processes.serving --device cpu-zen3-2-threads --what ids --requests 10000``

Servers run as processes with the bundled model; this process sends requests over `--connections` connections and shares
the machine with them. Every request ranks `--candidates` texts: "ids" sends ids of candidates in the server's index,
"texts" sends the texts, and "cross-encoder" sends the same texts to a sentence-transformers CrossEncoder of the same
size, with random weights, behind the same server (extra ``rivals``). Every answer is compared with the model's own; a
wrong one is an error. `--servers` and `--threads` say how many servers share the load, and with how many threads each.
`--prepare` only makes the index and the right answers, in the folder `--folder`; a later run with the same options and
folder takes them from there, so that it is short.

Writes benchmarks/results/DEVICE/serving.json; records of other runs in it stay.
"""

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measuring.machine import kind_name, machine_facts
from benchmarks.measuring.models import rival_unavailable, sentence_transformers_cross_encoder
from benchmarks.measuring.provenance import commit, versions, write_json
from benchmarks.processes.load import Answers, Request, percentile, resident_bytes, send
from benchmarks.suite.results import RESULTS
from mixencoder import CandidateIndex, MixEncoder

IDS, TEXTS, RIVAL = "ids", "texts", "cross-encoder"
DIFFERENT, WARM, INDEXED = 2000, 64, 1000
"""Different requests at most, further ones to warm up with, and candidates in the index that they draw from."""
TOKENS = (10, 70)
"""Least and most tokens of a candidate."""
TOLERANCE = 1e-4
"""Of the rival's probabilities: its padding, and so its rounding, depends on what shares a batch."""
KEY = ("what", "servers", "threads", "connections", "candidates")


class Load(NamedTuple):
    """What is sent to which servers."""

    what: str = IDS
    servers: int = 1
    threads: int = 2
    connections: int = 32
    requests: int = 10_000
    candidates: int = 20


class Work(NamedTuple):
    """The different requests, and the right answers: for each the expected probability by position."""

    requests: list[Request]
    right: list[dict[int, float]]
    tolerance: float


def made_texts(engine: MixEncoder, count: int, seed: int, least: int, most: int) -> list[str]:
    """Texts of words of the vocabulary, with about `least` to `most` tokens."""
    words = sorted(word for word in engine.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=generator.randint(least, most) - 2)) for _ in range(count)]


def made_work(load: Load, engine: MixEncoder, texts: Sequence[str], index: CandidateIndex) -> Work:
    """Make requests, and compute the right answers here; the index holds the texts under the ids c0, c1, ..."""
    generator = random.Random(2)
    queries = made_texts(engine, min(DIFFERENT, load.requests) + WARM, 1, 8, 18)
    chosen = [generator.sample(range(len(texts)), load.candidates) for _ in queries]
    ids = [[f"c{number}" for number in numbers] for numbers in chosen]
    documents = [[texts[number] for number in numbers] for numbers in chosen]
    names = ids if load.what == IDS else documents
    field = "ids" if load.what == IDS else "texts"
    requests = [Request("/rerank", {"query": query, field: some}) for query, some in zip(queries, names, strict=True)]
    if load.what == IDS:
        rankings = engine.rank(queries, index, ids=ids, return_probabilities=True)
        places = [{name: place for place, name in enumerate(some)} for some in ids]
        right = [
            {place[entry["id"]]: entry["probability"] for entry in ranking}
            for place, ranking in zip(places, rankings, strict=True)
        ]
    elif load.what == TEXTS:
        encoded = engine.encode_document(texts, show_progress_bar=False)
        pairs = zip(queries, chosen, strict=True)
        rankings = [engine.rank(query, encoded[numbers], return_probabilities=True) for query, numbers in pairs]
        right = [{entry["corpus_id"]: entry["probability"] for entry in ranking} for ranking in rankings]
    else:
        rival = sentence_transformers_cross_encoder()
        pairs = [(query, text) for query, some in zip(queries, documents, strict=True) for text in some]
        scores = iter(rival.predict(pairs, show_progress_bar=False).tolist())
        right = [{number: next(scores) for number in range(load.candidates)} for _ in queries]
    return Work(requests, right, TOLERANCE if load.what == RIVAL else 0.0)


def wrong_answers(answers: Answers, work: Work) -> int:
    """The number of answers that are not the right ones, or not in the right order."""
    wrong = 0
    for number, (status, body) in enumerate(zip(answers.statuses, answers.bodies, strict=True)):
        right = work.right[:-WARM][number % len(work.right[:-WARM])]
        found = json.loads(body) if status == 200 else []
        scores = [entry["score"] for entry in found]
        same = {entry["index"] for entry in found} == set(right) and scores == sorted(scores, reverse=True)
        near = all(abs(entry["score"] - right[entry["index"]]) <= work.tolerance for entry in found)
        wrong += not (same and near)
    return wrong


@contextlib.contextmanager
def servers(load: Load, options: Sequence[str]) -> Generator[list[tuple[str, int]]]:
    """Run servers on free ports; yields address and process id of each."""
    module = ["benchmarks.processes.serving", "--rival-server"] if load.what == RIVAL else ["mixencoder", "serve"]
    command = [sys.executable, "-m", *module, "--port", "0", "--threads", str(load.threads), *options]
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(load.servers)
    ]
    try:
        yield [(_address(process), process.pid) for process in running]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _address(process: subprocess.Popen) -> str:
    for line in process.stderr:
        if match := re.search(r"running on (http://[\d.:]+)", line):
            # logs must be read, or the server would wait for a full pipe
            threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
            return match[1]
    raise RuntimeError("the server did not start")


def measure(load: Load, work: Work, options: Sequence[str]) -> dict[str, Any]:
    """Send the load, and return a record.

    Raises:
        RuntimeError: an answer was wrong.
    """
    with servers(load, options) as running:
        addresses = [address for address, _ in running]
        send(addresses, work.requests[-WARM:], WARM, load.connections)
        before = sum(resident_bytes(pid) or 0 for _, pid in running)
        answers = send(addresses, work.requests[:-WARM], load.requests, load.connections)
        after = sum(resident_bytes(pid) or 0 for _, pid in running)
    if wrong := wrong_answers(answers, work):
        raise RuntimeError(f"{wrong} of {load.requests} answers are wrong: statuses {sorted(set(answers.statuses))}")
    times = {f"p{share:g}": percentile(answers.seconds, share / 100) for share in (50, 95, 99)}
    return {
        **load._asdict(),
        "wall_seconds": answers.wall_seconds,
        "requests_per_second": load.requests / answers.wall_seconds,
        "seconds": times,
        "wrong": wrong,
        "memory_mib": {"before": before // 2**20, "after": after // 2**20},
    }


def prepared(load: Load, folder: Path) -> Work:
    """The work and its index in a folder: taken from there, or made."""
    # another number of threads may round scores differently
    name = f"{load.what}-{load.requests}-{load.candidates}-{load.threads}.json"
    index_path, work_path = folder / "index", folder / name
    if not work_path.exists():
        torch.set_num_threads(load.threads)
        engine = MixEncoder.from_pretrained()
        texts = made_texts(engine, INDEXED, 0, *TOKENS)
        if not index_path.exists():
            names = [f"c{number}" for number in range(len(texts))]
            engine.index(texts, names, index_path, precision="float32", show_progress_bar=False).close()
        with engine.open_index(index_path, read_only=True) as index:
            work = made_work(load, engine, texts, index)
        write_json(work_path, work._asdict())
    found = json.loads(work_path.read_text(encoding="utf-8"))
    right = [{int(place): score for place, score in one.items()} for one in found["right"]]
    return Work([Request(path, body) for path, body in found["requests"]], right, found["tolerance"])


def run(device: str, load: Load, folder: Path, arguments: Sequence[str]) -> int:
    """Measure and write."""
    if load.what == RIVAL and (reason := rival_unavailable()):
        print(reason)
        return 1
    work = prepared(load, folder)
    record = measure(load, work, ["--index", str(folder / "index")] if load.what == IDS else [])
    record |= {
        "command": " ".join(["python -m benchmarks.processes.serving", *arguments]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
    }
    print(json.dumps(record, indent=1))
    target = RESULTS / device / "serving.json"
    known = json.loads(target.read_text(encoding="utf-8"))["records"] if target.exists() else []
    others = [entry for entry in known if any(entry[name] != record[name] for name in KEY)]
    write_json(target, {"machine": machine_facts(), "tokens": TOKENS, "records": [*others, record]})
    return 0


def serve_rival(port: int, threads: int) -> None:
    """Serve sentence-transformers' CrossEncoder with this library's server; it answers rankings of texts only."""
    from mixencoder.serving import service
    from mixencoder.serving.server import serve
    from mixencoder.serving.settings import ServeConfig

    service.Ranker = _RivalRanker
    serve(ServeConfig(port=port, threads=threads), MixEncoder.from_pretrained())


class _RivalRanker:
    """In place of `mixencoder.serving.ranking.Ranker`: all pairs of a pass in one call of the cross-encoder."""

    calibrated = False

    def __init__(self, engine: MixEncoder, index: object, **_: object) -> None:
        self._predict: Callable[..., Any] = sentence_transformers_cross_encoder().predict

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        from mixencoder.serving.work import Hit, Ranked

        pairs = [(job.work.queries[0], text) for job in jobs for text in job.work.documents]
        scores = iter(self._predict(pairs, batch_size=32, show_progress_bar=False).tolist())
        answers = []
        for job in jobs:
            hits = [Hit(number, next(scores)) for number in range(len(job.work.documents))]
            answers.append(Ranked([sorted(hits, key=lambda hit: (-hit.score, hit.index))], 0, 0))
        return answers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes.serving", description=__doc__)
    parser.add_argument("--device", help="name of the folder of results (default: named after this kind of machine)")
    parser.add_argument("--what", choices=(IDS, TEXTS, RIVAL), default=IDS, help="what requests hold")
    for name, default in Load()._asdict().items():
        if name != "what":
            parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where index and right answers are (default: made for this run)")
    parser.add_argument("--prepare", action="store_true", help="only make what --folder holds")
    parser.add_argument("--rival-server", action="store_true", help="be the rival's server (used by this program)")
    parser.add_argument("--port", type=int, default=0, help="with --rival-server")
    options = parser.parse_args(arguments)
    if options.rival_server:
        serve_rival(options.port, options.threads)
        return 0
    load = Load(*(getattr(options, name) for name in Load._fields))
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.prepare:
            prepared(load, folder)
            return 0
        return run(options.device or kind_name(machine_facts()), load, folder, arguments)


if __name__ == "__main__":
    sys.exit(main())
