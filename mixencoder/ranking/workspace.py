"""Memory that is kept from call to call, and work on it in place: what `mixencoder.ranking.interaction` computes in."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_GRAIN = 32768
"""PyTorch gives no thread fewer elements of an elementwise operation."""
_VECTORS = 64
"""Elements of a multiple of every processor's step in elementwise loops."""


class Workspace:
    """Named tensors that live on between calls; one thread at a time uses one.

    A new tensor is made where the old one is too small. What a tensor holds when taken is what was left in it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor of that name in a shape, contiguous; dtype None is the workspace's."""
        dtype, size = dtype or self._dtype, math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)


class Linear(NamedTuple):
    """A linear layer as a product reads it."""

    weight: Tensor
    """(in, out)."""
    bias: Tensor | None
    """(out,); None where callers say what is added."""

    def into(self, workspace: Workspace, out: Tensor, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Write the product with rows (R, in), plus the bias or what is added in its place (R, out), into out (R, out).

        Rows and out may have any strides between rows; added may be out itself. The workspace is for layers that need
        one (`mixencoder.ranking.linear`).
        """
        return torch.addmm(self.bias if added is None else added, rows, self.weight, out=out)


def elementwise(function: Callable[[Tensor], object], rows: Tensor) -> Tensor:
    """Apply an in-place elementwise function to contiguous rows, and return them.

    Vector code and the code for what is left over at a thread's end may round differently, so every thread must get
    whole vectors; where PyTorch would split otherwise, the rows go through in slices that it does not split.
    """
    flat, size = rows.view(-1), rows.numel()
    threads = min(torch.get_num_threads(), math.ceil(size / _GRAIN))
    if rows.device.type != "cpu" or size % (threads * _VECTORS) == 0:
        function(flat)
        return rows
    for part in flat.split(_GRAIN - _VECTORS):
        function(part)
    return rows
