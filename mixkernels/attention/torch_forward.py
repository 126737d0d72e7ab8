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

_FEW_CONTEXTS = 3
"""With at most this many contexts, attention to own keys is k elementwise products; k x k matrix products cost more."""

_BLOCK_ROWS = 16
"""Rows of a block of `_attend_own_flash`, if k is not larger. The kernel is about as fast for 16 rows as for fewer."""


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
    """Attend each candidate's context rows to its own keys: (..., n, k, H, D) and log-sum-exp (..., n, k, H).

    On a CPU a candidate keeps its bits at every position, as every step treats all candidates alike.
    """
    lead, (k, heads) = call.context_query.shape[:-3], call.context_query.shape[-3:-1]
    query, value = call.context_query.flatten(0, -4), call.context_value.flatten(0, -4)
    if call.own_logits is None:
        assert call.context_key is not None, "either own keys or their logits are given"
        key = call.context_key.flatten(0, -4)
        if on_cpu and k > _FEW_CONTEXTS and k & (k - 1) == 0:
            # other blocks would not fill the kernel's vectors: products are up to twice as fast for them
            own, lse = _attend_own_flash(query, key, value, scale)
            return own.unflatten(0, lead), lse.unflatten(0, lead)
        logits = (_logits_elementwise if k <= _FEW_CONTEXTS else _logits_by_products)(query, key, scale)
    else:
        logits = call.own_logits.flatten(0, -4).movedim(2, 0).to(torch.promote_types(query.dtype, torch.float32))
    if k == 1:
        # one own key has all the weight
        return call.context_value, logits.view(*lead, k, heads)
    own, lse = (_weigh_elementwise if k <= _FEW_CONTEXTS else _weigh_by_products)(logits, value)
    return own.to(value.dtype).unflatten(0, lead), lse.unflatten(0, lead)


def _logits_elementwise(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logits (k, n, k, H), own keys first, of rows and own keys (n, k, H, D)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    logits, product = query.new_empty(query.shape[1], *query.shape[:-1]), torch.empty_like(query)
    for this in range(query.shape[1]):
        torch.mul(query, key[:, this : this + 1], out=product)
        torch.sum(product, dim=-1, out=logits[this])
    return logits.mul_(scale)


def _weigh_elementwise(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Own values (n, k, H, D) weighed by the softmax of logits (k, n, k, H), and the log-sum-exps."""
    probs, lse = _own_softmax(logits)
    value = value.to(probs.dtype)
    own = value[:, :1] * probs[0].unsqueeze(-1)
    for this in range(1, len(probs)):
        own.addcmul_(value[:, this : this + 1], probs[this].unsqueeze(-1))
    return own, lse


def _logits_by_products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`_logits_elementwise` by k x k matrix products, head by head: nothing is then copied."""
    (count, k, heads, _), wide = query.shape, torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    logits = query.new_empty(heads, count, k, k)
    for head in range(heads):
        torch.bmm(query[:, :, head], key[:, :, head].mT, out=logits[head])
    return logits.mul_(scale).permute(3, 1, 2, 0)


def _weigh_by_products(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`_weigh_elementwise` by matrix products, head by head."""
    # (k, H, n, k)
    probs, lse = _own_softmax(logits.transpose(1, 3).transpose(2, 3))
    value = value.to(probs.dtype)
    count, k, heads, dim = value.shape
    own = value.new_empty(heads, count, k, dim)
    for head in range(heads):
        torch.bmm(probs[:, head].permute(1, 2, 0), value[:, :, head], out=own[head])
    return own.permute(1, 2, 0, 3), lse.permute(1, 2, 0)


def _own_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the first dimension, and its log-sum-exp.

    Terms are added one by one: the order in `torch.softmax` and `torch.sum` depends on a column's position.
    """
    top = logits.amax(dim=0)
    # contiguous, also if logits are permuted
    probs = torch.sub(logits, top, out=logits.new_empty(logits.shape)).exp_()
    total = probs[0].clone()
    for part in probs[1:]:
        total += part
    return probs.div_(total), total.log_().add_(top)


def _attend_own_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attend_own` for k a power of two, in blocks of a few candidates under a block-diagonal mask.

    A block's size depends only on k. The softmax sums a row by vectors of 8 or 16 columns, then across the vector by
    halves, so a candidate's k terms are added in the same order at every position in the block.
    """
    count, k, heads, dim = query.shape
    per_block = max(_BLOCK_ROWS // k, 1)
    size, missing = per_block * k, -count % per_block

    def blocks(rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else rows
        return rows.reshape(-1, size, heads, dim).transpose(1, 2)

    candidate = torch.arange(size) // k
    mask = torch.zeros(1, 1, size, size, dtype=query.dtype)
    mask.masked_fill_(candidate[:, None] != candidate, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        blocks(query), blocks(key), blocks(value), attn_mask=mask, scale=scale
    )
    out, lse = out.transpose(1, 2).reshape(-1, k, heads, dim), lse.transpose(1, 2).reshape(-1, k, heads)
    return out[:count], lse[:count]
