"""Scoring packed rows of (query, candidate): every chunk has one shape, whatever it holds.

That is half of the promise that a candidate's score does not depend on its neighbours (docs/determinism.md); the other
half, encoding, is in `mixencoder.fast`, which calls this.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.errors import NonFiniteError
from mixencoder.modeling import MixEncoderModel, QueryState
from mixkernels import candidate_attention

CHUNK = 64
"""Pairs scored at once. Fixed, because products of other shapes may round differently."""


class Pairs(NamedTuple):
    """Rows to score: query number and candidate number of each, (R,) int64, sorted by query."""

    query: Tensor
    candidate: Tensor


def score_pairs(
    model: MixEncoderModel, query_state: QueryState, candidates: Tensor, pairs: Pairs, *, head: str, score: str
) -> Tensor:
    """Score rows of (query, candidate), sorted by query, in chunks of one shape.

    Returns (R,) float32 for the ranking head, (R, num_labels) for the classification head.
    """
    device, total = candidates.device, len(pairs.query)
    filled = -(-total // CHUNK) * CHUNK
    query_of = torch.cat([pairs.query, pairs.query[-1:].expand(filled - total)])
    candidate_of = torch.cat([pairs.candidate, pairs.candidate[-1:].expand(filled - total)]).to(device)
    queries: dict[int, QueryState] = {}
    outputs = []
    for start in range(0, filled, CHUNK):
        chunk_queries = query_of[start : start + CHUNK]
        numbers, counts = (part.tolist() for part in torch.unique_consecutive(chunk_queries, return_counts=True))
        queries = {number: queries.get(number) or query_state.select(number) for number in numbers}
        rows = candidates[candidate_of[start : start + CHUNK]]
        segments = [(queries[number], count) for number, count in zip(numbers, counts, strict=True)]
        attends = [
            partial(_attend_segments, segments, layer, model.kernel_backend) for layer in range(len(model.interaction))
        ]
        h, e = model.run_interaction(rows, attends)
        pooled_query = None
        if query_state.pooled is not None:
            pooled_query = query_state.pooled[chunk_queries.to(device)]
        vectors = (h.view(CHUNK, -1), e.view(CHUNK, -1), pooled_query, rows.mean(dim=-2))
        if head == "ranking":
            outputs.append(getattr(model.rank_head(*vectors), score))
        else:
            outputs.append(model.classification_head(*vectors))
    if not outputs:
        return torch.empty(0, device=device)
    out = torch.cat(outputs)[:total].float()
    if not torch.isfinite(out).all():
        raise NonFiniteError(
            f"{int((~torch.isfinite(out)).sum())} of {out.numel()} scores are not finite (dtype {candidates.dtype}); "
            "float32 or bfloat16 have the range that float16 lacks, and a checkpoint may be damaged"
        )
    return out


def _attend_segments(
    segments: Sequence[tuple[QueryState, int]], layer: int, backend: str, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend a chunk's rows, which belong to one query after the other.

    Every query meets the whole chunk and keeps its own rows, so that no product's shape depends on the neighbours.
    """
    contexts, states, start = [], [], 0
    for query, count in segments:
        result = candidate_attention(*rows, query.keys[layer], query.values[layer], backend=backend)
        contexts.append(result.context[:, start : start + count])
        states.append(result.state[:, start : start + count])
        start += count
    if len(segments) == 1:
        return contexts[0], states[0]
    return torch.cat(contexts, dim=1), torch.cat(states, dim=1)
