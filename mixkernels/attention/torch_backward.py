"""Gradients of candidate attention without Triton, from the log-sum-exps that the forward pass saved.

With P = exp(S - lse) over shared and own keys, dP = dO V^T and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. P is computed again for one query and a slab of
candidates at a time, so it stays in cache and nothing is expanded: a pool's gradient is summed over the queries as it
is computed, the shared keys' over the candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.torch_slabs import Slab, add, result_view, slabs, take

_SLAB_LOGITS = {"cpu": 2**19, "cuda": 2**25}
"""Shared logits of a slab."""

_NAMES = ("context_query", "context_key", "context_value", "state_query", "key", "value", "own_logits")


def candidate_attention_backward(
    grads: list[Tensor | None], results: list[Tensor], call: Call, *, scale: float, for_shared: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of context_query, context_key, context_value, state_query, key, value and own_logits.

    Args:
        grads: of context, state, context_lse and state_lse; None for an output without a gradient.
        results: context, state, context_lse and state_lse.
        call: the call; its candidates are floating.
        scale: of the forward pass.
        for_shared: whether to compute the gradients of key and value; otherwise they are None.
    """
    key = call.key
    dtype = torch.promote_types(key.dtype, torch.float32)
    inputs = {name: tensor for name in _NAMES if (tensor := getattr(call, name)) is not None}
    gradients = {name: tensor.new_zeros(tensor.shape, dtype=dtype) for name, tensor in inputs.items()}
    rows = call.context_query.shape[-3] + (call.state_query is not None)
    limit = _SLAB_LOGITS.get(key.device.type, 2**25)
    logits_per_candidate = key.shape[2] * key.shape[1] * rows
    # a pool's slab is used by all queries, a group at a time; any other slab belongs to one query
    pool = call.context_query.dim() == 4 and call.candidate_ids is None and call.candidate_offsets is None
    for slab in slabs(call, limit // logits_per_candidate, queries=key.shape[0] if pool else 1):
        part = take(call, slab, dtype)
        candidates = _Candidates(part, scale)
        group_size = max(limit // (logits_per_candidate * candidates.n), 1)
        for start in range(0, part.key.shape[0], group_size):
            group = slice(start, start + group_size)
            lengths = None if part.key_lengths is None else part.key_lengths[group]
            outputs = _outputs(call, grads, results, slab, group, dtype)
            queries = slice(slab.queries.start + start, slab.queries.start + start + len(part.key[group]))
            shared = (gradients["key"][queries], gradients["value"][queries])
            candidates.add_queries(outputs, part.key[group], part.value[group], lengths, shared)
        for name, gradient in candidates.gradients().items():
            add(call, gradients[name], gradient.unsqueeze(0), slab)
    if not for_shared:
        del gradients["key"], gradients["value"]
    return tuple(gradients[name].to(inputs[name].dtype) if name in gradients else None for name in _NAMES)


class _Outputs(NamedTuple):
    """Outputs for n candidates and b queries, and their gradients: (b, n, k, H, ...) and (b, n, H, ...)."""

    grad_context: Tensor
    grad_state: Tensor | None
    context_delta: Tensor
    state_delta: Tensor | None
    context_lse: Tensor
    state_lse: Tensor | None


def _outputs(
    call: Call, grads: list[Tensor | None], results: list[Tensor], slab: Slab, group: slice, dtype: torch.dtype
) -> _Outputs:
    def part(tensor: Tensor) -> Tensor:
        return result_view(call, tensor, slab)[group].to(dtype)

    given = [None if grad is None else part(grad) for grad in grads]
    grad_context, context_delta = _delta(given[0], part(results[0]), given[2])
    context_lse = part(results[2])
    if call.state_query is None:
        return _Outputs(grad_context, None, context_delta, None, context_lse, None)
    grad_state, state_delta = _delta(given[1], part(results[1]), given[3])
    state_lse = part(results[3])
    # a row without any key: its P is multiplied by zero keys, but must be finite
    state_lse = state_lse.masked_fill(state_lse == -torch.inf, 0.0)
    return _Outputs(grad_context, grad_state, context_delta, state_delta, context_lse, state_lse)


def _delta(grad: Tensor | None, result: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of an output, zeros where there is none, and its delta."""
    grad = torch.zeros_like(result) if grad is None else grad
    delta = (grad * result).sum(dim=-1)
    return grad, delta if grad_lse is None else delta - grad_lse


def _joined(of_contexts: Tensor, of_states: Tensor | None) -> Tensor:
    """(b, n, k, H, ...) and (b, n, H, ...) as rows by head (H, b, n k + n, ...): context rows, then states."""
    b, n, k, heads = of_contexts.shape[:4]
    rows = of_contexts.new_empty(heads, b, n * (k + (of_states is not None)), *of_contexts.shape[4:])
    rows[:, :, : n * k] = of_contexts.flatten(1, 2).movedim(2, 0)
    if of_states is not None:
        rows[:, :, n * k :] = of_states.movedim(2, 0)
    return rows


class _Candidates:
    """A slab of n candidates and their gradients, summed over the queries that were added.

    Own keys are processed one by one, elementwise over candidates: k is small, and matrix products of single candidates
    are slower. Their logits do not depend on the query, so dQ and dK of own keys need only the sum of dS.
    """

    def __init__(self, part: Call, scale: float) -> None:
        self.scale = scale
        self.query, self.value = part.context_query[0], part.context_value[0]
        self.key = None if part.context_key is None else part.context_key[0]
        self.n, self.k = self.query.shape[:2]
        self.has_state = part.state_query is not None
        # all rows that attend to the shared keys, times scale: (H, R, D)
        self.rows = _joined(part.context_query, part.state_query).squeeze(1).mul_(scale)
        # (n, k, k, H): every context row with every own key
        if part.own_logits is not None:
            self.own_logits = part.own_logits[0].to(self.query.dtype)
        else:
            assert self.key is not None, "either own keys or their logits are given"
            own = [(self.query * self.key[:, this : this + 1]).sum(dim=-1) for this in range(self.k)]
            self.own_logits = torch.stack(own, dim=2).mul_(scale)
        self.grad_rows = torch.zeros_like(self.rows)
        self.grad_value = torch.zeros_like(self.value)
        self.grad_own_logits = torch.zeros_like(self.own_logits)

    def add_queries(
        self, outputs: _Outputs, key: Tensor, value: Tensor, lengths: Tensor | None, shared: tuple[Tensor, Tensor]
    ) -> None:
        """Add the share of b queries (b, m, H, D) to the candidates' gradients and to `shared`, key's and value's."""
        self._add_own_keys(outputs)
        queries, m, heads, dim = key.shape
        absent = None
        if lengths is not None:
            # a zero key adds nothing to dQ; its own gradient is zeroed below
            absent = (torch.arange(m, device=key.device) >= lengths[:, None])[:, :, None, None]
            key = key.masked_fill(absent, 0.0)
        # keys before rows in P and dS, so that each product takes its operands as they lie: (H, b m, R), (H b, m, R)
        keys = key.permute(2, 0, 1, 3).reshape(heads, queries * m, dim)
        values = value.permute(2, 0, 1, 3).reshape(heads * queries, m, dim)
        # (H, b, R, D), and (H, b, 1, R)
        grad = _joined(outputs.grad_context, outputs.grad_state)
        lse = _joined(outputs.context_lse, outputs.state_lse).unsqueeze(2)
        delta = _joined(outputs.context_delta, outputs.state_delta).unsqueeze(2)
        each, by_query = (heads, queries, m, -1), (heads * queries, m, -1)
        probs = torch.bmm(keys, self.rows.mT)
        probs.view(each).sub_(lse).exp_()
        grad_rows = grad.flatten(0, 1)
        of_value = torch.bmm(probs.view(by_query), grad_rows)
        grad_scores = torch.bmm(values, grad_rows.mT)
        grad_scores = grad_scores.view(each).sub_(delta).view_as(probs).mul_(probs)
        self.grad_rows.baddbmm_(grad_scores.mT, keys, alpha=self.scale)
        of_key = torch.bmm(grad_scores, self.rows)
        for total, part in zip(shared, (of_key, of_value), strict=True):
            part = part.view(heads, queries, m, dim).permute(1, 2, 0, 3)
            total.add_(part if absent is None else part.masked_fill_(absent, 0.0))

    def _add_own_keys(self, outputs: _Outputs) -> None:
        for this in range(self.k):
            # (b, n, k, H): context rows with own key `this`
            probs = (self.own_logits[:, :, this] - outputs.context_lse).exp_()
            grad_logits = (outputs.grad_context * self.value[:, this : this + 1]).sum(dim=-1)
            self.grad_own_logits[:, :, this] += grad_logits.sub_(outputs.context_delta).mul_(probs).sum(dim=0)
            self.grad_value[:, this] += (probs.unsqueeze(-1) * outputs.grad_context).sum(dim=(0, 2))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the candidates' tensors by name, (n, ...)."""
        grad_rows = self.grad_rows.transpose(0, 1)
        gradients = {"context_value": self.grad_value}
        gradients["context_query"] = grad_rows[: self.n * self.k].reshape(self.query.shape)
        if self.has_state:
            gradients["state_query"] = grad_rows[self.n * self.k :]
        if self.key is None:
            gradients["own_logits"] = self.grad_own_logits
            return gradients
        gradients["context_key"] = torch.empty_like(self.key)
        for this in range(self.k):
            grad_logits = self.grad_own_logits[:, :, this].unsqueeze(-1) * self.scale
            gradients["context_query"] = gradients["context_query"] + grad_logits * self.key[:, this : this + 1]
            gradients["context_key"][:, this] = (grad_logits * self.query).sum(dim=1)
        return gradients
