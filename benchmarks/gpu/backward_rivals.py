"""Rivals of a training step that use the fused backward passes of PyTorch: flash attention's, cuDNN's, FlexAttention's.

A fused backward pass takes an output and log-sum-exps and computes P = exp(S - lse) again. Given the merged output and
the log-sum-exps over shared and own keys, it returns the shared part of all gradients; own keys are left, k x k numbers
a candidate, by elementwise products that a compiler fuses. Contexts and states go through one call, as do their
gradients.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.formulations import (
    Batch,
    UnavailableError,
    cudnn_attention,
    flex_block_mask,
    flex_layout,
    own_products,
)
from benchmarks.measuring.formulations import Inputs, Result

Forward = Callable[..., Result]


def _flash_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)


def _flash_backward(grad: Tensor, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor, rest: Any) -> tuple:
    if grad.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, *tensors, out, lse, 0.0, False)
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, *tensors, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)


def _cudnn_backward(grad: Tensor, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor, rest: Any) -> tuple:
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(grad, *tensors, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False)


FUSED = {"flash": (_flash_forward, _flash_backward), "cudnn": (_cudnn_forward, _cudnn_backward)}
"""Forward and backward pass by name."""


def _own_logits(query: Tensor, key: Tensor, wide: torch.dtype) -> Tensor:
    # (N, row, own key, H)
    return (query.unsqueeze(2) * key.unsqueeze(1)).sum(-1, dtype=wide) / sqrt(query.shape[-1])


class TwoPass(torch.autograd.Function):
    """Candidate attention of a batch of queries that share a pool, through one fused pass in each direction."""

    @staticmethod
    def forward(ctx: Any, fused: str, *tensors: Tensor) -> Result:
        """Return contexts (B, N, k, H, D) and states (B, N, H, D)."""
        batch = Batch(*tensors)
        (n, k, heads, dim), b = batch.context_query.shape, len(batch.key)
        wide = torch.promote_types(batch.key.dtype, torch.float32)
        rows = torch.cat([batch.context_query, batch.state_query.unsqueeze(1)], dim=1).view(1, -1, heads, dim)
        # (B, H, rows, D)
        query = rows.expand(b, -1, -1, -1).transpose(1, 2)
        key, value = batch.key.transpose(1, 2), batch.value.transpose(1, 2)
        out, lse, *rest = FUSED[fused][0](query, key, value)
        shape = lse.shape
        shared = out.transpose(1, 2).view(b, n, k + 1, heads, dim)
        total = lse.reshape(b, heads, n, k + 1).permute(0, 2, 3, 1).contiguous()
        logits = _own_logits(batch.context_query, batch.context_key, wide)
        contexts = total[:, :, :k]
        merged = torch.logaddexp(contexts, logits.logsumexp(2))
        own = torch.exp(logits - merged.unsqueeze(3)).unsqueeze(-1) * batch.context_value.unsqueeze(1)
        context = (shared[:, :, :k] * torch.exp(contexts - merged).unsqueeze(-1) + own.sum(3)).to(out.dtype)
        every = torch.cat([context, shared[:, :, k:]], dim=2)
        total = torch.cat([merged, total[:, :, k:]], dim=2)
        ctx.save_for_backward(*tensors, query, every, total, logits)
        ctx.fused, ctx.rest, ctx.lse_shape = fused, rest, shape
        return context, every[:, :, k]

    @staticmethod
    # pyrefly: ignore [bad-override]: PyTorch's own signature takes any gradients
    def backward(ctx: Any, grad_context: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all six inputs."""
        *tensors, query, every, total, logits = ctx.saved_tensors
        batch = Batch(*tensors)
        (n, k, heads, dim), b = batch.context_query.shape, len(batch.key)
        grad = torch.cat([grad_context, grad_state.unsqueeze(2)], dim=2)

        def by_head(rows: Tensor) -> Tensor:
            return rows.reshape(b, n * (k + 1), heads, dim).transpose(1, 2)

        lse = total.permute(0, 3, 1, 2).reshape(ctx.lse_shape).contiguous()
        shared = (query, batch.key.transpose(1, 2), batch.value.transpose(1, 2))
        dq, dk, dv = FUSED[ctx.fused][1](by_head(grad), shared, by_head(every), lse, ctx.rest)
        dq = dq.sum(0, dtype=logits.dtype).transpose(0, 1).view(n, k + 1, heads, dim)
        # own keys: (B, N, row, own key, H)
        probs = torch.exp(logits - total[:, :, :k].unsqueeze(3))
        wide = grad_context.to(logits.dtype)
        delta = (wide * every[:, :, :k]).sum(-1)
        dp = (wide.unsqueeze(3) * batch.context_value.unsqueeze(1)).sum(-1)
        ds = (probs * (dp - delta.unsqueeze(3))).sum(0).unsqueeze(-1) / sqrt(dim)
        dcv = (probs.unsqueeze(-1) * wide.unsqueeze(3)).sum((0, 2))
        dcq = dq[:, :k] + (ds * batch.context_key.unsqueeze(1)).sum(2)
        dck = (ds * batch.context_query.unsqueeze(2)).sum(1)
        gradients = (dcq, dck, dcv, dq[:, k], dk.transpose(1, 2), dv.transpose(1, 2))
        return None, *(found.to(given.dtype) for found, given in zip(gradients, tensors, strict=True))


