"""Ranking stored candidates on a CPU: ``python -m benchmarks.index.speed --device cpu-zen3-2-threads``.

For every N the time of a query and of its parts, against the bare matrix products of the same shapes, the cross-encoder
of the same backbone, a dual-encoder and late interaction on N candidates, and the published model in plain eager
PyTorch. All in one process, in turns, medians; from `ONCE_FROM` candidates on, one run of the most important ones.
Random weights of the shape of MiniLM-L6, which take the same time as trained ones. A million candidates take about 8 GB
of memory, 8 GB of disk and ten minutes. Writes benchmarks/results/DEVICE/index_speed.json.
"""

import argparse
import copy
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from benchmarks.index.contenders import (
    CROSS,
    CROSS_PAIRS,
    DEFAULT,
    DOCUMENT_TOKENS,
    DUAL,
    LATE,
    NARROW,
    NARROW_ON_DISK,
    ON_DISK,
    PLAIN,
    QUERY_TOKENS,
    TOP_K,
)
from benchmarks.index.limits import with_limits
from benchmarks.measuring.noise import NoisyMeasurementError, quiet_medians
from benchmarks.measuring.peaks import all_peaks, best_peaks
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json
from benchmarks.measuring.timing import interleaved_samples
from mixencoder import MixEncoder
from mixencoder.base.linears import arranged_linear, can_pack
from mixencoder.index import CandidateIndex
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.peers import CrossEncoder, DualEncoder, LateInteraction
from mixencoder.peers.packed import PackedTokens
from mixencoder.ranking.candidate_buffer import Rows
from mixencoder.ranking.plan import PIECE, plan_for
from mixencoder.ranking.query_cache import QueryStateCache
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import RunningBest, StreamRanker
from mixkernels.devices import multiplies_natively

LATE_MOST = 1000
"""Most candidates on which late interaction is timed: 128 vectors each."""
ONCE_FROM = 500_000
"""From this number of candidates on, each call takes most of a minute and runs once."""
REPEATED_TO = 1000
"""Up to this number of candidates `--repeats` applies."""
PLAIN_BATCH = 1000
CHUNK = 4096
"""Rows that a source hands over at once."""
BLOCK = 50_000
"""Embeddings added to an index at once."""
FORMATS = (
    ("projected", "float32", "native"),
    ("projected", "float16", "native"),
    ("projected", "int8", "native"),
    ("projected", "float16", "int8"),
    ("compact", "float16", "native"),
)


class Engines(NamedTuple):
    """All contenders over one backbone."""

    published: MixEncoder
    """No dual term: its query pass stops at the last tap."""
    default: MixEncoder
    """The settings of the bundled checkpoint: dual term, full query pass."""
    cross: CrossEncoder
    dual: DualEncoder
    late: LateInteraction
    narrow: "Engines | None" = None
    """The same engines in bfloat16; None where the processor emulates it."""


def build_engines() -> Engines:
    torch.manual_seed(0)
    tokenizer = MixEncoder.from_pretrained().tokenizer
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        engines = Engines(
            MixEncoder.from_backbone(folder),
            MixEncoder.from_backbone(folder, dual_term=True),
            *(peer.from_backbone(folder) for peer in (CrossEncoder, DualEncoder, LateInteraction)),
        )
    if multiplies_natively(torch.bfloat16):
        engines = engines._replace(narrow=Engines(*(copy.deepcopy(engine).to("bfloat16") for engine in engines[:5])))
    # encode every query again, without a cache
    for one in filter(None, (engines, engines.narrow)):
        for engine in (one.published, one.default):
            engine._query_states = QueryStateCache(max_bytes=0)
    return engines


