"""Cut a call into slabs, which the torch backend processes one at a time, for candidates in any form.

A slab is some queries and some of their candidates. `take` returns the slab's candidates as a dense tensor with a
leading query dimension (1 for a pool), `result_view` the part of the results to write, and `add` adds its gradients.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixkernels.attention.checks import Call

_PER_CANDIDATE = ("context_query", "context_key", "context_value", "state_query", "own_logits")


class Slab(NamedTuple):
    """Queries, and rows of the results; for ragged candidates one query and rows of (total, ...)."""

    queries: slice
    rows: slice


def slabs(call: Call, candidates: int, queries: int) -> Iterator[Slab]:
    """Cut a call into slabs of nearly equal size.

    Args:
        call: the call.
        candidates: most candidates of a slab.
        queries: most queries of a slab; always 1 for ragged candidates.
    """
    if call.candidate_offsets is not None:
        for query, (start, stop) in enumerate(pairwise(call.candidate_offsets.tolist())):
            for rows in _cut(start, stop, candidates):
                yield Slab(slice(query, query + 1), rows)
        return
    batch, count = call.lead
    for some in _cut(0, batch, queries):
        for rows in _cut(0, count, candidates):
            yield Slab(some, rows)


def _cut(start: int, stop: int, most: int) -> Iterator[slice]:
    if stop == start:
        return
    parts = -(-(stop - start) // max(most, 1))
    size = -(-(stop - start) // parts)
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def take(call: Call, slab: Slab, dtype: torch.dtype) -> Call:
    """Return the slab's part of a call: candidates (1 or B, n, ...) in dtype, int8 ones times their scales."""
    parts: dict[str, Any] = {name: _select(call, getattr(call, name), slab) for name in _PER_CANDIDATE}
    for name in ("query", "key", "value"):
        factor, numbers = _select(call, getattr(call, f"{name}_scale"), slab), parts[f"context_{name}"]
        if factor is not None and numbers is not None:
            parts[f"context_{name}"] = numbers.to(dtype) * factor.to(dtype).unsqueeze(-1)
    parts |= {name: getattr(call, name)[slab.queries] for name in ("key", "value")}
    parts = {name: None if tensor is None else tensor.to(dtype) for name, tensor in parts.items()}
    if call.own_logits is not None:
        # logits stay in float32 at least, whatever dtype the products have
        parts["own_logits"] = _select(call, call.own_logits, slab)
    lengths = None if call.key_lengths is None else call.key_lengths[slab.queries]
    return Call(**parts, key_lengths=lengths, candidate_ids=None, candidate_offsets=None, **_NO_SCALES)


_NO_SCALES = {"query_scale": None, "key_scale": None, "value_scale": None}


def _select(call: Call, tensor: Tensor | None, slab: Slab) -> Tensor | None:
    if tensor is None:
        return None
    if call.candidate_ids is not None:
        return tensor[result_view(call, call.candidate_ids, slab)]
    return tensor[slab.rows].unsqueeze(0) if call.context_query.dim() == 4 else tensor[slab.queries, slab.rows]


def result_view(call: Call, results: Tensor, slab: Slab) -> Tensor:
    """Return a view of the slab's part (B, n, ...) of results, or of ids."""
    if call.candidate_offsets is not None:
        return results[slab.rows].unsqueeze(0)
    return results[slab.queries, slab.rows]


def add(call: Call, gradient: Tensor, part: Tensor, slab: Slab) -> None:
    """Add a slab's gradient (1, n, ...) to the candidates' gradient, where a candidate may occur more than once."""
    if call.candidate_ids is not None:
        gradient.index_add_(
            0, result_view(call, call.candidate_ids, slab).flatten(), part.flatten(0, 1).to(gradient.dtype)
        )
    elif call.context_query.dim() == 4:
        gradient[slab.rows] += part.squeeze(0)
    else:
        gradient[slab.queries, slab.rows] += part
