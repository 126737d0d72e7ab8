"""The formula of candidate attention in plain PyTorch; every other backend is tested against it.

Runs on any device, is differentiable, and computes in float64 when given float64 (in float32 otherwise). Read it with
docs/design.md, "Interaction layer". Called by `mixkernels.attention.operator` only, which has checked the inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mixkernels.attention.checks import Call

Results = tuple[Tensor, Tensor | None, Tensor, Tensor | None]

_PER_CANDIDATE = (
    "context_query",
    "context_key",
    "context_value",
    "state_query",
    "own_logits",
    "query_scale",
    "key_scale",
    "value_scale",
)


def candidate_attention(call: Call, *, scale: float) -> tuple[Tensor | None, ...]:
    """Return context, state (None without a state query) and their log-sum-exps, for candidates in any form."""
    batch = call.key.shape[0]
    if call.candidate_offsets is None:
        lead = call.context_query.shape[:-3]
        if call.candidate_ids is not None:
            # (B, n, ...)
            call = _change_candidates(call, lambda tensor: tensor[call.candidate_ids])
        elif len(lead) == 1:
            call = _change_candidates(call, lambda tensor: tensor.expand(batch, *tensor.shape))
        return _per_query(call, scale)
    # ragged: one query after the other
    offsets, parts = call.candidate_offsets.tolist(), []
    if call.candidate_ids is not None:
        call = _change_candidates(call, lambda tensor: tensor[call.candidate_ids])
    if batch == 0:
        parts.append(_per_query(_change_candidates(call, lambda tensor: tensor[None, :0][:0]), scale))
    for query in range(batch):
        rows = slice(offsets[query], offsets[query + 1])
        this = slice(query, query + 1)
        lengths = None if call.key_lengths is None else call.key_lengths[this]
        one = call._replace(key=call.key[this], value=call.value[this], key_lengths=lengths)
        parts.append(_per_query(_change_candidates(one, lambda tensor, rows=rows: tensor[rows].unsqueeze(0)), scale))
    return tuple(
        None if some[0] is None else torch.cat([part.flatten(0, 1) for part in some])
        for some in zip(*parts, strict=True)
    )


def _change_candidates(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """Return the call with `change` applied to every tensor that has one row per candidate."""
    changed = {name: change(tensor) for name in _PER_CANDIDATE if (tensor := getattr(call, name)) is not None}
    return call._replace(**changed)


def _per_query(call: Call, scale: float) -> Results:
    """Candidates (B, N, k, H, D) against keys and values (B, m, H, D)."""
    out_dtype = call.key.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    batch, m = call.key.shape[:2]

    def widened(numbers: Tensor, factor: Tensor | None) -> Tensor:
        return numbers.to(dtype) if factor is None else numbers.to(dtype) * factor.to(dtype).unsqueeze(-1)

    # (B, N, k, H, D)
    q = widened(call.context_query, call.query_scale)
    v_own = widened(call.context_value, call.value_scale)
    # (B, m, H, D)
    k, v = call.key.to(dtype), call.value.to(dtype)
    # (B, m): which tokens are valid
    valid = torch.ones(batch, m, dtype=torch.bool, device=k.device)
    if call.key_lengths is not None:
        valid = torch.arange(m, device=k.device) < call.key_lengths[:, None]

    # (B, N, H, k, m) and (B, N, H, k, k)
    scores_query = torch.einsum("bnkhd,bmhd->bnhkm", q, k) * scale
    scores_query = scores_query.masked_fill(~valid[:, None, None, None, :], -torch.inf)
    if call.own_logits is not None:
        scores_own = call.own_logits.to(dtype).movedim(-1, -3)
    else:
        assert call.context_key is not None, "either own keys or their logits are given"
        scores_own = torch.einsum("bnkhd,bnlhd->bnhkl", q, widened(call.context_key, call.key_scale)) * scale
    # (B, N, H, k, m + k): query tokens and the candidate's own context embeddings under one softmax
    scores = torch.cat([scores_query, scores_own], dim=-1)
    probs = scores.softmax(dim=-1)
    context = torch.einsum("bnhkm,bmhd->bnkhd", probs[..., :m], v)
    context = context + torch.einsum("bnhkl,bnlhd->bnkhd", probs[..., m:], v_own)
    context_lse = scores.logsumexp(dim=-1).transpose(-1, -2)
    if call.state_query is None:
        return context.to(out_dtype), None, context_lse, None

    # (B, N, H, m): the state has no key of its own, so a query without tokens leaves it nothing to attend to
    has_tokens = valid.any(dim=-1)[:, None, None]
    scores = torch.einsum("bnhd,bmhd->bnhm", call.state_query.to(dtype), k) * scale
    scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(dtype).min)
    state = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(dim=-1) * has_tokens[..., None], v)
    state_lse = scores.logsumexp(dim=-1).masked_fill(~has_tokens, -torch.inf)
    return context.to(out_dtype), state.to(out_dtype), context_lse, state_lse
