"""Candidate attention once more, with loops over queries, candidates and heads; imports nothing of the project."""

import torch
from torch import Tensor


def attention_by_loops(
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    lengths: list[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return context, state and their log-sum-exps in float64 for inputs of any precision."""
    batch, m, heads, dim = key.shape
    scale = dim**-0.5 if scale is None else scale
    pool = context_query.dim() == 4
    count, k = context_query.shape[-4:-2]
    context = torch.zeros(batch, count, k, heads, dim, dtype=torch.float64)
    context_lse = torch.zeros(batch, count, k, heads, dtype=torch.float64)
    state = torch.zeros(batch, count, heads, dim, dtype=torch.float64)
    state_lse = torch.full((batch, count, heads), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        length = m if lengths is None else lengths[b]
        for n in range(count):
            where = (n,) if pool else (b, n)
            for h in range(heads):
                shared_k, shared_v = key[b, :length, h].double(), value[b, :length, h].double()
                own_k = context_key[where][:, h].double()
                own_v = context_value[where][:, h].double()
                for row in range(k):
                    q = context_query[where][row, h].double()
                    logits = torch.cat([shared_k @ q, own_k @ q]) * scale
                    context[b, n, row, h] = logits.softmax(0) @ torch.cat([shared_v, own_v])
                    context_lse[b, n, row, h] = logits.logsumexp(0)
                if state_query is not None and length > 0:
                    logits = shared_k @ state_query[where][h].double() * scale
                    state[b, n, h] = logits.softmax(0) @ shared_v
                    state_lse[b, n, h] = logits.logsumexp(0)
    if state_query is None:
        return context, None, context_lse, None
    return context, state, context_lse, state_lse
