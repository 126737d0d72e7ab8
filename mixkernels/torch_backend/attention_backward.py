"""Gradients of candidate attention without Triton, from the log-sum-exps that the forward pass saved.

With P = exp(S - lse) over shared and own keys, dP = dO V^T and delta = rowsum(dO * O) - dlse:
dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. P is computed again for one query and a slab of
candidates at a time, so it stays in cache and nothing is expanded: a pool's gradient is summed over the queries as it
arises, the shared keys' over the candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixkernels.checks import Call
from mixkernels.torch_backend.slabs import Slab, add, put, slabs, take

_SLAB_LOGITS = {"cpu": 2**18, "cuda": 2**25}
"""Shared logits of a slab."""

_NAMES = ("context_query", "context_key", "context_value", "state_query", "key", "value", "own_logits")


def candidate_attention_backward(
    grads: list[Tensor | None], results: list[Tensor], call: Call, *, scale: float, for_shared: bool
) -> tuple[Tensor | None, ...]:
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
    inputs = {name: tensor for name in _NAMES if (tensor := getattr(call, name)) is not None}
    gradients = {name: tensor.new_zeros(tensor.shape, dtype=dtype) for name, tensor in inputs.items()}
    rows = call.context_query.shape[-3] + (call.state_query is not None)
    most = _SLAB_LOGITS.get(key.device.type, 2**25) // (key.shape[2] * key.shape[1] * rows)
    # a pool's slab meets one query after the other; any other slab belongs to one query
    pool = call.context_query.dim() == 4 and call.candidate_ids is None and call.candidate_offsets is None
    for slab in slabs(call, most, one_query=not pool):
        part = take(call, slab, dtype)
        candidates = _Candidates(part, scale)
        for number in range(part.key.shape[0]):
            outputs = _outputs(call, grads, results, slab, number, dtype)
            length = part.key.shape[1] if part.key_lengths is None else int(part.key_lengths[number])
            of_key, of_value = candidates.meet(outputs, part.key[number, :length], part.value[number, :length])
            query = slab.queries.start + number
            if length and for_shared:
                gradients["key"][query, :length].add_(of_key.transpose(0, 1), alpha=scale)
                gradients["value"][query, :length] += of_value.transpose(0, 1)
        for name, gradient in candidates.gradients().items():
            add(call, gradients[name], gradient.unsqueeze(0), slab)
    if not for_shared:
        del gradients["key"], gradients["value"]
    return tuple(gradients[name].to(inputs[name].dtype) if name in gradients else None for name in _NAMES)


class _Outputs(NamedTuple):
    """What one query's slab of n candidates gave, and the gradients of it: (n, k, H, ...) and (n, H, ...)."""

    grad_context: Tensor
    grad_state: Tensor | None
    context_delta: Tensor
    state_delta: Tensor | None
    context_lse: Tensor
    state_lse: Tensor | None


def _outputs(
    call: Call, grads: list[Tensor | None], results: list[Tensor], slab: Slab, number: int, dtype: torch.dtype
) -> _Outputs:
    given = [None if t is None else put(call, t, slab)[number].to(dtype) for t in grads]
    kept = [put(call, t, slab)[number].to(dtype) if t.numel() else None for t in results]
    grad_context, context_delta = _delta(given[0], kept[0], given[2])
    if call.state_query is None:
        return _Outputs(grad_context, None, context_delta, None, kept[2], None)
    grad_state, state_delta = _delta(given[1], kept[1], given[3])
    return _Outputs(grad_context, grad_state, context_delta, state_delta, kept[2], kept[3])


