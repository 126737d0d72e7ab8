"""Least time of every contender of `benchmarks.index.speed`: counted work over measured peak rates.

`benchmarks.measuring.costs` counts the work. The peaks are those of memory, exponentials, and products in float32,
bfloat16 and int8, measured between the timings of the same run. Tokenisation, top-k and Python are not counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

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
from benchmarks.measuring.costs import (
    MINILM,
    dot_products_cost,
    encoder_cost,
    interaction_cost,
    projection_cost,
    query_cost,
    vectors_cost,
)
from benchmarks.measuring.peaks import best_peaks
from mixencoder.ranking.prefilter import chosen_prefilter
from mixkernels.roofline import Cost


class _Ranking(NamedTuple):
    """One way to rank an index with the bundled settings, which have a dual term."""

    model: torch.dtype = torch.float32
    products: torch.dtype = torch.float32
    prefilter: bool = False


_RANKINGS = {
    f"{ON_DISK}{DEFAULT}": _Ranking(),
    f"{ON_DISK} int8 products{DEFAULT}": _Ranking(products=torch.int8),
    f"{ON_DISK} bfloat16 products{DEFAULT}": _Ranking(products=torch.bfloat16),
    f"{ON_DISK} prefilter{DEFAULT}": _Ranking(prefilter=True),
    f"{NARROW_ON_DISK}{DEFAULT}": _Ranking(torch.bfloat16, torch.bfloat16),
    f"{NARROW_ON_DISK} prefilter{DEFAULT}": _Ranking(torch.bfloat16, torch.bfloat16, prefilter=True),
}

Work = list[tuple[Cost, torch.dtype]]
"""Parts of a call that follow each other, each with the dtype of its products."""


def works(count: int, row_bytes: int, token_size: int) -> dict[str, Work]:
    """Return the work of every contender on `count` candidates, the cross-encoder's for its `CROSS_PAIRS`.

    Args:
        count: candidates.
        row_bytes: bytes of a candidate in an index of the bundled settings, two bytes a number.
        token_size: numbers of a token's vector in late interaction.
    """
    m, wide, narrow = QUERY_TOKENS, torch.float32, torch.bfloat16
    found = {name: _ranking_work(way, count, row_bytes) for name, way in _RANKINGS.items()}
    plain = query_cost(MINILM, m, wide).and_then(projection_cost(MINILM, count, 1, wide))
    found[PLAIN] = [(plain.and_then(interaction_cost(MINILM, count, 1, m, wide, stored_bytes=0)), wide)]
    late = vectors_cost(MINILM, count, m, wide, query_vectors=m, vectors=DOCUMENT_TOKENS, size=token_size)
    found[LATE] = [(late, wide)]
    for dtype, suffix in ((wide, ""), (narrow, NARROW)):
        pair = encoder_cost(MINILM, CROSS_PAIRS, m + DOCUMENT_TOKENS - 1, dtype)
        found[f"{CROSS}{suffix}"] = [(pair, dtype)]
        dual = vectors_cost(MINILM, count, m, dtype, query_vectors=1, vectors=1, size=MINILM.d)
        found[f"{DUAL}{suffix}"] = [(dual, dtype)]
    return found


def _ranking_work(way: _Ranking, count: int, row_bytes: int) -> Work:
    work: Work = [(encoder_cost(MINILM, 1, QUERY_TOKENS, way.model), way.model)]
    kept = chosen_prefilter("auto" if way.prefilter else None, count, TOP_K, has_dual=True)
    if kept is not None:
        # the index holds the dual term's vectors in two bytes a number
        work.append((dot_products_cost(count, torch.bfloat16, size=MINILM.d), way.model))
    scored = count if kept is None else kept
    rows = interaction_cost(MINILM, scored, 1, QUERY_TOKENS, way.products, stored_bytes=row_bytes)
    return [*work, (rows, way.products)]


def with_limits(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with "limits": the least time of every contender that has one, by the best peaks of the run.

    Args:
        records: each with "N", "seconds" by contender, "row_bytes" and "token_size" (see `works`). A time below its
            limit shows that the peaks were measured in a slow moment; they are then measured again.
    """
    counted = [
        {name: work for name, work in works(r["N"], r["row_bytes"], r["token_size"]).items() if name in r["seconds"]}
        for r in records
    ]
    for record, found in zip(records, counted, strict=True):
        for name, work in found.items():
            if _least(work) > record["seconds"][name]:
                for _, dtype in work:
                    best_peaks(_name(dtype), remeasure=True)
    limits = ({name: _least(work) for name, work in found.items()} for found in counted)
    return [{**record, "limits": found} for record, found in zip(records, limits, strict=True)]


def _least(work: Work) -> float:
    return sum(cost.seconds(best_peaks(_name(dtype))) for cost, dtype in work)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
