"""Small tensor helpers that the public operators and the backends share."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that operators take; products in float16 and bfloat16 are summed in float32."""


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def dense_rows(tensor: Tensor) -> Tensor:
    """Return the tensor with a dense last dimension, as every backend requires; other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
