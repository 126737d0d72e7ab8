"""Linear layers of int8 products (oneDNN's), for a CPU and float32: faster than float products, and a little off.

Activations are quantised by row, so that a row depends on itself alone, weights by output. Activations have 7 bits:
processors without VNNI add pairs of products in 16 bits, which must not overflow. `mixencoder.ranking.interaction` and
`mixencoder.ranking.feed_forward` are the callers.
"""

import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.ranking.workspace import Linear, Workspace

HALF = 63
"""Activations are numbers from 0 to 2 * 63 + 1, weights from -127 to 127; 2 * 127 * 127 fits into 16 bits."""
_TINY = 1e-30


class QuantisedLinear:
    """A linear layer as int8 products read it; the same methods as `mixencoder.ranking.workspace.Linear`.

    Raises:
        InputError: this machine or dtype has no int8 products.
    """

    def __init__(self, linear: Linear) -> None:
        weight = linear.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            raise InputError(
                f'products "int8" cannot run in {weight.dtype} on {weight.device}; expected float32 on a CPU with '
                'oneDNN; products "native" run everywhere'
            )
        self.bias = linear.bias
        self._scales = weight.abs().amax(dim=0).clamp_min_(_TINY) / 127
        numbers = (weight / self._scales).round_().clamp_(-127, 127)
        self.sums = (numbers * self._scales).sum(dim=0)
        """Sum of every output's weights, as they are after rounding."""
        self._zeros = torch.zeros(weight.shape[1], dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers.t().contiguous().to(torch.int8), None)
        self._one = torch.tensor(1.0, dtype=torch.float32)
        self._places = {zero: torch.tensor(zero) for zero in (0, HALF)}

    def into(self, workspace: Workspace, out: Tensor, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """As `Linear.into`."""
        return torch.add(self.product(workspace, rows), self.bias if added is None else added, out=out)

    def product(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """Float32 product (R, out) with rows (R, in), without the bias."""
        scaled = torch.abs(rows, out=workspace.take("scaled", *rows.shape))
        step = scaled.amax(dim=-1, keepdim=True).clamp_min_(_TINY).div_(HALF)
        # rounded half up: adding a half, then cutting
        torch.mul(rows, step.reciprocal(), out=scaled).add_(HALF + 0.5)
        return self.of_numbers(cut(workspace, scaled), step, zero=HALF)

    def of_numbers(self, numbers: Tensor, step: Tensor, *, zero: int) -> Tensor:
        """Float32 product of uint8 numbers (R, in), of which `zero` stands for 0, times each row's step (R, 1)."""
        product = torch.ops.onednn.qlinear_pointwise.tensor(
            numbers, self._one, self._places[zero], self._packed, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product.mul_(step)


def cut(workspace: Workspace, rows: Tensor) -> Tensor:
    """Numbers from 0 to 255 without what follows their point, as uint8.

    By way of int16, which PyTorch converts to and from by vectors: less than half of the time.
    """
    wide, numbers = (workspace.take("numbers", *rows.shape, dtype=dtype) for dtype in (torch.int16, torch.uint8))
    return numbers.copy_(wide.copy_(rows))
