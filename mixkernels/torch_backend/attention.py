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
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Same contract as `mixkernels.reference.attention.candidate_attention`."""
    batch = key.shape[0]
    tensors = (context_query, context_key, context_value, state_query, key, value)
    if key.device.type == "cpu" and not _multiplies_natively(key.dtype):
        wide = (None if tensor is None else tensor.float() for tensor in tensors)
        context, state, *lses = candidate_attention(*wide, key_lengths=key_lengths, scale=scale, return_lse=return_lse)
        return context.to(key.dtype), None if state is None else state.to(key.dtype), *lses
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    fused = key.device.type == "cpu" and not needs_grad
    attend_shared = _attend_shared_flash if fused else _attend_shared_products
    # rows of all candidates of a query: (1 or B, N*k, H, D), a pool keeps its leading 1
    pool = context_query.dim() == 4
    rows = (context_query.unsqueeze(0) if pool else context_query).flatten(1, 2)
    context_shape = (batch, *context_query.shape[-4:])
    # own keys first: their intermediate is freed before the outputs need memory of its size, which is then warm
    own, own_lse = _attend_own(context_query, context_key, context_value, scale, fused=fused)
    shared, shared_lse = attend_shared(rows, key, value, key_lengths, scale)
    shared_lse = shared_lse.view(context_shape[:-1])
    context = _merge_own(shared.view(context_shape), shared_lse, own, own_lse)
    context_lse = torch.logaddexp(shared_lse, own_lse).float() if return_lse else None
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
    if batch == 1 and key_lengths is not None and (length := int(key_lengths[0])) > 0:
        # one query: cut instead of mask
        key, value, key_lengths = key[:, :length], value[:, :length], None
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


def _merge_own(shared: Tensor, shared_lse: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
    """Merge attention over disjoint keys by its log-sum-exps.

    shared (B, N, k, H, D) and shared_lse (B, N, k, H) are over the query's tokens, own and own_lse over the candidates'
    own keys, with or without the leading B.
    """
    weight = torch.sigmoid(own_lse - shared_lse).unsqueeze(-1).to(shared.dtype)
    # shared is this call's own tensor, so without gradients it becomes the result in place
    lerp = torch.lerp if shared.requires_grad else Tensor.lerp_
    return lerp(shared, own.to(shared.dtype), weight)


def _attend_own(query: Tensor, key: Tensor, value: Tensor, scale: float, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Attend each candidate's context rows to its own keys: (..., N, k, H, D) and log-sum-exp (..., N, k, H)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.shape[-3] == 1:
        # one own key has all the weight
        return value, (query.to(dtype) * key.to(dtype)).sum(dim=-1) * scale
    if fused and query.numel():
        return _attend_own_flash(query, key, value, scale)
    # (..., N, H, k, k)
    scores = torch.matmul(query.transpose(-3, -2).to(dtype), key.to(dtype).movedim(-3, -1)) * scale
    own = torch.matmul(scores.softmax(dim=-1), value.transpose(-3, -2).to(dtype))
    return own.transpose(-3, -2), scores.logsumexp(dim=-1).transpose(-1, -2)


_OWN_BLOCK_ROWS = 24
"""Most rows of a block of `_attend_own_flash`. Products of single candidates, k x k, are dominated by their own
overhead; blocks of 16 to 24 rows of a power of two of candidates measured fastest for k = 2, 3 and 4, although they
compute what the mask then hides."""


def _attend_own_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_own` in blocks of a few candidates under a block-diagonal mask."""
    k, heads, dim = query.shape[-3:]
    candidates = query.shape[:-3].numel()
    together = 1
    while 2 * together * k <= _OWN_BLOCK_ROWS and candidates % (2 * together) == 0:
        together *= 2
    candidate = torch.arange(together).repeat_interleave(k)
    mask = torch.zeros(1, 1, together * k, together * k, dtype=query.dtype)
    mask.masked_fill_(candidate[:, None] != candidate, -torch.inf)
    blocks = (t.reshape(-1, together * k, heads, dim).transpose(1, 2) for t in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*blocks, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(query.shape), lse.transpose(1, 2).reshape(query.shape[:-1])
