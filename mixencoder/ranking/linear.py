"""Linear layers as the interaction computes them: in floating point, and of int8 products.

int8 products (oneDNN's) are for a CPU and float32: faster, and a little off. Activations are quantised by row, so that
a row depends on itself alone, weights by output. Activations have 7 bits: processors without VNNI add pairs of products
in 16 bits, which must not overflow. `mixencoder.ranking.interaction` and `mixencoder.ranking.feed_forward` are the
callers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.ranking.workspace import Workspace

_GRAIN = 32768
"""PyTorch gives no thread fewer elements of an elementwise operation."""
_VECTORS = 64
"""Elements of a multiple of every processor's step in elementwise loops."""


HALF = 63
"""Activations are numbers from 0 to 2 * 63 + 1, weights from -127 to 127; 2 * 127 * 127 fits into 16 bits."""
_TINY = 1e-30


class Linear(NamedTuple):
    """A linear layer as a product reads it."""

    weight: Tensor
    """(in, out)."""
    bias: Tensor | None
    """(out,); None where callers say what is added."""

    def into(self, workspace: Workspace, out: Tensor, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Write the product with rows (R, in), plus the bias or what is added in its place (R, out), into out (R, out).

        Rows and out may have any strides between rows; added may be out itself. The workspace is for layers that need
        one (`QuantisedLinear`).
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


class QuantisedLinear:
    """A linear layer as int8 products read it; the same methods as `Linear`.

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
