"""Linear layers and norms for inference, the former on a CPU with weights arranged for products of few rows.

A library that multiplies by a weight (out, in) as PyTorch stores it rearranges the weight in every call. With few rows,
as a query has, this takes up to half of the time. So weights are rearranged once, here: copies of the model's.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mixkernels.devices import multiplies_natively


class TransposedLinear:
    """A linear layer with the weight stored as (in, out), for MKL's products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.t().contiguous(), bias

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the output (R, out) for rows (R, in), plus added (R, out) if given."""
        out = torch.mm(rows, self._weight) if self._bias is None else torch.addmm(self._bias, rows, self._weight)
        return out if added is None else out.add_(added)


class PackedLinear:
    """A linear layer in bfloat16 or float16, with the weight arranged by oneDNN for its products."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """As `TransposedLinear.__call__`; rows may have any strides between rows."""
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, added, self._weight, self._bias, "add")


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `PackedLinear` works for this dtype on this device; float32 would gain nothing."""
    return (
        device.type == "cpu"
        and dtype in (torch.bfloat16, torch.float16)
        and multiplies_natively(dtype, device)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def arranged_linear(weight: Tensor, bias: Tensor | None) -> TransposedLinear | PackedLinear:
    """Return a linear layer for a weight (out, in) and bias (out,) on a CPU, in the fastest arrangement."""
    return (PackedLinear if can_pack(weight.dtype, weight.device) else TransposedLinear)(weight, bias)


class Norm(NamedTuple):
    """A LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the normalised rows (..., d)."""
        return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)