def distinct_tokens(late: LateInteraction, count: int) -> PackedTokens:
    """Unit vectors for every token of `count` candidates, all different, because equal ones would be scored once."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(count, DOCUMENT_TOKENS, late.config.token_size, generator=generator)
    return PackedTokens.from_texts(F.normalize(drawn, dim=-1).unbind())


def texts_of(engine: MixEncoder, tokens: int, count: int, seed: int) -> list[str]:
    """Texts of exactly `tokens` tokens, special ones included, from words that are one token each."""
    words = sorted(word for word in engine.tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (count, tokens - 2), generator=generator).tolist()
    texts = [" ".join(words[number] for number in row) for row in chosen]
    lengths = {len(row) for row in engine.read_document(texts)}
    if lengths != {tokens}:
        raise RuntimeError(f"texts have {lengths} tokens; expected {tokens}")
    return texts


def source_of(rows: dict[str, Tensor], count: int) -> list[Rows]:
    """Chunks of resident rows, as an index hands them over."""
    ends = [min(start + CHUNK, count) for start in range(0, count, CHUNK)]
    return [
        (torch.arange(start, end), {name: tensor[start:end] for name, tensor in rows.items()})
        for start, end in zip(range(0, count, CHUNK), ends, strict=True)
    ]


def bare_products(model: MixEncoderModel, count: int, m: int) -> Callable[[], None]:
    """The matrix products of N candidates whose first layer is stored, without bias, in the ranker's pieces.

    In the fastest form that was found: with weights arranged for oneDNN in bfloat16, into reused memory in float32.
    """
    layer, d, dtype = model.interaction[0], model.config.hidden_size, model.dtype
    heads, wide, piece_size = layer.num_heads, layer.intermediate.out_features, plan_for(model.device, dtype).piece
    most = 2 * min(piece_size, count)
    memory = {"rows": torch.randn(most, d).to(dtype), "hidden": torch.randn(most, wide).to(dtype)}
    memory |= {"out": torch.empty(most, d, dtype=dtype), "gate": torch.empty(most // 2, d, dtype=dtype)}
    key, value = (torch.randn(heads, m, d // heads).to(dtype) for _ in range(2))
    logits, attended = (torch.empty(heads * most * size, dtype=dtype) for size in (m, d // heads))
    gate_weight = model.gate.weight[:, d : 2 * d]
    weights = (layer.attention_output.weight, gate_weight, layer.intermediate.weight, layer.output.weight)
    arranged = [arranged_linear(weight, None) for weight in weights] if can_pack(dtype, model.device) else None

    def piece(candidates: int) -> None:
        total = 2 * candidates
        rows, hidden, out = (memory[name][:total] for name in ("rows", "hidden", "out"))
        states, gate = rows[:candidates], memory["gate"][:candidates]
        queries = rows.view(total, heads, d // heads).transpose(0, 1)
        scores = logits[: heads * total * m].view(heads, m, total)
        torch.bmm(key, queries.mT, out=scores)
        torch.bmm(scores.mT, value, out=attended[: heads * total * (d // heads)].view(heads, total, -1))
        for number, (inputs, outputs) in enumerate(((rows, out), (states, gate), (rows, hidden), (hidden, out))):
            if arranged is None:
                torch.mm(inputs, weights[number].t(), out=outputs)
            else:
                arranged[number](inputs)

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, count, piece_size):
            piece(min(piece_size, count - start))

    return run


@torch.inference_mode()
def plain_scores(model: MixEncoderModel, query: QueryState, context: Tensor) -> Tensor:
    """Scores (N,) of the published model with k = 1 and one layer, from cached E_0 (N, d), in plain eager PyTorch."""
    layer, heads = model.interaction[0], model.interaction[0].num_heads
    key, value = query.keys[0][0].transpose(0, 1), query.values[0][0].transpose(0, 1)
    scale = 1 / math.sqrt(key.shape[-1])
    scores = []
    for e in context.split(PLAIN_BATCH):

        def split(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (heads, -1)).transpose(0, 1)

        q, own_key, own_value = split(layer.query(e)), split(layer.key(e)), split(layer.value(e))
        # (H, n, m + 1)
        logits = torch.cat([q @ key.mT, (q * own_key).sum(-1, keepdim=True)], dim=-1) * scale
        probs = logits.softmax(-1)
        attended = probs[..., :-1] @ value + probs[..., -1:] * own_value
        state = (split(layer.state_query(e)) @ key.mT * scale).softmax(-1) @ value
        rows = layer.attention_output(torch.stack([attended, state]).transpose(1, 2).flatten(-2))
        u = rows[1]
        z = torch.sigmoid(model.gate(torch.cat([e, u, torch.zeros_like(u)], dim=-1)))
        rows = layer.attention_norm(torch.stack([rows[0] + e, z * u]))
        rows = layer.output_norm(rows + layer.output(F.gelu(layer.intermediate(rows))))
        scores.append((rows[0] * rows[1]).sum(-1))
    return torch.cat(scores)


def top_k_alone(count: int) -> Callable[[], object]:
    """Only the running top-k, over scores that are already computed."""
    scores, positions = torch.randn(1, count), torch.arange(count)

    @torch.inference_mode()
    def run() -> object:
        best = RunningBest(1, TOP_K, repeats=False, device=torch.device("cpu"))
        for start in range(0, count, PIECE):
            best.add(scores[:, start : start + PIECE], positions[start : start + PIECE])
        return best.result()

    return run


def index_of(engine: MixEncoder, context: Tensor, path: Path) -> CandidateIndex:
    """An index of given embeddings, in files: in float16, of a model in bfloat16 in bfloat16."""
    precision = "bfloat16" if engine.dtype == torch.bfloat16 else "float16"
    index = engine.index(embeddings=context[:BLOCK], path=path, precision=precision, store_text=False)
    for start in range(BLOCK, len(context), BLOCK):
        index.add(embeddings=context[start : start + BLOCK])
    return index


def resident_rankings(engines: Engines, query: list[str], context: Tensor) -> dict[str, Callable[[], object]]:
    """Rankings from encoded queries and rows in memory, in every format."""
    published, narrow, calls = engines.published, engines.narrow, {}
    ways = [(published, *form, "") for form in FORMATS] + [(engines.default, "projected", "float32", "native", DEFAULT)]
    if narrow is not None:
        ways.append((published, "projected", "float16", "bfloat16", ""))
        ways += [(narrow.published, "projected", "bfloat16", "native", NARROW)]
        ways += [(narrow.default, "projected", "bfloat16", "native", NARROW + DEFAULT)]
    plain = plain_scores(published.model, published.encode_query(query), context[:, 0])
    for engine, layout, precision, products, suffix in ways:
        record_format, state = RecordFormat(engine.model, layout, precision), engine.encode_query(query)
        ranker = StreamRanker(engine.model, record_format, products=products)
        source = source_of(record_format.encode(context.to(engine.dtype)), len(context))
        name = f"rank {layout} {precision}{'' if products == 'native' else f' {products} products'}{suffix}"
        calls[name] = partial(ranker.rank, state, source, TOP_K)
        if precision == "float32" and not suffix:
            best = ranker.rank(state, source).scores[0]
            torch.testing.assert_close(best, plain.sort(descending=True).values, rtol=1e-4, atol=1e-3)
    return calls


def narrow_calls(narrow: Engines, query: list[str], context: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed of engines in bfloat16."""
    published, default = narrow.published, narrow.default
    index, default_index = (index_of(each, context, folder / f"narrow {n}") for n, each in enumerate(narrow[:2]))
    pairs, vectors = cross_pairs(published, query), context[:, 0].to(published.dtype)
    return {
        f"tokenise and query pass{NARROW}": lambda: published.encode_query(query),
        f"tokenise and query pass{NARROW}{DEFAULT}": lambda: default.encode_query(query),
        "products bfloat16": bare_products(published.model, len(context), QUERY_TOKENS),
        NARROW_ON_DISK: partial(published.rank, query, index, TOP_K, prefilter=None),
        f"{NARROW_ON_DISK}{DEFAULT}": partial(default.rank, query, default_index, TOP_K, prefilter=None),
        f"{NARROW_ON_DISK} prefilter{DEFAULT}": partial(default.rank, query, default_index, TOP_K, prefilter="auto"),
        f"{CROSS}{NARROW}": lambda: narrow.cross.predict(pairs),
        f"{DUAL}{NARROW}": lambda: narrow.dual.interact(narrow.dual.encode_query(query), vectors).topk(TOP_K),
    }


