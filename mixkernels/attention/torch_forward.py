"""Candidate attention without Triton: tuned for CPU, runs on any device. `operator` calls it and checks the inputs.

Shared keys are read once for all candidates of a query (one product of their rows, never expanded), own keys are
handled apart, and the two softmaxes are merged by their log-sum-exps. On a CPU the shared part is PyTorch's own flash
kernel, which returns the log-sum-exp and never stores the scores; elsewhere it is matrix products and a softmax.

Candidates are processed in slabs, so that intermediates stay in cache and gathered candidates are never copied all at
once. Autograd is outside (`operator`), so intermediates may be changed in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mixkernels.attention.checks import Call
from mixkernels.attention.torch_backward import candidate_attention_backward
from mixkernels.attention.torch_slabs import result_view, slabs, take
from mixkernels.devices import multiplies_natively

__all__ = ["candidate_attention", "candidate_attention_backward"]

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

_SLAB_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Output elements of a slab."""


def candidate_attention(call: Call, *, scale: float, return_lse: bool) -> Results:
    """Same contract as the reference's; the log-sum-exps are None unless return_lse."""
    key = call.key
    dtype = key.dtype if multiplies_natively(key.dtype, key.device) else torch.float32
    k, heads, dim = call.context_query.shape[-3:]
    has_state = call.state_query is not None
    pairs = _SLAB_ELEMENTS.get(key.device.type, 2**26) // ((k + has_state) * heads * dim)
    parts = list(slabs(call, pairs, queries=pairs // max(call.lead[-1], 1)))
    if len(parts) == 1 and call.candidate_offsets is None and key.shape[0]:
        context, state, context_lse, state_lse = _attend(take(call, parts[0], dtype), scale, return_lse=return_lse)
        state = None if state is None else state.to(key.dtype)
        return context.to(key.dtype), state, context_lse, state_lse

    lead = call.lead
    lse_dtype = torch.promote_types(key.dtype, torch.float32)
    context = key.new_empty(*lead, k, heads, dim)
    state = key.new_empty(*lead, heads, dim) if has_state else None
    context_lse = key.new_empty(*lead, k, heads, dtype=lse_dtype) if return_lse else None
    state_lse = key.new_empty(*lead, heads, dtype=lse_dtype) if return_lse and has_state else None
    results = (context, state, context_lse, state_lse)
    for slab in parts:
        out = result_view(call, context, slab) if dtype == key.dtype else None
        for whole, part in zip(
            results, _attend(take(call, slab, dtype), scale, return_lse=return_lse, out=out), strict=True
        ):
            if whole is not None and part is not None and part is not out:
                result_view(call, whole, slab).copy_(part)
    return results


def _attend(call: Call, scale: float, *, return_lse: bool, out: Tensor | None = None) -> Results:
    """Attend candidates (1 or B, n, k, H, D) to (B, m, H, D); out, if given, takes the context."""
    batch = call.key.shape[0]
    on_cpu = call.key.device.type == "cpu"
    attend_shared = _attend_shared_flash if on_cpu else _attend_shared_products
    # own keys first: the outputs then reuse the memory of their freed intermediate, which is still in cache
    own, own_lse = _attend_own(call, scale, on_cpu=on_cpu)
    rows = call.context_query.flatten(1, 2)
    shared, shared_lse = attend_shared(rows, call.key, call.value, call.key_lengths, scale)
    shape = (batch, *call.context_query.shape[1:])
    shared, shared_lse = shared.view(shape), shared_lse.view(shape[:-1])
    # merge attention over disjoint keys by its log-sum-exps
    weight = torch.sigmoid(own_lse - shared_lse).unsqueeze(-1).to(shared.dtype)
    context = shared.lerp_(own, weight) if out is None else torch.lerp(shared, own.expand(shape), weight, out=out)
    context_lse = torch.logaddexp(shared_lse, own_lse) if return_lse else None
    if call.state_query is None:
        return context, None, context_lse, None
    state, state_lse = attend_shared(call.state_query, call.key, call.value, call.key_lengths, scale)
    return context, state, context_lse, state_lse if return_lse else None


def _attend_shared_flash(
    rows: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Rows (1 or B, R, H, D) against (B, m, H, D): output (B, R, H, D) and log-sum-exp (B, R, H), contiguous."""
    batch, m = key.shape[:2]
    if batch == 1 and key_lengths is not None and (length := int(key_lengths[0])) > 0:
        # one query: cut instead of mask
        key, value, key_lengths = key[:, :length], value[:, :length], None
    query = rows.expand(batch, *rows.shape[1:]).transpose(1, 2)
    mask = None
    if key_lengths is not None:
        invalid = torch.arange(m) >= key_lengths[:, None]
        # additive and finite: a query without tokens then gives finite numbers, which are replaced below
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
    """`_attend_shared_flash` by two products and a softmax, on any device."""
    batch, m = key.shape[:2]
    dtype = torch.promote_types(key.dtype, torch.float32)
    if rows.shape[0] == 1:
        # all queries share the rows: one product with the keys of all queries, (H, R, D) x (H, D, B m)
        scores = torch.matmul(rows[0].transpose(0, 1), key.permute(2, 3, 0, 1).flatten(2))
        scores = scores.unflatten(-1, (batch, m)).permute(2, 0, 1, 3)
    else:
        scores = torch.matmul(rows.transpose(1, 2), key.permute(0, 2, 3, 1))
    # (B, H, R, m)
    scores = scores.to(dtype) * scale
    if key_lengths is not None:
        valid = torch.arange(m, device=key.device) < key_lengths[:, None]
        scores.masked_fill_(~valid[:, None, None, :], torch.finfo(dtype).min)
    lse = scores.logsumexp(dim=-1)
    probs = scores.sub_(lse.unsqueeze(-1)).exp_()
    if key_lengths is not None:
        has_tokens = (key_lengths > 0)[:, None, None]
        probs *= has_tokens.unsqueeze(-1)
        lse = lse.masked_fill(~has_tokens, -torch.inf)
    out = torch.matmul(probs.to(value.dtype), value.transpose(1, 2))
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def _attend_own(call: Call, scale: float, *, on_cpu: bool) -> tuple[Tensor, Tensor]:
    """Attend each candidate's context rows to its own keys: (..., n, k, H, D) and log-sum-exp (..., n, k, H)."""
    query, key, value = call.context_query, call.context_key, call.context_value
    k = query.shape[-3]
    wide = torch.promote_types(query.dtype, torch.float32)
    if k == 1:
        # one own key has all the weight
        if call.own_logits is not None:
            return value, call.own_logits.squeeze(-2)
        assert key is not None, "either own keys or their logits are given"
        return value, (query.to(wide) * key.to(wide)).sum(dim=-1).mul_(scale)
    if on_cpu and key is not None:
        return _attend_own_flash(query, key, value, scale)
    # (..., n, H, k, k)
    if call.own_logits is not None:
        scores = call.own_logits.movedim(-1, -3).to(wide)
    else:
        assert key is not None, "either own keys or their logits are given"
        scores = torch.matmul(query.transpose(-3, -2).to(wide), key.to(wide).movedim(-3, -1)) * scale
    own = torch.matmul(scores.softmax(dim=-1), value.transpose(-3, -2).to(wide))
    return own.transpose(-3, -2).to(value.dtype), scores.logsumexp(dim=-1).transpose(-1, -2)


_OWN_BLOCK_ROWS = 24
"""Most rows of a block of `_attend_own_flash`. k x k products of single candidates are mostly overhead; blocks of 16 to
24 rows, of a power of two of candidates, measured fastest for k = 2, 3 and 4, although part of their work is masked."""


def _attend_own_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_own` in blocks of a few candidates under a block-diagonal mask.

    A block's size depends only on k, and each candidate gets a power of two of its columns. The softmax sums a row by
    vectors of 8 or 16 columns, then across the vector by halves: with this layout a candidate's k terms are added in
    the same order at every position in the block.
    """
    k, heads, dim = query.shape[-3:]
    per_block = 1 << (_OWN_BLOCK_ROWS // k).bit_length() - 1
    # MKL's tiles have six rows with AVX2 on Intel, and it rounds a remainder of two rows differently
    while per_block > 1 and per_block * k % 6 == 2:
        per_block //= 2
    width = k if per_block == 1 else 1 << (k - 1).bit_length()
    candidates = query.shape[:-3].numel()
    missing = -candidates % per_block

    def blocks(rows: Tensor, columns: int) -> Tensor:
        rows = rows.reshape(candidates, k, heads, dim)
        if missing or columns > k:
            rows = F.pad(rows, (0, 0, 0, 0, 0, columns - k, 0, missing))
        return rows.view(-1, per_block * columns, heads, dim).transpose(1, 2)

    column = torch.arange(per_block * width)
    candidate_of_row = torch.arange(per_block).repeat_interleave(k)
    mask = torch.zeros(1, 1, per_block * k, per_block * width, dtype=query.dtype)
    mask.masked_fill_((candidate_of_row[:, None] != column // width) | (column % width >= k), -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        blocks(query, k), blocks(key, width), blocks(value, width), attn_mask=mask, scale=scale
    )
    out, lse = (part.transpose(1, 2).flatten(0, 1)[: candidates * k] for part in (out, lse))
    return out.reshape(query.shape), lse.reshape(query.shape[:-1])
