"""Linear layers of the interaction, in floating point or int8.

In bfloat16 and float16 on a CPU, weights are arranged once as oneDNN's products read them.

int8 products (of oneDNN) need a CPU and float32; they are faster, and less exact. Activations get one scale a row, so
that rows do not influence each other; weights get one scale an output. Activations have 7 bits: processors without VNNI
add pairs of products in 16 bits, which must not overflow.

`mixencoder.ranking.interaction` and `mixencoder.ranking.feed_forward` are the callers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.base import linears
from mixencoder.errors import InputError
from mixencoder.ranking.workspace import Workspace

_GRAIN = 32768
"""PyTorch splits an elementwise operation between threads only above this number of elements."""
_VECTORS = 64
"""A multiple of the elements that any processor's elementwise loop handles in one step."""

HALF = 63
"""Activations are stored as 0 to 2 * 63 + 1, weights as -127 to 127, as 2 * 127 * 127 fits into 16 bits."""
_TINY = 1e-30


class Linear(NamedTuple):
    """A linear layer in floating point."""

    weight: Tensor
    """(in, out)."""
    bias: Tensor | None
    """(out,); None if every caller of `of` passes `added`."""

    def of(self, workspace: Workspace, name: str, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the layer's output (R, out) for rows (R, in), which may have any strides between rows.

        Args:
            workspace: memory for the output.
            name: of that memory; other kinds of layers may return new memory instead.
            rows: the input.
            added: (R, out), to add to the output; not in the memory of that name.
        """
        out = workspace.take(name, len(rows), self.weight.shape[1])
        if added is None:
            return torch.addmm(self.bias, rows, self.weight, out=out)
        torch.addmm(added, rows, self.weight, out=out)
        return out if self.bias is None else out.add_(self.bias)


class PackedLinear(linears.PackedLinear):
    """`mixencoder.base.linears.PackedLinear` with the method of `Linear`."""

    def of(self, workspace: Workspace, name: str, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """As `Linear.of`; returns new memory."""
        return self(rows, added)


def elementwise(function: Callable[[Tensor], object], rows: Tensor) -> Tensor:
    """Apply an in-place elementwise function to contiguous rows, and return them.

    PyTorch runs whole vectors of numbers and the numbers left over by different code, which may round differently. So
    every thread must get whole vectors. Where PyTorch would split rows elsewhere, they go through in slices that are
    too small for it to split.
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
    """A linear layer with int8 products; methods as in `Linear`.

    Raises:
        InputError: int8 products cannot run on this machine or in this dtype.
    """

    def __init__(self, linear: Linear) -> None:
        weight = linear.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            raise InputError(
                f'products "int8" cannot run in {weight.dtype} on {weight.device}; expected float32 on a CPU with '
                'oneDNN. Use products "native", which run everywhere'
            )
        self.bias, self.width = linear.bias, weight.shape[1]
        self._scales = weight.abs().amax(dim=0).clamp_min_(_TINY) / 127
        numbers = (weight / self._scales).round_().clamp_(-127, 127)
        self.sums = (numbers * self._scales).sum(dim=0)
        """(out,), sum of every output's rounded weights."""
        self._zeros = torch.zeros(weight.shape[1], dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers.t().contiguous().to(torch.int8), None)
        self._one = torch.tensor(1.0, dtype=torch.float32)
        self._zero_points = {zero: torch.tensor(zero) for zero in (0, HALF)}

    def of(self, workspace: Workspace, name: str, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """As `Linear.of`; returns new memory."""
        out = self.product(workspace, rows)
        for term in (added, self.bias):
            if term is not None:
                out.add_(term)
        return out

    def product(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """Return the float32 product (R, out) with rows (R, in), without the bias."""
        scaled = torch.abs(rows, out=workspace.take("scaled", *rows.shape))
        step = scaled.amax(dim=-1, keepdim=True).clamp_min_(_TINY).div_(HALF)
        # the 0.5 makes `truncate` round half up
        torch.mul(rows, step.reciprocal(), out=scaled).add_(HALF + 0.5)
        return self.of_numbers(truncate(workspace, scaled), step, zero=HALF)

    def of_numbers(self, numbers: Tensor, step: Tensor, *, zero: int) -> Tensor:
        """Return the float32 product (R, out) with rows ``(numbers - zero) * step``.

        Args:
            numbers: (R, in) uint8.
            step: (R, 1), the scale of each row.
            zero: 0 or `HALF`, the number that stands for 0.
        """
        product = torch.ops.onednn.qlinear_pointwise.tensor(
            numbers, self._one, self._zero_points[zero], self._packed, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product.mul_(step)


def truncate(workspace: Workspace, rows: Tensor) -> Tensor:
    """Convert numbers from 0 to 255 to uint8, dropping their fractions.

    Goes through int16: PyTorch vectorises these two conversions, which takes less than half of the time.
    """
    wide, numbers = (workspace.take("numbers", *rows.shape, dtype=dtype) for dtype in (torch.int16, torch.uint8))
    return numbers.copy_(wide.copy_(rows))
