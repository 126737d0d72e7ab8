"""Rankings on a GPU, end to end: ``python -m benchmarks.gpu.ranking`` (docs/gpu.md, "Ranking an index").

The targets of design.md section 7 that `benchmarks.gpu` leaves out: a million candidates for a query, resident and
streamed; and a thousand against a cross-encoder of BERT-base's shape, from token ids. Random weights and embeddings,
bfloat16, k = 1, one interaction layer. Median wall time, the device synchronised before and after each call. Writes
gpu_ranking.json into benchmarks/results/NAME-OF-THE-GPU or --output. Needs a GPU; exits with 2 without one.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.checkpoint.card import PRETRAINED
from benchmarks.index.speed import texts_of
from benchmarks.measuring.noise import NoisyMeasurementError, quiet_medians
from benchmarks.measuring.provenance import ROOT, commit, slug, versions, write_json
from mixencoder import MixEncoder
from mixencoder.base.engine import Request
from mixencoder.base.scores import Pairs
from mixencoder.peers import CrossEncoder
from mixencoder.ranking.candidate_buffer import Rows
from mixencoder.ranking.plan import ON_GPU, plan_for
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import StreamRanker

QUERY_TOKENS, DOCUMENT_TOKENS, TOP_K = 16, 128, 10
RUNS = 9


class Shape(NamedTuple):
    """Sizes of the backbone."""

    layers: int
    d: int
    heads: int


MINILM, BERT_BASE = Shape(6, 384, 12), Shape(12, 768, 12)


def engines(shape: Shape, device: torch.device) -> tuple[MixEncoder, CrossEncoder]:
    """The published model and a cross-encoder over one untrained backbone, in bfloat16."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.d,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.d,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = {"device": device, "dtype": torch.bfloat16}
        return MixEncoder.from_backbone(folder, **options), CrossEncoder.from_backbone(folder, **options)


def random_rows(engine: MixEncoder, count: int, device: torch.device) -> tuple[RecordFormat, list[Rows]]:
    """Chunks of random rows, instead of encoded texts, in the memory of a device."""
    record_format = RecordFormat(engine.model, "projected", "bfloat16")
    generator = torch.Generator(device).manual_seed(1)
    chunks = []
    for start in range(0, count, ON_GPU.piece):
        size = min(ON_GPU.piece, count - start)
        fields = {
            field.name: torch.randn(size, *field.shape, dtype=torch.bfloat16, generator=generator, device=device)
            for field in record_format.schema.fields
        }
        chunks.append((torch.arange(start, start + size), fields))
    return record_format, chunks


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after two that are not counted.

    Raises:
        NoisyMeasurementError: the call's times stayed too far apart.
    """
    module = torch.get_device_module(device)

    def take() -> dict[str, list[float]]:
        times = []
        for _ in range(RUNS + 2):
            module.synchronize()
            start = time.perf_counter()
            call()
            module.synchronize()
            times.append(time.perf_counter() - start)
        return {"a ranking": times[2:]}

    return quiet_medians(take)["a ranking"]


def rank_many(count: int, device: torch.device, shape: Shape = MINILM) -> dict[str, Any]:
    """Rank all candidates for a query that is already encoded."""
    engine, _ = engines(shape, device)
    state = engine.encode_query(texts_of(engine, QUERY_TOKENS, 1, seed=3))
    plan, seconds = plan_for(device), {}
    for residence in ("resident", "streamed"):
        record_format, rows = random_rows(engine, count, device if residence == "resident" else torch.device("cpu"))
        for replayed in (True, False) if plan.replayed else (False,):
            ranker = StreamRanker(engine.model, record_format, plan=plan._replace(replayed=replayed))
            name = f"{residence}{', replayed' * replayed}"
            seconds[name] = seconds_of(lambda ranker=ranker, rows=rows: ranker.rank(state, rows, TOP_K), device)
        del rows
    return {"what": "scores and top-k", "N": count, "shape": shape._asdict(), "seconds": seconds}


def beside_cross_encoder(count: int, device: torch.device, shape: Shape = BERT_BASE) -> dict[str, Any]:
    """Rank candidates from token ids, and score as many pairs with a cross-encoder."""
    engine, cross = engines(shape, device)
    queries = engine.read_query(texts_of(engine, QUERY_TOKENS, 1, seed=3))
    documents = engine.read_document(texts_of(engine, DOCUMENT_TOKENS, count, seed=1))
    record_format, rows = random_rows(engine, count, device)
    ranker = StreamRanker(engine.model, record_format)

    def ours() -> Tensor:
        return ranker.rank(engine._encode_queries(queries, 1, show_progress_bar=False), rows, TOP_K).scores

    pairs = Pairs(torch.zeros(count, dtype=torch.int64), torch.arange(count))
    request = Request("ranking", "full", 256, False)
    seconds = {
        "mixencoder": seconds_of(ours, device),
        "cross-encoder": seconds_of(lambda: cross._score_pairs(queries, documents, pairs, request), device),
    }
    ratio = seconds["cross-encoder"] / seconds["mixencoder"]
    return {"what": "from token ids", "N": count, "shape": shape._asdict(), "seconds": seconds, "ratio": ratio}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 if the measurement was too noisy, 2 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ranking", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--count", type=int, default=1_000_000, help="candidates of the large ranking")
    parser.add_argument("--commit", help="the commit, if the checkout has no repository")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu.ranking needs a GPU: none is visible", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        records = [beside_cross_encoder(1000, device), rank_many(options.count, device)]
    except NoisyMeasurementError as error:
        print(f"nothing is recorded: {error}", file=sys.stderr)
        return 1
    document = {
        "device": name,
        "provenance": {
            "command": " ".join(["python -m benchmarks.gpu.ranking", *arguments]),
            "started": started,
            "commit": options.commit or commit(),
            "versions": versions(),
            "timing": "median wall time of single calls, synchronised before and after",
        },
        "shape": {"m": QUERY_TOKENS, "n": DOCUMENT_TOKENS, "k": 1, "J": 1, "dtype": "bfloat16", "top_k": TOP_K},
        "notes": ["weights and stored rows are random: neither changes the work"],
        "records": records,
    }
    for record in records:
        print(record)
    write_json((options.output or ROOT / "benchmarks" / "results" / slug(name)) / "gpu_ranking.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
