"""Encode with one and two threads next to other busy processes, on an otherwise quiet machine.

``python -m benchmarks.processes.threads --device cpu-zen3-2-threads``

The bundled default encodes texts of mixed lengths with one thread and with two, alone and next to one busy process per
core. It also ranks raw texts, against sentence-transformers' bi-encoder (extra ``rivals``), which encodes the same
texts in batches of 32: the default's backbone with random weights and mean pooling. All in one process, in turns,
medians. A noisy time is not recorded; next to busy processes it is, with its spread. Writes
benchmarks/results/DEVICE/threads.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModel

from benchmarks.measuring.machine import computing_threads, kind_name, machine_facts
from benchmarks.measuring.models import rival_unavailable
from benchmarks.measuring.noise import LARGEST_SPREAD, NoisyMeasurementError, quiet_samples, spread
from benchmarks.measuring.provenance import commit, versions, write_json
from benchmarks.measuring.timing import interleaved_samples
from benchmarks.suite.results import RESULTS
from mixencoder import MixEncoder
from mixencoder.bundled import default_checkpoint
from mixencoder.ranking.query_cache import QueryStateCache

SHORTEST, LONGEST, BATCH = 10, 200, 32
THREADS = (1, 2)
ENCODE, RANK, RIVAL = "encode_document", "rank", "sentence-transformers, encode"
Calls = dict[str, Callable[[], object]]


class Sizes(NamedTuple):
    """Numbers of texts, and time to spend."""

    encoded: int = 300
    """Texts that are encoded."""
    ranked: int = 100
    """Texts that are ranked."""
    seconds: float = 10.0
    """Rough time to spend on each call."""
    least: int = 5
    """Least rounds of each call; also the rounds of a call that takes over a second."""


def mixed_texts(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Texts of `SHORTEST` to `LONGEST` tokens, special ones included, evenly spread and in random order."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(SHORTEST, LONGEST, count).round().long()[torch.randperm(count, generator=generator)]
    return [
        " ".join(words[number] for number in torch.randint(len(words), (length - 2,), generator=generator).tolist())
        for length in lengths.tolist()
    ]


def rival_encoder(engine: MixEncoder) -> Any:
    """sentence-transformers' model on the default's own backbone, with random weights and mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    config = json.loads((default_checkpoint() / "config.json").read_text(encoding="utf-8"))["backbone_config"]
    shape = AutoConfig.for_model(**{name: value for name, value in config.items() if name != "dtype"})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(shape).float().save_pretrained(folder)
        engine.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=engine.config.max_document_length)
    pooling = Pooling(shape.hidden_size, pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


@contextmanager
def busy_processes(count: int) -> Generator[None]:
    """Keep `count` processes computing inside the block."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in running:
            # wait until it runs
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()


def calls_of(sizes: Sizes, engine: MixEncoder, rival: Any) -> dict[str, Calls]:
    """Calls to time, in groups that are compared; texts are encoded again at each call."""
    texts = mixed_texts(engine.tokenizer, sizes.encoded, seed=0)
    candidates = mixed_texts(engine.tokenizer, sizes.ranked, seed=1)
    ranking: Calls = {RANK: lambda: engine.rank("how does this end", candidates)}
    if rival is not None:
        ranking[RIVAL] = lambda: rival.encode(candidates, batch_size=BATCH, show_progress_bar=False)
    return {"encoding": {ENCODE: lambda: engine.encode_document(texts)}, "ranking": ranking}


def measure(sizes: Sizes, calls: dict[str, Calls]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of all calls by threads and busy processes, and the refused ones with reasons."""
    records, refused = [], []
    for what, together in calls.items():
        for threads in THREADS:
            for busy in (0, os.cpu_count() or 1) if what == "encoding" else (0,):
                entry = {"what": what, "threads": threads, "busy processes": busy}

                def take(together: Calls = together) -> dict[str, list[float]]:
                    return interleaved_samples(
                        together, seconds=sizes.seconds, least=sizes.least, slow_most=sizes.least
                    )

                try:
                    with computing_threads(threads), busy_processes(busy):
                        samples = take() if busy else quiet_samples(take)
                except NoisyMeasurementError as error:
                    refused.append(entry | {"reason": str(error)})
                    continue
                seconds = {name: median(values) for name, values in samples.items()}
                record = entry | {"seconds": seconds, "spread": {name: spread(one) for name, one in samples.items()}}
                record["samples"] = {name: len(values) for name, values in samples.items()}
                if RIVAL in seconds:
                    record["ratio"] = seconds[RIVAL] / seconds[RANK]
                records.append(record)
                print(record, flush=True)
    return records, refused


def run(device: str, sizes: Sizes, arguments: Sequence[str]) -> int:
    """Measure and write; returns 1 if a time was too noisy to record."""
    engine, reason = MixEncoder.from_pretrained(), rival_unavailable()
    # encode every query again, without a cache
    engine._query_states = QueryStateCache(max_bytes=0)
    rival = None if reason else rival_encoder(engine)
    provenance = {
        "command": " ".join(["python -m benchmarks.processes.threads", *arguments]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": "bundled default",
        "commit": commit(),
        "versions": versions() | ({} if reason else {"sentence-transformers": _version()}),
        "timing": f"medians of interleaved rounds; alone, a spread of more than {LARGEST_SPREAD} is refused",
    }
    records, refused = measure(sizes, calls_of(sizes, engine, rival))
    document = {
        "machine": machine_facts() | {"threads": list(THREADS), "cores": os.cpu_count()},
        "provenance": provenance,
        "texts": {"encoded": sizes.encoded, "ranked": sizes.ranked, "tokens": [SHORTEST, LONGEST], "batch": BATCH},
        "records": records,
        "skipped": [{"backend": RIVAL, "reason": reason}] if reason else [],
        "refused": refused,
    }
    for entry in (*document["skipped"], *refused):
        print(entry)
    if records:
        write_json(RESULTS / device / "threads.json", document)
    return int(bool(refused))


def _version() -> str:
    import sentence_transformers

    return sentence_transformers.__version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 if a time was too noisy to record."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes.threads", description=__doc__)
    parser.add_argument("--device", help="name of the folder of results (default: named after this kind of machine)")
    parser.add_argument("--encoded", type=int, default=Sizes().encoded, help="texts to encode")
    parser.add_argument("--ranked", type=int, default=Sizes().ranked, help="texts to rank")
    parser.add_argument("--seconds", type=float, default=Sizes().seconds, help="rough time to spend on each call")
    options = parser.parse_args(arguments)
    sizes = Sizes(options.encoded, options.ranked, options.seconds)
    return run(options.device or kind_name(machine_facts()), sizes, arguments)


if __name__ == "__main__":
    sys.exit(main())
