"""Candidate attention without this library: the standard formulations, each as fast as we could write it.

Every function takes ``Inputs`` and returns (context (N, k, H, D), state (N, H, D)) for one query.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

Result = tuple[Tensor, Tensor]

EXPANDED_CHUNK = 1000
"""Candidates expanded at once, limited by memory; a GPU grid would stop at 65,535 rows."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one shape: candidates (N, k, H, D), states (N, H, D), the query's keys and values (m, H, D)."""

    context_query: Tensor
    context_key: Tensor
    context_value: Tensor
    state_query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, n: int, k: int, m: int, h: int, d: int, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(n, k, h, d)] * 3 + [(n, h, d)] + [(m, h, d)] * 2
        return cls(*(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes))

    def rows(self, start: int, stop: int) -> "Inputs":
        parts = (self.context_query, self.context_key, self.context_value, self.state_query)
        return Inputs(*(part[start:stop] for part in parts), self.key, self.value)


def expand(inputs: Inputs) -> Result:
    """Keys and values (N, H, m + k, D): the query's, repeated for every candidate, then the candidate's own."""
    n = len(inputs.context_query)

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared.expand(n, *shared.shape), own], dim=1).transpose(1, 2)

    return joined(inputs.key, inputs.context_key), joined(inputs.value, inputs.context_value)


def sdpa_on_expanded(inputs: Inputs, key: Tensor, value: Tensor) -> Result:
    """SDPA over keys that were expanded before; the expansion is not timed."""
    m = len(inputs.key)
    context = F.scaled_dot_product_attention(inputs.context_query.transpose(1, 2), key, value)
    state = F.scaled_dot_product_attention(inputs.state_query.unsqueeze(2), key[:, :, :m], value[:, :, :m])
    return context.transpose(1, 2), state.squeeze(2)


def sdpa_expanded(inputs: Inputs) -> Result:
    """SDPA over expanded keys, in chunks; the expansion is timed, as in a model without special kernels."""
    n = len(inputs.context_query)
    parts = []
    for start in range(0, n, EXPANDED_CHUNK):
        chunk = inputs.rows(start, start + EXPANDED_CHUNK)
        parts.append(sdpa_on_expanded(chunk, *expand(chunk)))
    contexts, states = zip(*parts, strict=True)
    return (contexts[0], states[0]) if len(parts) == 1 else (torch.cat(contexts), torch.cat(states))


def einsum_concatenated(inputs: Inputs) -> Result:
    """No expansion: shared and own scores by einsum, concatenated under one softmax."""
    m, scale = len(inputs.key), 1 / math.sqrt(inputs.key.shape[-1])
    shared = torch.einsum("nkhd,mhd->nkhm", inputs.context_query, inputs.key)
    own = torch.einsum("nkhd,nlhd->nkhl", inputs.context_query, inputs.context_key)
    probs = (torch.cat([shared, own], dim=-1) * scale).softmax(dim=-1)
    context = torch.einsum("nkhm,mhd->nkhd", probs[..., :m], inputs.value)
    context = context + torch.einsum("nkhl,nlhd->nkhd", probs[..., m:], inputs.context_value)
    state = (torch.einsum("nhd,mhd->nhm", inputs.state_query, inputs.key) * scale).softmax(dim=-1)
    return context, torch.einsum("nhm,mhd->nhd", state, inputs.value)


def two_pass(inputs: Inputs) -> Result:
    """No expansion: one fused attention over shared keys, one over own keys, merged by their log-sum-exps."""
    n, k, h, d = inputs.context_query.shape
    key, value = inputs.key.transpose(0, 1).unsqueeze(0), inputs.value.transpose(0, 1).unsqueeze(0)
    rows = inputs.context_query.reshape(1, n * k, h, d).transpose(1, 2)
    shared, shared_lse = _attention_with_lse(rows, key, value)
    own, own_lse = _attention_with_lse(
        inputs.context_query.transpose(1, 2), inputs.context_key.transpose(1, 2), inputs.context_value.transpose(1, 2)
    )
    state, _ = _attention_with_lse(inputs.state_query.transpose(0, 1).unsqueeze(0), key, value)
    # (1, H, N k) -> (N, H, k)
    shared = shared.transpose(1, 2).view(n, k, h, d)
    shared_lse = shared_lse.transpose(1, 2).reshape(n, k, h)
    own, own_lse = own.transpose(1, 2), own_lse.transpose(1, 2)
    weight = torch.sigmoid(own_lse - shared_lse).unsqueeze(-1).to(shared.dtype)
    return torch.lerp(shared, own, weight), state[0].transpose(0, 1)


def _attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> Result:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out, lse


@cache
def _compiled(function: Callable, shape: tuple, dtype: torch.dtype) -> Callable:
    return torch.compile(function, dynamic=False)


def two_pass_compiled(inputs: Inputs) -> Result:
    """`two_pass` under torch.compile."""
    return _compiled(two_pass, (*inputs.context_query.shape, len(inputs.key)), inputs.key.dtype)(inputs)


def flex_compiled(inputs: Inputs) -> Result:
    """Compiled FlexAttention: all own keys follow the shared ones, and a block mask lets each row see its own."""
    from torch.nn.attention.flex_attention import flex_attention

    n, k, h, d = inputs.context_query.shape
    m = len(inputs.key)
    attend = _compiled(flex_attention, (n, k, h, d, m), inputs.key.dtype)
    rows = inputs.context_query.reshape(1, n * k, h, d).transpose(1, 2)

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        return torch.cat([shared, own.reshape(n * k, h, d)]).transpose(0, 1).unsqueeze(0).contiguous()

    context = attend(
        rows.contiguous(),
        joined(inputs.key, inputs.context_key),
        joined(inputs.value, inputs.context_value),
        block_mask=_own_block_mask(n, k, m, rows.device.type),
    )
    state, _ = _attention_with_lse(
        inputs.state_query.transpose(0, 1).unsqueeze(0),
        inputs.key.transpose(0, 1).unsqueeze(0),
        inputs.value.transpose(0, 1).unsqueeze(0),
    )
    return context.transpose(1, 2).view(n, k, h, d), state[0].transpose(0, 1)


@cache
def _own_block_mask(n: int, k: int, m: int, device: str) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    def own_or_shared(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column < m) | ((column - m) // k == row // k)

    return create_block_mask(own_or_shared, None, None, n * k, m + n * k, device=device)


RIVALS: dict[str, Callable[[Inputs], Result]] = {
    "sdpa-expanded": sdpa_expanded,
    "einsum-concatenated": einsum_concatenated,
    "two-pass": two_pass,
    "two-pass-compiled": two_pass_compiled,
    "flex-compiled": flex_compiled,
}
"""The rivals that need no preparation; the suite makes "sdpa-pre-expanded", whose keys it expands first."""