def two_pass_batch(*tensors: Tensor, fused: str) -> Result:
    """Attention of a batch by `TwoPass`."""
    return TwoPass.apply(fused, *tensors)


def flex_batch(attend: Callable[..., Tensor]) -> Forward:
    """FlexAttention over one buffer a query: its own keys are copied in every call, as their gradients are needed."""
    mask_of = cache(flex_block_mask)

    def run(*tensors: Tensor) -> Result:
        batch = Batch(*tensors)
        (n, k, heads, dim), (b, m) = batch.context_query.shape, batch.key.shape[:2]
        layout = flex_layout(n, k, m)

        def joined(shared: Tensor, own: Tensor) -> Tensor:
            padded = F.pad(shared, (0, 0, 0, 0, 0, layout.own_start - m))
            return torch.cat([padded, own.reshape(1, n * k, heads, dim).expand(b, -1, -1, -1)], 1).transpose(1, 2)

        rows = batch.context_query.reshape(1, n * k, heads, dim).expand(b, -1, -1, -1).transpose(1, 2)
        keys, values = joined(batch.key, batch.context_key), joined(batch.value, batch.context_value)
        options = {"BLOCK_M": layout.row_block, "BLOCK_N": layout.key_block} if keys.is_cuda else None
        context = attend(rows, keys, values, block_mask=mask_of(layout, keys.device), kernel_options=options)
        states = batch.state_query.unsqueeze(0).expand(b, -1, -1, -1).transpose(1, 2)
        state = F.scaled_dot_product_attention(states, batch.key.transpose(1, 2), batch.value.transpose(1, 2))
        return context.transpose(1, 2).reshape(b, n, k, heads, dim), state.transpose(1, 2)

    return run


def training_rivals(*, compile_too: bool) -> dict[str, Forward]:
    """Differentiable rivals by name; call it again for every shape."""
    rivals: dict[str, Forward] = {f"two-pass-{name}": partial(two_pass_batch, fused=name) for name in FUSED}
    if compile_too:
        from torch.nn.attention.flex_attention import flex_attention

        for name in FUSED:
            rivals[f"two-pass-{name}-compiled"] = torch.compile(
                partial(two_pass_batch, fused=name), dynamic=False, fullgraph=True
            )
        rivals["flex-compiled"] = flex_batch(torch.compile(flex_attention, dynamic=False, fullgraph=True))
    return rivals


# -- forward, contexts and states in one call --------------------------------------------------------------------------


def flash3_unavailable() -> str | None:
    """Why FlashAttention 3 does not run here."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "FlashAttention 3 (flash_attn_interface) is not installed"
    return None


def flash3_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 3's output and log-sum-exps of (B, H, rows, D)."""
    import flash_attn_interface

    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse, *_ = flash_attn_interface.flash_attn_func(*rows, return_attn_probs=True)
    return out.transpose(1, 2), lse


def one_call_prepare(
    inputs: Inputs,
    attend: Callable[..., tuple[Tensor, Tensor]],
    merge: Callable[..., Tensor],
    missing: str | None = None,
) -> Callable[[], Result]:
    """One fused attention over shared keys for contexts and states, whose queries are joined ahead, untimed.

    Args:
        inputs: of one query.
        attend: the fused attention.
        merge: merges own keys, as `formulations.own_products`.
        missing: why `attend` does not run here.

    Raises:
        UnavailableError: with `missing`.
    """
    if missing:
        raise UnavailableError(missing)
    n, k, heads, dim = inputs.context_query.shape
    rows = torch.cat([inputs.context_query, inputs.state_query.unsqueeze(1)], dim=1).view(1, -1, heads, dim)
    query = rows.transpose(1, 2)

    def run() -> Result:
        key, value = inputs.key.transpose(0, 1).unsqueeze(0), inputs.value.transpose(0, 1).unsqueeze(0)
        out, lse = attend(query, key, value)
        shared = out.transpose(1, 2).view(n, k + 1, heads, dim)
        lse = lse.transpose(1, 2).reshape(n, k + 1, heads)
        return merge(inputs, shared[:, :k], lse[:, :k]), shared[:, k]

    return run


def one_call_rivals() -> dict[str, Callable[[Inputs], Callable[[], Result]]]:
    """Rivals that compute contexts and states in one call and merge in one compiled kernel; again for every shape."""

    def merge_of(*tensors: Tensor) -> Tensor:
        *given, shared, lse = tensors
        return own_products(Inputs(*given), shared, lse)

    merge = torch.compile(merge_of, dynamic=False, fullgraph=True)

    def merged(inputs: Inputs, shared: Tensor, lse: Tensor) -> Tensor:
        return merge(*vars(inputs).values(), shared, lse)

    return {
        "one-call-cudnn": lambda inputs: one_call_prepare(inputs, cudnn_attention, merged),
        "one-call-flash3": lambda inputs: one_call_prepare(inputs, flash3_attention, merged, flash3_unavailable()),
    }
