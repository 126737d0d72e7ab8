"""Gradients of the layer's operators on Triton; reference and torch are differentiable expressions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixkernels.layer.registration import (
    GATE_LAYER_NORM,
    GATE_LAYER_NORM_BACKWARD,
    RESIDUAL_LAYER_NORM,
    RESIDUAL_LAYER_NORM_BACKWARD,
    SCORE_CANDIDATES,
    SCORE_CANDIDATES_BACKWARD,
)


class ResidualLayerNorm(torch.autograd.Function):
    """Triton's backward: one gradient serves x and residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Run the operator and save its inputs."""
        ctx.save_for_backward(x, residual, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return RESIDUAL_LAYER_NORM(x, residual, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        dx, dweight, dbias = RESIDUAL_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, dbias.to(ctx.bias_dtype), None


class GateLayerNorm(torch.autograd.Function):
    """Triton's backward of `gate_layer_norm`."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """Run the operator and save its inputs."""
        ctx.save_for_backward(gate, update, state, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return GATE_LAYER_NORM(gate, update, state, weight, bias, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        has_state = ctx.saved_tensors[2] is not None
        dgate, dupdate, dstate, dweight, dbias = GATE_LAYER_NORM_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dgate, dupdate, dstate if has_state else None, dweight, dbias.to(ctx.bias_dtype), None


class ScoreCandidates(torch.autograd.Function):
    """Triton's backward of `score_candidates` without top_k; the additive score is added outside."""

    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        context_residual: Tensor,
        state: Tensor,
        state_residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        """Run the operator and save its inputs."""
        rows = (context, context_residual, state, state_residual, weight, bias)
        ctx.save_for_backward(*rows)
        ctx.eps = eps
        return SCORE_CANDIDATES(*rows, None, eps, "triton")

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]: once_differentiable makes the context positional
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs."""
        dcontext, dstate, dweight, dbias = SCORE_CANDIDATES_BACKWARD(grad, *ctx.saved_tensors, ctx.eps)
        return dcontext, dcontext, dstate, dstate, dweight, dbias.to(ctx.saved_tensors[5].dtype), None