def _delta(grad: Tensor | None, result: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradient of an output, zeros where there is none, and its delta."""
    grad = torch.zeros_like(result) if grad is None else grad
    delta = (grad * result).sum(dim=-1)
    return grad, delta if grad_lse is None else delta - grad_lse


class _Candidates:
    """A slab of n candidates that meets queries, and the candidates' gradients, summed over those queries.

    Own keys are worked off one after the other, elementwise over candidates: k is small, and products of single
    candidates are slower. Their logits do not depend on the query, so dQ and dK of own keys need the sum of dS alone.
    """

    def __init__(self, part: Call, scale: float) -> None:
        self.scale = scale
        self.query, self.value = part.context_query[0], part.context_value[0]
        self.key = None if part.context_key is None else part.context_key[0]
        self.n, self.k = self.query.shape[:2]
        # all rows that meet the shared keys, (H, R, D): context rows, then states
        self.rows = self._joined(self.query, None if part.state_query is None else part.state_query[0]).contiguous()
        self.has_state = part.state_query is not None
        # (n, k, k, H): every context row with every own key
        if self.key is None:
            self.own_logits = part.own_logits[0].to(self.query.dtype)
        else:
            own = [(self.query * self.key[:, this : this + 1]).sum(dim=-1) for this in range(self.k)]
            self.own_logits = torch.stack(own, dim=2).mul_(scale)
        self.grad_rows = torch.zeros_like(self.rows)
        self.grad_value = torch.zeros_like(self.value)
        self.grad_own_logits = torch.zeros_like(self.own_logits)

    def _joined(self, of_contexts: Tensor, of_states: Tensor | None) -> Tensor:
        of_contexts = of_contexts.flatten(0, 1)
        both = of_contexts if of_states is None else torch.cat([of_contexts, of_states])
        return both.transpose(0, 1)

    def meet(self, outputs: _Outputs, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one query's part to the candidates' gradients; return the query's gradients (H, length, D).

        That of key lacks the factor scale.
        """
        for this in range(self.k):
            probs = (self.own_logits[:, :, this] - outputs.context_lse).exp_()
            grad_logits = (outputs.grad_context * self.value[:, this : this + 1]).sum(dim=-1)
            self.grad_own_logits[:, :, this] += grad_logits.sub_(outputs.context_delta).mul_(probs)
            if self.k == 1:
                self.grad_value.addcmul_(probs.unsqueeze(-1), outputs.grad_context)
            else:
                self.grad_value[:, this] += (probs.unsqueeze(-1) * outputs.grad_context).sum(dim=1)
        # (H, R, D), (H, R, 1), (H, length, D)
        grad = self._joined(outputs.grad_context, outputs.grad_state)
        lse = self._joined(outputs.context_lse, outputs.state_lse).unsqueeze(-1)
        delta = self._joined(outputs.context_delta, outputs.state_delta).unsqueeze(-1)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        if key.shape[1] == 0:
            return key, value
        # (H, R, length)
        probs = torch.baddbmm(lse, self.rows, key.transpose(1, 2), beta=-1.0, alpha=self.scale).exp_()
        grad_scores = torch.baddbmm(delta, grad, value.transpose(1, 2), beta=-1.0).mul_(probs)
        self.grad_rows.baddbmm_(grad_scores, key, alpha=self.scale)
        return torch.bmm(grad_scores.transpose(1, 2), self.rows), torch.bmm(probs.transpose(1, 2), grad)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the candidates' tensors by name, (n, ...)."""
        grad_rows = self.grad_rows.transpose(0, 1)
        grad_query = grad_rows[: self.n * self.k].reshape(self.query.shape)
        gradients = {"context_value": self.grad_value}
        if self.key is None:
            gradients["own_logits"] = self.grad_own_logits
        else:
            grad_key = torch.empty_like(self.key)
            for this in range(self.k):
                grad_logits = self.grad_own_logits[:, :, this].unsqueeze(-1) * self.scale
                grad_query = grad_query + grad_logits * self.key[:, this : this + 1]
                grad_key[:, this] = (grad_logits * self.query).sum(dim=1)
            gradients["context_key"] = grad_key
        gradients["context_query"] = grad_query
        if self.has_state:
            gradients["state_query"] = grad_rows[self.n * self.k :]
        return gradients
