"""Where the kernels run, on a GPU or in Triton's interpreter, and what that means for their outputs."""

import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter; fixed at the first import of a kernel module, as in triton itself."""


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Context in which kernels run on the tensor's GPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def empty_output(like: Tensor, *shape: int) -> Tensor:
    """Return memory for a kernel's output; the caller casts the written output to the dtype of `like`.

    The interpreter truncates to bfloat16 where a GPU rounds; there the output is float32 and PyTorch rounds it.
    """
    return like.new_empty(shape, dtype=torch.float32 if INTERPRET else like.dtype)
