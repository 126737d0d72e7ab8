"""Gradients of candidate attention without Triton, from the log-sum-exps that the forward pass saved.

With P = exp(S - lse) over shared and own keys, dP = dO V^T and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. P is computed again slab by slab, one query and
some candidates at a time, so it stays in cache and nothing is expanded: a pool's gradient is summed over the queries as
it arises, the shared keys' over the candidates.
"""

import torch
from torch import Tensor

from mixkernels.checks import Call
from mixkernels.torch_backend.slabs import add, put, slabs, take

_SLAB_LOGITS = {"cpu": 2**18, "cuda": 2**25}
"""Shared logits of a slab."""

Optional = Tensor | None


def candidate_attention_backward(
    grads: list[Optional], results: list[Tensor], call: Call, *, scale: float, for_shared: bool
) -> tuple[Optional, ...]:
    """Return the gradients of context_query, context_key, context_value, state_query, key, value and own_logits.

    Args:
        grads: of context, state, context_lse and state_lse; None where there is none.
        results: context, state, context_lse and state_lse.
        call: the call; its candidates are floating.
        scale: of the forward pass.
        for_shared: whether the gradients of key and value are wanted; None otherwise.
    """
    key = call.key
    dtype = torch.promote_types(key.dtype, torch.float32)
    m, heads = key.shape[1:3]
    gradients = {
        name: torch.zeros_like(getattr(call, name), dtype=dtype, memory_format=torch.contiguous_format)
        for name in ("context_query", "context_key", "context_value", "state_query", "own_logits")
        if getattr(call, name) is not None
    }
    shared = [torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in (key, call.value)]
    rows = call.context_query.shape[-3] + (call.state_query is not None)
    most = _SLAB_LOGITS.get(key.device.type, 2**25) // (heads * m * rows)
    for slab in slabs(call, most, one_query=True):
        part = take(call, slab, dtype)
        given = [None if t is None else put(call, t, slab).to(dtype) for t in grads]
        given = [None if t is None else t.squeeze(0) for t in given]
        kept = [put(call, t, slab).to(dtype).squeeze(0) if t.numel() else None for t in results]
        for name, gradient in _slab_backward(given, kept, part, scale, [t[slab.queries] for t in shared]).items():
            add(call, gradients[name], gradient.unsqueeze(0), slab)
    gradients |= dict(zip(("key", "value"), shared, strict=True)) if for_shared else {}
    names = ("context_query", "context_key", "context_value", "state_query", "key", "value", "own_logits")
    return tuple(gradients[name].to(getattr(call, name).dtype) if name in gradients else None for name in names)


def _slab_backward(
    grads: list[Optional], results: list[Optional], part: Call, scale: float, shared: list[Tensor]
) -> dict[str, Tensor]:
    """Gradients of one query's slab of n candidates; adds to the gradients (1, m, H, D) of key and value."""
    grad_context, grad_state, grad_context_lse, grad_state_lse = grads
    context, state, context_lse, state_lse = results
    n, k = context.shape[:2]
    grad_context = torch.zeros_like(context) if grad_context is None else grad_context
    delta = _delta(grad_context, context, grad_context_lse)
    gradients, grad_query = _own_backward(grad_context, delta, context_lse, part, scale)

    # all rows that meet the shared keys, (H, R, D): context rows, then states
    def joined(of_contexts: Tensor, of_states: Tensor | None) -> Tensor:
        of_contexts = of_contexts.reshape(n * k, *of_contexts.shape[2:])
        both = of_contexts if of_states is None else torch.cat([of_contexts, of_states])
        return both.transpose(0, 1)

    length = part.key.shape[1] if part.key_lengths is None else int(part.key_lengths[0])
    state_query, delta_state = None, None
    if part.state_query is not None:
        state_query = part.state_query[0]
        grad_state = torch.zeros_like(state) if grad_state is None else grad_state
        delta_state = _delta(grad_state, state, grad_state_lse)
    if length:
        query = joined(part.context_query[0], state_query)
        grad = joined(grad_context, grad_state)
        lse = joined(context_lse, state_lse)
        delta = joined(delta, delta_state)
        # (H, length, D)
        key, value = (t[0, :length].transpose(0, 1) for t in (part.key, part.value))
        # (H, R, length)
        probs = torch.baddbmm(lse.unsqueeze(-1), query, key.transpose(1, 2), beta=-1.0, alpha=scale).exp_()
        # with P = 0 rows without any key cannot arise here: length > 0
        grad_scores = torch.baddbmm(delta.unsqueeze(-1), grad, value.transpose(1, 2), beta=-1.0).mul_(probs)
        shared[0][0, :length] += torch.bmm(grad_scores.transpose(1, 2), query).transpose(0, 1).mul_(scale)
        shared[1][0, :length] += torch.bmm(probs.transpose(1, 2), grad).transpose(0, 1)
        from_shared = torch.bmm(grad_scores, key).mul_(scale).transpose(0, 1)
        grad_query += from_shared[: n * k].view_as(grad_query)
        if state_query is not None:
            gradients["state_query"] = from_shared[n * k :]
    gradients["context_query"] = grad_query
    return gradients


def _delta(grad: Tensor, result: Tensor, grad_lse: Optional) -> Tensor:
    delta = (grad * result).sum(dim=-1)
    return delta if grad_lse is None else delta - grad_lse


def _own_backward(
    grad: Tensor, delta: Tensor, lse: Tensor, part: Call, scale: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients through the own keys: key, value or logits by name, and the query's share (n, k, H, D).

    One own key after the other, elementwise over candidates: k is small, and products of single candidates are slower.
    """
    query, value = part.context_query[0], part.context_value[0]
    key = None if part.context_key is None else part.context_key[0]
    k = query.shape[1]
    grad_query = torch.zeros_like(query)
    grad_value = torch.empty_like(value)
    grad_key = None if key is None else torch.empty_like(key)
    grad_logits = None if key is not None else torch.empty_like(part.own_logits[0], dtype=query.dtype)
    for own in range(k):
        this = slice(own, own + 1)
        # (n, k, H): every context row with own key `own`
        if key is None:
            logits = part.own_logits[0][:, :, own].to(query.dtype)
        else:
            logits = (query * key[:, this]).sum(dim=-1).mul_(scale)
        probs = logits.sub_(lse).exp_() if key is not None else (logits - lse).exp()
        grad_scores = (grad * value[:, this]).sum(dim=-1).sub_(delta).mul_(probs)
        grad_value[:, own] = (probs.unsqueeze(-1) * grad).sum(dim=1)
        if key is None:
            grad_logits[:, :, own] = grad_scores
        else:
            grad_scores = grad_scores.mul_(scale).unsqueeze(-1)
            grad_query.addcmul_(grad_scores, key[:, this])
            grad_key[:, own] = (grad_scores * query).sum(dim=1)
    gradients = {"context_value": grad_value}
    if key is None:
        gradients["own_logits"] = grad_logits
    else:
        gradients["context_key"] = grad_key
    return gradients, grad_query
