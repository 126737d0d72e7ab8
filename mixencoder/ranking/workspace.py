"""Memory for the intermediate results of `mixencoder.ranking.interaction`, kept from call to call."""

import math

import torch
from torch import Tensor


class Workspace:
    """Named tensors that are used again by every call. Only one thread at a time may use it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor of that name with this shape, contiguous; dtype None means the workspace's.

        Its contents are arbitrary. Tensors taken under this name before must no longer be used: it may overwrite them.
        """
        dtype, size = dtype or self._dtype, math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)
