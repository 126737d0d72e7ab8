"""The FFN of an interaction layer, in floating point or int8; five sixths of a layer's work in matrix products.

`mixencoder.ranking.interaction` is the caller.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from mixencoder.errors import InputError
from mixencoder.ranking.linear import HALF, Linear, PackedLinear, QuantisedLinear, elementwise, truncate
from mixencoder.ranking.workspace import Workspace


class FloatFeedForward:
    """``W_2 activation(W_1 x + b_1) + b_2`` in the dtype of the weights."""

    def __init__(
        self, intermediate: Linear | PackedLinear, output: Linear | PackedLinear, activation: nn.Module
    ) -> None:
        self.intermediate, self.output = intermediate, output
        self.activate = _in_place(activation)

    def added(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """Return rows (R, d) plus the FFN's output for them; the rows are not needed afterwards."""
        return self.output.of(workspace, "update", self._hidden(workspace, rows), rows)

    def of(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """Return the FFN's output (R, d) for rows (R, d)."""
        return self.output.of(workspace, "update", self._hidden(workspace, rows))

    def _hidden(self, workspace: Workspace, rows: Tensor) -> Tensor:
        return elementwise(self.activate, self.intermediate.of(workspace, "hidden", rows))


def _in_place(activation: nn.Module) -> Callable[[Tensor], object]:
    """Return an activation as a function that works in place."""
    if isinstance(activation, GELUActivation):
        return torch.ops.aten.gelu_
    return lambda rows: rows.copy_(activation(rows))


class QuantisedFeedForward:
    """The FFN with int8 products (`mixencoder.ranking.linear`).

    Raises:
        InputError: int8 products cannot run on this machine, in this dtype or with this activation.
    """

    def __init__(self, intermediate: Linear, output: Linear, activation: nn.Module) -> None:
        self._first, self._second = QuantisedLinear(intermediate), QuantisedLinear(output)
        name = type(activation).__name__
        if name not in _MINIMUM:
            raise InputError(
                f'products "int8" do not support the activation {name}; expected one of {", ".join(_MINIMUM)}. '
                'Use products "native"'
            )
        self._activate, self._minimum = _in_place(activation), _MINIMUM[name]
        # activations are stored as their distance from the minimum; the bias adds the minimum's product again
        self._bias = output.bias + self._minimum * self._second.sums

    def added(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """As `FloatFeedForward.added`."""
        return rows.add_(self.of(workspace, rows))

    def of(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """As `FloatFeedForward.of`."""
        hidden = elementwise(self._activate, self._first.product(workspace, rows).add_(self._first.bias))
        step = hidden.amax(dim=-1, keepdim=True).sub_(self._minimum).div_(2 * HALF + 1)
        inverse = step.reciprocal()
        # the 0.5 makes `truncate` round half up
        hidden.mul_(inverse).add_(inverse.mul_(-self._minimum).add_(0.5))
        numbers = truncate(workspace, hidden)
        return self._second.of_numbers(numbers, step, zero=0).add_(self._bias)


_MINIMUM = {"GELUActivation": -0.17, "NewGELUActivation": -0.171, "ReLU": -1e-6, "SiLUActivation": -0.279}
"""Activation -> a number below all of its values."""
