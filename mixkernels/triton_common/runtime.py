"""Where the kernels run, on a GPU or in Triton's interpreter, and what that means for their outputs."""

import os

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Fixed when the first kernel module is imported, as triton fixes it."""


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Context in which kernels run on the tensor's GPU."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


def empty_output(like: Tensor, *shape: int) -> Tensor:
    """Memory for a kernel's output that is to have the dtype of `like`; the caller casts it once it is written.

    The interpreter truncates to bfloat16 where a GPU rounds, so there PyTorch rounds.
    """
    return like.new_empty(shape, dtype=torch.float32 if INTERPRET else like.dtype)
