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
        pooled_query, first = (
            None if vectors is None else vectors[chunk_queries.to(device)]
            for vectors in (query_state.pooled, query_state.first)
        )
        if score == "dual" and head == "ranking":
            dual = model.dual_term(pooled_query, rows.mean(dim=-2))
            assert dual is not None, "the caller refuses a score that the model does not have"
            outputs.append(dual)
            continue
        segments = [(queries[number], count) for number, count in zip(numbers, counts, strict=True)]
        attends = [
            partial(_attend_segments, segments, layer, model.kernel_backend) for layer in range(len(model.interaction))
        ]
        h, e = model.run_interaction(rows, attends, first)
        vectors = (h.view(CHUNK, -1), e.view(CHUNK, -1), pooled_query, rows.mean(dim=-2))
        if head == "ranking":
            outputs.append(getattr(model.rank_head(*vectors), score))
        else:
            outputs.append(model.classification_head(*vectors))
    if not outputs:
        return torch.empty(0, dtype=torch.float32, device=device)
    return check_finite(torch.cat(outputs)[:total].float(), candidates.dtype)


def check_finite(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scores as they are; dtype is that of the model, for the message.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    if not torch.isfinite(scores).all():
        raise NonFiniteError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite (dtype {dtype}); "
            "float32 or bfloat16 have the range that float16 lacks, and a checkpoint may be damaged"
        )
    return scores


def _attend_segments(
    segments: Sequence[tuple[QueryState, int]],
    layer: int,
    backend: str,
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend a chunk's rows, which belong to one query after the other; without state rows there is no state.

    Every query meets the whole chunk and keeps its own rows, so that no product's shape depends on the neighbours.
    """
    contexts, states, start = [], [], 0
    for query, count in segments:
        key, value = query.keys[layer], query.values[layer]
        result = candidate_attention(
            context_query, context_key, context_value, state_query, key, value, backend=backend
        )
        contexts.append(result.context[:, start : start + count])
        if result.state is not None:
            states.append(result.state[:, start : start + count])
        start += count
    return _joined(contexts), _joined(states) if states else None


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate parts (1, count, ...) of a chunk; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
