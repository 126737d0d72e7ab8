"""The fast path without Triton: CPU first, any device.

Shared keys are read once for all candidates of a query (one product of N*k rows, never expanded), own keys are handled
apart, and the two softmaxes are merged by their log-sum-exps. Called by `mixkernels.ops` only, which has checked the
inputs.

Two ways to the shared part: without gradients on a CPU, PyTorch's own flash kernel, which hands out the log-sum-exp
and never writes the scores; otherwise plain products, which autograd differentiates.
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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Same contract as `mixkernels.reference.candidate_attention`."""
    batch = key.shape[0]
    tensors = (context_query, context_key, context_value, state_query, key, value)
    if key.device.type == "cpu" and not _multiplies_natively(key.dtype):
        wide = (None if tensor is None else tensor.float() for tensor in tensors)
        context, state, *lses = candidate_attention(*wide, key_lengths=key_lengths, scale=scale)
        return context.to(key.dtype), None if state is None else state.to(key.dtype), *lses
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if key.device.type == "cpu" and not needs_grad:
        attend_shared = _attend_shared_flash
        if batch == 1 and key_lengths is not None:
            # one query: cut instead of mask
            length = max(int(key_lengths[0]), 1)
            if int(key_lengths[0]) > 0:
                key_lengths = None
            key, value = key[:, :length], value[:, :length]
    else:
        attend_shared = _attend_shared_products

    # rows of all candidates of a query: (1 or B, N*k, H, D), a pool keeps its leading 1
    pool = context_query.dim() == 4
    rows = (context_query.unsqueeze(0) if pool else context_query).flatten(1, 2)
    shared, shared_lse = attend_shared(rows, key, value, key_lengths, scale)
    context_shape = (batch, *context_query.shape[-4:])
    context, context_lse = _merge_own(
        shared.view(context_shape),
        shared_lse.view(context_shape[:-1]),
        context_query,
        context_key,
        context_value,
        scale,
    )
    if state_query is None:
        return context, None, context_lse, None
    state_rows = state_query.unsqueeze(0) if pool else state_query
    state, state_lse = attend_shared(state_rows, key, value, key_lengths, scale)
    return context, state.to(key.dtype), context_lse, state_lse.float()


def _multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in dtype; emulated ones are no faster than float32."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _attend_shared_flash(
    rows: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Rows (1 or B, R, H, D) against (B, m, H, D): output (B, R, H, D) and log-sum-exp (B, R, H), contiguous."""
    batch, m = key.shape[:2]
    if rows.shape[1] == 0 or batch == 0:
        empty = (batch, *rows.shape[1:])
        return key.new_empty(empty), key.new_empty(empty[:-1], dtype=torch.promote_types(key.dtype, torch.float32))
    query = rows.expand(batch, *rows.shape[1:]).transpose(1, 2)
    mask = None
    if key_lengths is not None:
        invalid = torch.arange(m) >= key_lengths[:, None]
        # additive and finite, so that a query without tokens gives numbers, which are replaced below
        mask = torch.zeros(batch, 1, 1, m, dtype=key.dtype).masked_fill_(
            invalid[:, None, None, :], torch.finfo(key.dtype).min
        )
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale
    )
    # both come back as (B, H, R, ...) views of memory laid out (B, R, H, ...)
    out, lse = out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()
    if key_lengths is not None:
        absent = key_lengths == 0
        out.masked_fill_(absent[:, None, None, None], 0.0)
        lse.masked_fill_(absent[:, None, None], -torch.inf)
    return out, lse


def _attend_shared_products(
    rows: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`_attend_shared_flash` by two products and a softmax: differentiable, any device, float32 softmax."""
    m = key.shape[1]
    dtype = torch.promote_types(key.dtype, torch.float32)
    # (1 or B, H, R, D) x (B, H, D, m)
    scores = torch.matmul(rows.transpose(1, 2), key.permute(0, 2, 3, 1)).to(dtype) * scale
    some = None
    if key_lengths is not None:
        valid = torch.arange(m, device=key.device) < key_lengths[:, None]
        some = (key_lengths > 0)[:, None, None, None]
        scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(dtype).min)
    # (B, H, R)
    lse = scores.logsumexp(dim=-1)
    probs = (scores - lse.unsqueeze(-1)).exp()
    if some is not None:
        probs = probs * some
        lse = lse.masked_fill(~some.squeeze(-1), -torch.inf)
    out = torch.matmul(probs.to(value.dtype), value.transpose(1, 2))
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _merge_own(
    shared: Tensor, shared_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Add each candidate's own keys to its rows: softmaxes over disjoint keys merge by their log-sum-exps.

    shared (B, N, k, H, D) and shared_lse (B, N, k, H) are the attention over the query's tokens alone; query, key and
    value are the candidates' own, (N, k, H, D) or (B, N, k, H, D).
    """
    out_dtype = shared.dtype
    dtype = shared_lse.dtype
    if query.shape[-3] == 1:
        # one own key: its weight is sigmoid(own logit - log-sum-exp of the shared ones)
        own = (query.to(dtype) * key.to(dtype)).sum(dim=-1) * scale
        weight = torch.sigmoid(own - shared_lse)
        context = torch.lerp(shared, value.to(out_dtype).expand_as(shared), weight.to(out_dtype).unsqueeze(-1))
        return context, torch.logaddexp(shared_lse, own).float()
    # (..., N, H, k, k)
    own = torch.matmul(query.transpose(-3, -2).to(dtype), key.to(dtype).movedim(-3, -1)) * scale
    # (B, N, H, k)
    shared_lse = shared_lse.transpose(-1, -2)
    lse = torch.logaddexp(shared_lse, own.logsumexp(dim=-1))
    probs = (own - lse.unsqueeze(-1)).exp()
    own_part = torch.matmul(probs, value.transpose(-3, -2).to(dtype)).transpose(-3, -2)
    shared_weight = (shared_lse - lse).exp().transpose(-1, -2).unsqueeze(-1)
    context = torch.addcmul(own_part, shared.to(dtype), shared_weight).to(out_dtype)
    return context, lse.transpose(-1, -2).float()
