"""Ranking N candidates for a query, from its text to the best ten, against every other architecture; MiniLM's shape.

Candidates are encoded ahead and held in memory by every architecture that can. Encoding a hundred thousand texts would
take hours here, so vectors are those of a few texts with noise added, or random: the work is the same. A model that
reads query and candidate jointly is timed on fewer pairs, and its time is scaled to N; "scaled" in a record's facts
says from how many.
"""

from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.index.speed import distinct_tokens, plain_scores, texts_of
from benchmarks.measuring.costs import (
    MINILM,
    encoder_cost,
    interaction_cost,
    projection_cost,
    query_cost,
    vectors_cost,
)
from benchmarks.measuring.models import engine, rival_unavailable, sentence_transformers_cross_encoder
from benchmarks.suite.case import Case, Contender, Prepared
from mixencoder import MixEncoder
from mixencoder.base.encoding import EncodingEngine
from mixencoder.index import CandidateIndex
from mixencoder.peers import CrossEncoder, DeFormer, DualEncoder, LateInteraction, PolyEncoder
from mixencoder.peers.packed import PackedTokens
from mixkernels.devices import multiplies_natively

QUERY_TOKENS, DOCUMENT_TOKENS, TOP_K = 16, 128, 10
COUNTS = (10, 100, 1000, 10_000, 100_000)
LONG_FROM = 100_000
QUICK = {100: ("cross-encoder", "plain PyTorch"), 1000: ("plain PyTorch",)}
"""N -> rivals in the comparison that CI runs."""
CROSS_PAIRS, DEFORMER_PAIRS = 16, 32
LATE_INTERACTION_MOST = 10_000
"""Most candidates for late interaction, which holds a vector for every token: 66 kB per candidate."""

OWN = ("mixencoder", "mixencoder, int8 products", "mixencoder, bfloat16 products")
CROSS = "cross-encoder"
THEIRS = "sentence-transformers cross-encoder"
RIVALS = (CROSS, THEIRS, "deformer", "late-interaction", "poly-encoder", "dual-encoder", "plain PyTorch")


@cache
def query_text() -> str:
    """The query."""
    return texts_of(engine(MixEncoder), QUERY_TOKENS, 1, seed=3)[0]


@cache
def documents() -> list[str]:
    """A few candidates as texts."""
    return texts_of(engine(MixEncoder), DOCUMENT_TOKENS, DEFORMER_PAIRS, seed=1)


@cache
def embedded() -> Tensor:
    """Context embeddings of those texts, (n, 1, d)."""
    return engine(MixEncoder).encode_document(documents())


def contexts(count: int) -> Tensor:
    """Context embeddings of `count` candidates, (N, 1, d)."""
    generator = torch.Generator().manual_seed(2)
    few = embedded()
    return few[torch.arange(count) % len(few)] + 0.05 * torch.randn(count, *few.shape[1:], generator=generator)


def rank_case(count: int) -> Case:
    """All architectures on N candidates."""
    return Case(
        "end_to_end",
        "rank",
        {"N": count, "m": QUERY_TOKENS, "n": DOCUMENT_TOKENS, "k": 1, "J": 1, "L": MINILM.layers, "d": MINILM.d},
        torch.float32,
        OWN,
        RIVALS,
        partial(_prepare, count),
        rival=CROSS,
        unavailable=partial(_unavailable, count),
        long=count >= LONG_FROM,
        quick=QUICK.get(count, ()),
    )


def _unavailable(count: int, contender: str) -> str | None:
    if contender == THEIRS:
        return rival_unavailable()
    if contender == "late-interaction" and count > LATE_INTERACTION_MOST:
        size = count * DOCUMENT_TOKENS * engine(LateInteraction).config.token_size * torch.float32.itemsize
        return f"late-interaction: its vectors of {count:,} candidates would take {size / 1e9:.1f} GB"
    if contender == OWN[2] and not multiplies_natively(torch.bfloat16, torch.device("cpu")):
        return "bfloat16 products: this processor does not multiply bfloat16 natively"
    return None


