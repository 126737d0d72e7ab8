"""Candidate attention once more, with loops over queries, candidates and heads; imports nothing of the project."""

import torch
from torch import Tensor


def attention_by_loops(
    context_query: Tensor,
    context_key: Tensor | None,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    lengths: list[int] | None = None,
    scale: float | None = None,
    *,
    ids: list | None = None,
    offsets: list[int] | None = None,
    own_logits: Tensor | None = None,
    scales: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return context, state and their log-sum-exps in float64 for inputs of any precision and any form."""
    batch, m, heads, dim = key.shape
    scale = dim**-0.5 if scale is None else scale
    k = context_query.shape[-3]
    # place in the results, query, place of the candidate
    if offsets is not None:
        lead = (offsets[-1],)
        places = [
            ((row,), b, (row if ids is None else ids[row],))
            for b in range(batch)
            for row in range(offsets[b], offsets[b + 1])
        ]
    elif ids is not None:
        lead = (batch, len(ids[0]))
        places = [((b, n), b, (ids[b][n],)) for b in range(batch) for n in range(lead[1])]
    else:
        pool = context_query.dim() == 4
        lead = (batch, context_query.shape[-4])
        places = [((b, n), b, (n,) if pool else (b, n)) for b in range(batch) for n in range(lead[1])]
    context = torch.zeros(*lead, k, heads, dim, dtype=torch.float64)
    context_lse = torch.zeros(*lead, k, heads, dtype=torch.float64)
    state = torch.zeros(*lead, heads, dim, dtype=torch.float64)
    state_lse = torch.full((*lead, heads), -torch.inf, dtype=torch.float64)
    for out, b, where in places:
        length = m if lengths is None else lengths[b]
        factors = [torch.ones(k, heads)] * 3 if scales is None else [None if s is None else s[where] for s in scales]
        for h in range(heads):
            shared_k, shared_v = key[b, :length, h].double(), value[b, :length, h].double()
            own_v = context_value[where][:, h].double() * factors[2][:, h, None]
            for row in range(k):
                q = context_query[where][row, h].double() * factors[0][row, h]
                if own_logits is None:
                    own = (context_key[where][:, h].double() * factors[1][:, h, None]) @ q * scale
                else:
                    own = own_logits[where][row, :, h].double()
                logits = torch.cat([shared_k @ q * scale, own])
                context[*out, row, h] = logits.softmax(0) @ torch.cat([shared_v, own_v])
                context_lse[*out, row, h] = logits.logsumexp(0)
            if state_query is not None and length > 0:
                logits = shared_k @ state_query[where][h].double() * scale
                state[*out, h] = logits.softmax(0) @ shared_v
                state_lse[*out, h] = logits.logsumexp(0)
    if state_query is None:
        return context, None, context_lse, None
    return context, state, context_lse, state_lse
