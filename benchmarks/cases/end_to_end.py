"""Ranking N candidates for a query, from its text to the best ten, against every other architecture; MiniLM's shape.

Candidates are encoded ahead and held in memory by all that can. Encoding a hundred thousand texts takes hours here, so
vectors are those of a few texts with noise added, or random ones: that changes no work. A model that reads query and
candidate jointly is timed on fewer pairs, and its time scaled to N; "scaled" in a record's facts says from how many.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import Case, Contender, Prepared
from benchmarks.costs import (
    MINILM,
    encoder_cost,
    interaction_cost,
    joint_cost,
    projection_cost,
    query_cost,
    vectors_cost,
)
from benchmarks.index_speed import plain_scores, texts_of
from benchmarks.models import engines, rival_unavailable, sentence_transformers_cross_encoder
from mixencoder.peers.packed import PackedTokens

QUERY_TOKENS, DOCUMENT_TOKENS, TOP_K = 16, 128, 10
COUNTS = (10, 100, 1000, 10_000, 100_000)
LONG_FROM = 100_000
QUICK = 100
CROSS_PAIRS, DEFORMER_PAIRS = 16, 32
TOKENS_MOST = 10_000
"""Candidates that a vector for every token is held of: 66 kB each."""

OWN = ("mixencoder", "mixencoder, int8 products")
CROSS = "cross-encoder"
THEIRS = "sentence-transformers cross-encoder"
RIVALS = (CROSS, THEIRS, "deformer", "late-interaction", "poly-encoder", "dual-encoder", "plain PyTorch")


@cache
def query_text() -> str:
    """The query."""
    return texts_of(engines().mix, QUERY_TOKENS, 1, seed=3)[0]


@cache
def documents() -> list[str]:
    """A few candidates as texts."""
    return texts_of(engines().mix, DOCUMENT_TOKENS, DEFORMER_PAIRS, seed=1)


@cache
def embedded() -> Tensor:
    """Context embeddings of those texts, (n, 1, d)."""
    return engines().mix.encode_document(documents())


def contexts(count: int) -> Tensor:
    """Context embeddings of so many candidates, (N, 1, d)."""
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
        quick=count == QUICK,
    )


def _unavailable(count: int, contender: str) -> str | None:
    if contender == THEIRS:
        return rival_unavailable()
    if contender == "late-interaction" and count > TOKENS_MOST:
        size = count * DOCUMENT_TOKENS * engines().late.config.token_size * torch.float32.itemsize
        return f"late-interaction: its vectors of {count:,} candidates would take {size / 1e9:.1f} GB"
    return None


def _prepare(count: int) -> Prepared:
    context = contexts(count)
    calls = _ours(count, context) | _vectors(count, context) | _joint(count)
    sizes = dict.fromkeys(calls, TOP_K) | {CROSS: min(count, CROSS_PAIRS), THEIRS: min(count, CROSS_PAIRS)}

    def check(name: str, result: Any) -> None:
        found = result[0] if isinstance(result, torch.return_types.topk) else result
        length = found.numel() if isinstance(found, Tensor) else len(found)
        if length != sizes[name]:
            raise AssertionError(f"{name} gave {length} scores; expected {sizes[name]}")

    return Prepared(calls, check)


def _ours(count: int, context: Tensor) -> dict[str, Contender]:
    engine, dtype = engines().mix, torch.float32
    index = engine.index(embeddings=context, store_text=False)
    stored = index.info()["row_bytes"]
    once = query_cost(MINILM, QUERY_TOKENS, dtype)
    cost = once.and_then(interaction_cost(MINILM, count, 1, QUERY_TOKENS, dtype, stored_bytes=stored))
    facts = {"stored_bytes": stored, "stored": "projected float16"}
    state_and_scores = projection_cost(MINILM, count, 1, dtype).and_then(
        interaction_cost(MINILM, count, 1, QUERY_TOKENS, dtype, stored_bytes=0)
    )

    def plain() -> Any:
        scores = plain_scores(engine.model, engine.encode_query([query_text()]), context[:, 0])
        return scores.topk(TOP_K)

    def rank(products: str) -> Any:
        return engine.rank(query_text(), index, TOP_K, products=products)

    return {
        OWN[0]: Contender(partial(rank, "native"), cost, facts=facts),
        OWN[1]: Contender(partial(rank, "int8"), cost, facts=facts),
        "plain PyTorch": Contender(
            plain, once.and_then(state_and_scores), facts={"stored_bytes": context[0].nbytes, "stored": "E_0, float32"}
        ),
    }


def _vectors(count: int, context: Tensor) -> dict[str, Contender]:
    """Architectures that keep vectors of a candidate: after the query pass products are left."""
    every, dtype = engines(), torch.float32
    vectors = context[:, 0].contiguous()
    cost = partial(vectors_cost, MINILM, count, QUERY_TOKENS, dtype, vectors=1, size=MINILM.d)
    found = {
        "dual-encoder": _encoded(every.dual, vectors, cost(query_vectors=1)),
        "poly-encoder": _encoded(every.poly, vectors, cost(query_vectors=every.poly.config.num_codes)),
    }
    if count <= TOKENS_MOST:
        size = every.late.config.token_size
        generator = torch.Generator().manual_seed(4)
        drawn = F.normalize(torch.randn(count, DOCUMENT_TOKENS, size, generator=generator), dim=-1)
        found["late-interaction"] = _encoded(
            every.late,
            PackedTokens.from_groups([drawn]),
            cost(query_vectors=QUERY_TOKENS, vectors=DOCUMENT_TOKENS, size=size),
        )
    return found


def _encoded(engine: Any, candidates: Any, cost: Any) -> Contender:
    held = candidates.vectors if isinstance(candidates, PackedTokens) else candidates

    def call() -> Any:
        return engine.interact(engine.encode_query([query_text()]), candidates)[0].topk(TOP_K)

    return Contender(call, cost, facts={"stored_bytes": held.nbytes // len(candidates), "stored": "float32"})


def _joint(count: int) -> dict[str, Contender]:
    """Architectures that read query and candidate together."""
    every, dtype = engines(), torch.float32
    pairs = [(query_text(), text) for text in documents()[: min(count, CROSS_PAIRS)]]
    cost = joint_cost(MINILM, count, QUERY_TOKENS, DOCUMENT_TOKENS, dtype)
    facts = _scaled(len(pairs), count) | {"stored_bytes": len(documents()[0].encode()), "stored": "text"}
    found = {CROSS: Contender(partial(every.cross.predict, pairs), cost, count / len(pairs), facts)}
    if rival_unavailable() is None:
        theirs = sentence_transformers_cross_encoder()
        found[THEIRS] = Contender(partial(theirs.predict, pairs), cost, count / len(pairs), facts)
    few = min(count, DEFORMER_PAIRS)
    candidates = every.deformer.encode_document(documents()[:few])
    state = every.deformer.encode_query([query_text()])
    found["deformer"] = Contender(
        # its query pass, which would be scaled too, is left out: that favours it
        lambda: every.deformer.interact(state, candidates)[0].topk(TOP_K),
        encoder_cost(MINILM, count, QUERY_TOKENS + DOCUMENT_TOKENS, dtype, layers=every.deformer.config.joint_layers),
        count / few,
        _scaled(few, count) | {"stored_bytes": candidates.vectors.nbytes // few, "stored": "float32"},
    )
    return found


def _scaled(pairs: int, count: int) -> dict[str, Any]:
    return {} if pairs == count else {"scaled": f"timed on {pairs} pairs"}


CASES: tuple[Case, ...] = tuple(map(rank_case, COUNTS))
