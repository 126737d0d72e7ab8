"""The formula, nothing else: candidate attention in plain PyTorch, the oracle of every other backend.

Runs on any device, differentiates, and computes in float64 when given float64 (in float32 otherwise). Read it next to
docs/design.md, "Interaction layer". Called by `mixkernels.ops` only, which has checked the inputs.
"""

import torch
from torch import Tensor


def candidate_attention(
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return context (B, N, k, H, D), state (B, N, H, D), context_lse (B, N, k, H) and state_lse (B, N, H).

    Candidates are (N, k, H, D), one pool for all queries, or (B, N, k, H, D); key and value are (B, m, H, D).
    """
    out_dtype = key.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    batch, m = key.shape[:2]
    per_query = context_query.dim() == 5

    def widen(candidates: Tensor) -> Tensor:
        wide = candidates.to(dtype)
        return wide if per_query else wide.expand(batch, *wide.shape)

    # (B, N, k, H, D)
    q, k_own, v_own = widen(context_query), widen(context_key), widen(context_value)
    # (B, m, H, D)
    k, v = key.to(dtype), value.to(dtype)
    # (B, m): which tokens exist
    valid = torch.ones(batch, m, dtype=torch.bool, device=key.device)
    if key_lengths is not None:
        valid = torch.arange(m, device=key.device) < key_lengths[:, None]

    # (B, N, H, k, m) and (B, N, H, k, k)
    scores_query = torch.einsum("bnkhd,bmhd->bnhkm", q, k) * scale
    scores_query = scores_query.masked_fill(~valid[:, None, None, None, :], -torch.inf)
    scores_own = torch.einsum("bnkhd,bnlhd->bnhkl", q, k_own) * scale
    # (B, N, H, k, m + k): query tokens and the candidate's own context embeddings under one softmax
    scores = torch.cat([scores_query, scores_own], dim=-1)
    probs = scores.softmax(dim=-1)
    context = torch.einsum("bnhkm,bmhd->bnkhd", probs[..., :m], v)
    context = context + torch.einsum("bnhkl,bnlhd->bnkhd", probs[..., m:], v_own)
    context_lse = scores.logsumexp(dim=-1).transpose(-1, -2)

    if state_query is None:
        return context.to(out_dtype), None, context_lse.float(), None

    # (B, N, H, m): the state has no key of its own, so a query without tokens leaves it nothing to attend to
    some = valid.any(dim=-1)[:, None, None]
    scores = torch.einsum("bnhd,bmhd->bnhm", widen_state(state_query, batch, dtype), k) * scale
    scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(dtype).min)
    state = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(dim=-1) * some[..., None], v)
    state_lse = scores.logsumexp(dim=-1).masked_fill(~some, -torch.inf)
    return context.to(out_dtype), state.to(out_dtype), context_lse.float(), state_lse.float()


def widen_state(state_query: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """(N, H, D) or (B, N, H, D) -> (B, N, H, D) in the dtype of the computation."""
    wide = state_query.to(dtype)
    return wide if wide.dim() == 4 else wide.expand(batch, *wide.shape)
