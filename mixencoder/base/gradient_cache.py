"""Gradient caching: encode a large batch in small parts, and compute their activations again in the backward pass.

A loss over a batch needs the encodings of all its texts together, but not the activations behind them. Each part is a
checkpoint (`torch.utils.checkpoint`): memory is that of all encodings and the activations of one part, gradients are
those of the whole batch (Gao et al. 2021, arXiv 2101.06983), for about a third more computation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., Any], tensors: Sequence[Tensor], size: int | None) -> Any:
    """Cut tensors along their first dimension into parts of `size` rows, call function on each, and join the results.

    Args:
        function: takes the tensors; returns a tensor, or a named tuple or dataclass of tensors, with the same number of
            rows.
        tensors: all with the same first dimension.
        size: rows of a part; None calls function once, on everything.
    """
    if size is None or len(tensors[0]) <= size or not torch.is_grad_enabled():
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return _join([checkpoint(function, *part, use_reentrant=False) for part in parts])


def _join(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(parts))
    if first is None:
        return None
    if isinstance(first, tuple):
        joined = [_join(column) for column in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    names = [field.name for field in dataclasses.fields(first)]
    return dataclasses.replace(first, **{name: _join([getattr(part, name) for part in parts]) for name in names})