def cross_pairs(engine: MixEncoder, query: list[str]) -> list[tuple[str, str]]:
    """The pairs that a cross-encoder is timed on."""
    return [(query[0], text) for text in texts_of(engine, DOCUMENT_TOKENS, CROSS_PAIRS, seed=1)]


def measure(engines: Engines, context: Tensor, folder: Path) -> dict[str, Any]:
    """Make one record: seconds of all parts and rivals at N = len(context).

    Raises:
        NoisyMeasurementError: some times stayed noisy.
    """
    engine, count = engines.published, len(context)
    query, once = texts_of(engine, QUERY_TOKENS, 1, seed=3), count >= ONCE_FROM
    ids = torch.tensor(engine.read_query(query))
    # from the text of a query to its ranking, candidates in files
    index = index_of(engine, context, folder / "published")
    default_index = index_of(engines.default, context, folder / "default")

    @torch.inference_mode()
    def query_pass() -> object:
        return engine.model.encode_query(ids)

    calls: dict[str, Callable[[], object]] = {
        "tokenise": lambda: engine.read_query(query),
        "query pass": query_pass,
        "tokenise and query pass": lambda: engine.encode_query(query),
        f"tokenise and query pass{DEFAULT}": lambda: engines.default.encode_query(query),
        "top-k": top_k_alone(count),
        "products": bare_products(engine.model, count, QUERY_TOKENS),
        ON_DISK: partial(engine.rank, query, index, TOP_K, prefilter=None),
        f"{ON_DISK} int8 products": partial(engine.rank, query, index, TOP_K, prefilter=None, products="int8"),
        f"{ON_DISK}{DEFAULT}": partial(engines.default.rank, query, default_index, TOP_K, prefilter=None),
        f"{ON_DISK} int8 products{DEFAULT}": partial(
            engines.default.rank, query, default_index, TOP_K, prefilter=None, products="int8"
        ),
        f"{ON_DISK} prefilter{DEFAULT}": partial(engines.default.rank, query, default_index, TOP_K, prefilter="auto"),
    }
    if not once:
        calls |= resident_rankings(engines, query, context)
    if engines.narrow is not None:
        for each, of, suffix in ((engine, index, ""), (engines.default, default_index, DEFAULT)):
            calls[f"{ON_DISK} bfloat16 products{suffix}"] = partial(
                each.rank, query, of, TOP_K, prefilter=None, products="bfloat16"
            )
        calls |= narrow_calls(engines.narrow, query, context, folder)
    pairs = cross_pairs(engine, query)
    calls[CROSS] = lambda: engines.cross.predict(pairs)
    calls[PLAIN] = lambda: plain_scores(engine.model, engine.encode_query(query), context[:, 0]).topk(min(TOP_K, count))
    vectors = context[:, 0].contiguous()
    calls[DUAL] = lambda: engines.dual.interact(engines.dual.encode_query(query), vectors).topk(TOP_K)
    if count <= LATE_MOST:
        tokens = distinct_tokens(engines.late, count)
        calls[LATE] = lambda: engines.late.interact(engines.late.encode_query(query), tokens).topk(TOP_K)
    seconds = (
        seconds_once(calls)
        if once
        else quiet_medians(lambda: interleaved_samples(calls, seconds=1.0, least=3, most=15))
    )
    return {
        "N": count,
        "candidates": "given embeddings",
        "runs": "one each" if once else "medians",
        "row_bytes": default_index.info()["row_bytes"],
        "token_size": engines.late.config.token_size,
        "seconds": seconds,
    }