def _prepare(count: int, names: Collection[str]) -> Prepared:
    context = contexts(count)
    # one index for both kinds of products
    index = cache(lambda: engine(MixEncoder).index(embeddings=context, store_text=False))
    makers: dict[str, Callable[[], Contender]] = {
        OWN[0]: lambda: _ours(index(), "native"),
        OWN[1]: lambda: _ours(index(), "int8"),
        OWN[2]: lambda: _ours(index(), "bfloat16"),
        "plain PyTorch": partial(_plain, context),
        "dual-encoder": lambda: _encoded(DualEncoder, context[:, 0].contiguous(), 1),
        "poly-encoder": lambda: _encoded(PolyEncoder, context[:, 0].contiguous(), engine(PolyEncoder).config.num_codes),
        "late-interaction": lambda: _encoded(
            LateInteraction, distinct_tokens(engine(LateInteraction), count), QUERY_TOKENS
        ),
        "deformer": partial(_deformer, count),
        CROSS: partial(_joint, count, lambda: engine(CrossEncoder)),
        THEIRS: partial(_joint, count, sentence_transformers_cross_encoder),
    }
    sizes = dict.fromkeys(names, TOP_K) | dict.fromkeys((CROSS, THEIRS), min(count, CROSS_PAIRS))

    def check(name: str, result: Any) -> None:
        found = result[0] if isinstance(result, torch.return_types.topk) else result
        length = found.numel() if isinstance(found, Tensor) else len(found)
        if length != sizes[name]:
            raise AssertionError(f"{name} gave {length} scores; expected {sizes[name]}")

    return Prepared({name: makers[name]() for name in names}, check)


def _ours(index: CandidateIndex, products: str) -> Contender:
    """The engine on an index in memory."""
    dtype, stored = torch.float32, index.info()["row_bytes"]
    interaction = interaction_cost(MINILM, len(index), 1, QUERY_TOKENS, dtype, stored_bytes=stored)
    own_limit = {} if products == "native" else {"products": products}
    return Contender(
        partial(engine(MixEncoder).rank, query_text(), index, TOP_K, prefilter=None, products=products),
        query_cost(MINILM, QUERY_TOKENS, dtype).and_then(interaction),
        facts={"stored_bytes": stored, "stored": "projected float16"} | own_limit,
    )


def _plain(context: Tensor) -> Contender:
    """The same model in plain PyTorch from cached E_0; nothing of the first layer is stored."""
    mix, count, dtype = engine(MixEncoder), len(context), torch.float32

    def call() -> Any:
        return plain_scores(mix.model, mix.encode_query([query_text()]), context[:, 0]).topk(TOP_K)

    interaction = interaction_cost(MINILM, count, 1, QUERY_TOKENS, dtype, stored_bytes=0)
    projections = projection_cost(MINILM, count, 1, dtype)
    return Contender(
        call,
        query_cost(MINILM, QUERY_TOKENS, dtype).and_then(projections).and_then(interaction),
        facts={"stored_bytes": context[0].nbytes, "stored": "E_0, float32"},
    )


def _encoded(kind: type[EncodingEngine], candidates: Tensor | PackedTokens, query_vectors: int) -> Contender:
    """An architecture that stores vectors of a candidate: after the query pass only products remain."""
    peer, count = engine(kind), len(candidates)
    held = candidates.vectors if isinstance(candidates, PackedTokens) else candidates

    def call() -> Any:
        return peer.interact(peer.encode_query([query_text()]), candidates)[0].topk(TOP_K)

    cost = vectors_cost(
        MINILM,
        count,
        QUERY_TOKENS,
        torch.float32,
        query_vectors=query_vectors,
        vectors=len(held) // count,
        size=held.shape[-1],
    )
    return Contender(call, cost, facts={"stored_bytes": held.nbytes // count, "stored": "float32"})


def _joint(count: int, model: Callable[[], Any]) -> Contender:
    """A cross-encoder, which reads query and candidate together."""
    pairs = [(query_text(), text) for text in documents()[: min(count, CROSS_PAIRS)]]
    return Contender(
        partial(model().predict, pairs),
        encoder_cost(MINILM, count, QUERY_TOKENS + DOCUMENT_TOKENS - 1, torch.float32),
        count / len(pairs),
        _scaled(len(pairs), count) | {"stored_bytes": len(documents()[0].encode()), "stored": "text"},
    )


def _deformer(count: int) -> Contender:
    """DeFormer's upper layers; its query pass is left out, because scaling would multiply it: this favours DeFormer."""
    peer, few = engine(DeFormer), min(count, DEFORMER_PAIRS)
    candidates = peer.encode_document(documents()[:few])
    state = peer.encode_query([query_text()])
    return Contender(
        lambda: peer.interact(state, candidates)[0].topk(TOP_K),
        encoder_cost(MINILM, count, QUERY_TOKENS + DOCUMENT_TOKENS, torch.float32, layers=peer.config.joint_layers),
        count / few,
        _scaled(few, count) | {"stored_bytes": candidates.vectors.nbytes // few, "stored": "float32"},
    )


def _scaled(pairs: int, count: int) -> dict[str, Any]:
    return {} if pairs == count else {"scaled": f"timed on {pairs} pairs"}


CASES: tuple[Case, ...] = tuple(map(rank_case, COUNTS))
