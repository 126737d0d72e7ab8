"""The FFN of an interaction layer, which is five sixths of its products: in floating point, and of int8 products."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from mixencoder.errors import InputError
from mixencoder.ranking.linear import HALF, Linear, QuantisedLinear, cut, elementwise
from mixencoder.ranking.workspace import Workspace


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
        return self.output.into(workspace, workspace.take("update", *rows.shape), self._hidden(workspace, rows))

    def _hidden(self, workspace: Workspace, rows: Tensor) -> Tensor:
        hidden = workspace.take("hidden", len(rows), self.intermediate.weight.shape[1])
        return elementwise(self.activate, self.intermediate.into(workspace, hidden, rows))


def _in_place(activation: nn.Module) -> Callable[[Tensor], object]:
    """Return an activation as a function that works in place."""
    if isinstance(activation, GELUActivation):
        return torch.ops.aten.gelu_
    return lambda rows: rows.copy_(activation(rows))


class QuantisedFeedForward:
    """The FFN of int8 products (`mixencoder.ranking.linear`).

    Raises:
        InputError: this machine, dtype or activation has no int8 products.
    """

    def __init__(self, intermediate: Linear, output: Linear, activation: nn.Module) -> None:
        self._first, self._second = QuantisedLinear(intermediate), QuantisedLinear(output)
        name = type(activation).__name__
        if name not in _LEAST:
            raise InputError(f'products "int8" do not know the activation {name}; expected one of {", ".join(_LEAST)}')
        self._activate, self._least = _in_place(activation), _LEAST[name]
        # activations are shifted to start at zero; their products with the shift are known
        self._bias = output.bias + self._least * self._second.sums

    def add_into(self, workspace: Workspace, rows: Tensor) -> None:
        """As `FloatFeedForward.add_into`."""
        rows.add_(self.of(workspace, rows))

    def of(self, workspace: Workspace, rows: Tensor) -> Tensor:
        """As `FloatFeedForward.of`."""
        hidden = elementwise(self._activate, self._first.product(workspace, rows).add_(self._first.bias))
        step = hidden.amax(dim=-1, keepdim=True).sub_(self._least).div_(2 * HALF + 1)
        inverse = step.reciprocal()
        hidden.mul_(inverse).add_(inverse.mul_(-self._least).add_(0.5))
        numbers = cut(workspace, hidden)
        return self._second.of_numbers(numbers, step, zero=0).add_(self._bias)


_LEAST = {"GELUActivation": -0.17, "NewGELUActivation": -0.171, "ReLU": -1e-6, "SiLUActivation": -0.279}
"""Activations that have a lower bound, and a number that they stay above."""
