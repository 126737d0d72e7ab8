"""Where the kernels run, on a GPU or in Triton's interpreter, and what that means for their outputs."""

import itertools
import operator
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

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


_FAST_EMPTY = {
    kind: getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
    for kind in ("cpu", "cuda")
    if hasattr(getattr(torch._C, "_dynamo", None), "guards")
    and hasattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
}
"""What compiled PyTorch code allocates with: half the time of `Tensor.new_empty`. On the current GPU."""


class Memory:
    """Contiguous memory for outputs of one shape, dtype and device."""

    __slots__ = ("_fast", "device", "dtype", "shape", "strides")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Describe the memory; nothing is allocated."""
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.strides = tuple(itertools.accumulate(reversed(self.shape[1:]), operator.mul, initial=1))[::-1]
        self._fast = _FAST_EMPTY.get(device.type)

    def of_shape(self, shape: Sequence[int]) -> "Memory":
        """Return the same with another shape."""
        return Memory(shape, self.dtype, self.device)

    def __call__(self) -> Tensor:
        """Allocate."""
        if self._fast is not None and (self.device.type == "cpu" or torch._C._cuda_getDevice() == self.device.index):
            return self._fast(self.shape, self.strides, self.dtype)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    # of PyTorch's allocator all memory is aligned to 512 bytes; it is given back in the order of the stream
    return torch.empty(size, dtype=torch.int8, device="cuda")


class Workspace:
    """Let kernels launched inside a block have their descriptors in memory of PyTorch's allocator.

    Triton writes descriptors that a kernel makes to 128 bytes of memory each, a program. The caller's own allocator
    (`triton.set_allocator`) is in place again afterwards. A generator as a context manager would take a microsecond
    more.
    """

    def __init__(self, needed: bool) -> None:
        """With needed false, and in the interpreter, do nothing."""
        self._token: Any = None
        self._needed = needed and not INTERPRET

    def __enter__(self) -> None:
        if self._needed:
            self._token = _allocation()._allocator.set(_allocate)

    def __exit__(self, *raised: object) -> None:
        if self._needed:
            _allocation()._allocator.reset(self._token)


@cache
def _allocation() -> Any:
    from triton.runtime import _allocation

    return _allocation
