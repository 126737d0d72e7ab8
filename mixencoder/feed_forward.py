"""The FFN of an interaction layer, which is five sixths of its products: in floating point, and of int8 products."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from mixencoder.errors import InputError
from mixencoder.workspace import Linear, Workspace, elementwise


class FloatFeedForward:
    """``W_2 activation(W_1 x + b_1) + b_2`` in the dtype of the weights."""

    def __init__(self, intermediate: Linear, output: Linear, activation: nn.Module) -> None:
        self.intermediate, self.output = intermediate, output
        self.activate = _in_place(activation)

    def add_into(self, workspace: Workspace, rows: Tensor) -> None:
        """Add the FFN's output of rows (R, d) to them."""
        hidden = self._hidden(workspace, rows)
        rows.addmm_(hidden, self.output.weight).add_(self.output.bias)

    def of(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """Return the FFN's output (R, d) of rows (R, d)."""
        return self.output.into(workspace.take("update", *rows.shape), self._hidden(workspace, rows))

    def _hidden(self, workspace: Workspace, rows: Tensor) -> Tensor:
        hidden = workspace.take("hidden", len(rows), self.intermediate.weight.shape[1])
        return elementwise(self.activate, self.intermediate.into(hidden, rows))


def _in_place(activation: nn.Module) -> Callable[[Tensor], object]:
    """Return an activation as a function that works in place."""
    if isinstance(activation, GELUActivation):
        return torch.ops.aten.gelu_
    return lambda rows: rows.copy_(activation(rows))


class QuantisedFeedForward(FloatFeedForward):
    """The FFN of int8 products (oneDNN's), for a CPU and float32: faster, and a little off.

    Activations are quantised by row, so that a row depends on itself alone, weights by output. Activations have 7 bits:
    processors without VNNI add pairs of products in 16 bits, which must not overflow.

    Raises:
        InputError: this machine, dtype or activation has no int8 products.
    """

    def __init__(self, intermediate: Linear, output: Linear, activation: nn.Module) -> None:
        super().__init__(intermediate, output, activation)
        weight = intermediate.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            raise InputError(
                f'products "int8" cannot run in {weight.dtype} on {weight.device}; expected float32 on a CPU with '
                'oneDNN; products "native" run everywhere'
            )
        name = type(activation).__name__
        if name not in _LEAST:
            raise InputError(f'products "int8" do not know the activation {name}; expected one of {", ".join(_LEAST)}')
        self._least = _LEAST[name]
        self._first, self._second = _QuantisedWeight(intermediate.weight), _QuantisedWeight(output.weight)
        # activations are shifted to start at zero; their products with the shift are known
        self._bias = output.bias + self._least * self._second.sums

    def add_into(self, workspace: Workspace, rows: Tensor) -> None:
        """As `FloatFeedForward.add_into`."""
        rows.add_(self.of(workspace, rows))

    def of(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """As `FloatFeedForward.of`."""
        scaled = workspace.take("scaled", *rows.shape)
        step = torch.amax(torch.abs(rows, out=scaled), dim=-1, keepdim=True).clamp_min_(_TINY).div_(_HALF)
        # rounded half up: adding a half, then cutting
        numbers = torch.div(rows, step, out=scaled).add_(_HALF + 0.5).to(torch.uint8)
        hidden = self._first.times(numbers, zero=_HALF).mul_(step).add_(self.intermediate.bias)
        elementwise(self.activate, hidden)
        step = hidden.amax(dim=-1, keepdim=True).sub_(self._least).div_(2 * _HALF + 1)
        numbers = hidden.sub_(self._least).div_(step).add_(0.5).to(torch.uint8)
        return self._second.times(numbers, zero=0).mul_(step).add_(self._bias)


_HALF = 63
"""Activations are numbers from 0 to 127, weights from -127 to 127; 2 * 127 * 127 fits into 16 bits."""
_TINY = 1e-30
_LEAST = {"GELUActivation": -0.17, "NewGELUActivation": -0.171, "ReLU": -1e-6, "SiLUActivation": -0.279}
"""Activations that have a lower bound, and a number that they stay above."""


class _QuantisedWeight:
    """A weight (in, out) as int8 numbers times a scale of each output, packed for products."""

    def __init__(self, weight: Tensor) -> None:
        self._scales = weight.abs().amax(dim=0).clamp_min(_TINY) / 127
        numbers = (weight / self._scales).round().clamp(-127, 127)
        self.sums = (numbers * self._scales).sum(dim=0)
        """Sum of every output's weights, as they are after rounding."""
        self._zeros = torch.zeros(weight.shape[1], dtype=torch.int32)
        self._packed = torch.ops.onednn.qlinear_prepack(numbers.t().contiguous().to(torch.int8), None)
        self._one = torch.tensor(1.0)
        self._places = {zero: torch.tensor(zero) for zero in (0, _HALF)}

    def times(self, numbers: Tensor, *, zero: int) -> Tensor:
        """Float32 product of uint8 numbers (R, in), of which `zero` stands for 0, with the weight."""
        return torch.ops.onednn.qlinear_pointwise.tensor(
            numbers, self._one, self._places[zero], self._packed, self._scales, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