def seconds_once(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time one run of each call; a call of less than a second runs twice, and the second run counts."""
    seconds = {}
    for name, call in calls.items():
        for _ in range(2):
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
            if seconds[name] > 1.0:
                break
    return seconds


def ratios(record: dict[str, Any]) -> dict[str, float]:
    """The ratios for which docs/design.md has targets."""
    seconds, whole = record["seconds"], {}
    count = record["N"] / CROSS_PAIRS
    for name, value in seconds.items():
        if name.startswith("rank "):
            whole[name] = value + seconds[_query_pass(name)]
        elif name.startswith((ON_DISK, NARROW_ON_DISK)):
            whole[name] = value
    published = [name for name in whole if not name.endswith(DEFAULT)]
    found = {f"cross-encoder / {name}": seconds[CROSS] * count / value for name, value in whole.items()}
    found |= {
        f"cross-encoder in bfloat16 / {name}": seconds[f"{CROSS}{NARROW}"] * count / whole[name]
        for name in whole
        if NARROW in name
    }
    found |= {f"{n} / products": seconds[n] / seconds[_products(n)] for n in published if n.startswith("rank ")}
    # without the query pass, which the bare products do not include
    found |= {
        f"{name}, scoring / products": (whole[name] - seconds[_query_pass(name)]) / seconds[_products(name)]
        for name in published
        if not name.startswith("rank ")
    }
    found |= {
        f"{name} / products and query pass": whole[name] / (seconds[_products(name)] + seconds[_query_pass(name)])
        for name in published
    }
    found |= {f"{PLAIN} / {name}": seconds[PLAIN] / whole[name] for name in published}
    found |= {f"{rival} / {ON_DISK}": seconds[rival] / whole[ON_DISK] for rival in (DUAL, LATE) if rival in seconds}
    return found


def _query_pass(name: str) -> str:
    """Name of the query pass that belongs to a ranking."""
    return f"tokenise and query pass{NARROW if NARROW in name else ''}{DEFAULT if name.endswith(DEFAULT) else ''}"


def _products(name: str) -> str:
    """Name of the bare products that a ranking is compared with."""
    return "products bfloat16" if NARROW in name or "bfloat16 products" in name else "products"


def run(counts: Iterable[int], repeats: int = 1) -> dict[str, Any]:
    """Measure every number of candidates, up to `REPEATED_TO` of them `repeats` times; the middle run is recorded."""
    engines = build_engines()
    document = texts_of(engines.published, DOCUMENT_TOKENS, 64, seed=1)
    embedded = engines.published.encode_document(document)
    generator = torch.Generator().manual_seed(2)
    records, refused = [], []
    for count in counts:
        numbers = torch.arange(count) % len(embedded)
        context = embedded[numbers] + 0.05 * torch.randn(count, *embedded.shape[1:], generator=generator)
        found, noisy = [], ""
        for _ in range(repeats if count <= REPEATED_TO else 1):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.append(measure(engines, context, Path(folder)))
                except NoisyMeasurementError as error:
                    noisy = str(error)
                    print(f"a run of N = {count} is not recorded: {error}")
            for products in all_peaks():
                best_peaks(products, remeasure=True)
        if not found:
            refused.append({"N": count, "reason": noisy})
            continue
        record = middle_run(found)
        record["ratios"] = ratios(record)
        records.append(record)
        print(f"N = {count}")
        for name, value in {**record["seconds"], **record["ratios"]}.items():
            print(f"    {name:60} {value:.4g}")
    return {"records": with_limits(records), "refused": refused}


def middle_run(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run of the middle multiple of the fastest ranking without a prefilter to the cross-encoder's time.

    The record's "multiples" are those of all runs, ascending.
    """

    def multiple(record: dict[str, Any]) -> float:
        seconds = record["seconds"]
        own = seconds.get(f"{NARROW_ON_DISK}{DEFAULT}", seconds.get(f"{ON_DISK}{DEFAULT}"))
        return seconds[CROSS] / CROSS_PAIRS * record["N"] / own

    ordered = sorted(found, key=multiple)
    return ordered[(len(ordered) - 1) // 2] | {"multiples": [multiple(record) for record in ordered]}


def main(arguments: list[str]) -> int:
    """Run the command line. Returns 1 if a number of candidates was too noisy to record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--repeats", type=int, default=3, help=f"runs up to N = {REPEATED_TO}, of which the middle one is recorded"
    )
    options = parser.parse_args(arguments)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    found = run(options.counts, options.repeats)
    if not found["records"]:
        return 1
    document = {
        "provenance": {
            "command": " ".join(["python -m benchmarks.index.speed", *arguments]),
            "started": started,
            "commit": commit(),
            "versions": versions(),
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "timing": "in one process, medians of interleaved rounds where a record does not say otherwise",
        },
        "shape": {"m": QUERY_TOKENS, "n": DOCUMENT_TOKENS, "k": 1, "J": 1, "d": 384, "L": 6, "top_k": TOP_K},
        "notes": [
            "candidates are given embeddings, not texts that were encoded for this",
            "weights are random, candidates are embeddings of 64 texts with noise added: neither changes the work",
            f"the cross-encoder was timed on {CROSS_PAIRS} pairs, tokenisation included, and scaled linearly to N",
            "candidates are resident in memory unless the name says on disk (files that the system has cached)",
            "ratios of rankings include tokenisation and query pass, those of products do not",
            "prefilter: the default, which fully scores only the best by dual score; all other rankings score all",
            "bfloat16 model: weights, index and query pass in it; bfloat16 and int8 products: of a float32 model",
            "plain eager: published model from cached E_0, query pass included, nothing of the first layer stored",
            f"up to N = {REPEATED_TO}: the middle of {options.repeats} runs; multiples: of all runs",
            "limits: least times by counted work and the peaks of this run",
        ],
        "peaks": all_peaks(),
        **found,
    }
    write_json(ROOT / "benchmarks" / "results" / options.device / "index_speed.json", document)
    return int(bool(found["refused"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
