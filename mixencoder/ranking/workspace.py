"""Memory that is kept from call to call: what `mixencoder.ranking.interaction` computes in."""

import math

import torch
from torch import Tensor


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
