"""Encoding a large batch in small pieces whose activations are computed again on the way back (gradient caching).

A batch's losses need the encodings of all its texts together, but not the activations behind them. Each piece is a
checkpoint (`torch.utils.checkpoint`): memory is that of the encodings and of one piece, gradients are those of the
whole (Gao et al. 2021, arXiv 2101.06983), for about a third more computation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., Any], tensors: Sequence[Tensor], size: int | None) -> Any:
    """Call function on tensors cut along their first dimension into runs of `size` rows, and join the results.

    Args:
        function: takes the tensors; returns a tensor, or a named tuple or dataclass of tensors, with a row for each of
            theirs.
        tensors: of the same first dimension.
        size: None calls it once on everything.
    """
    if size is None or len(tensors[0]) <= size or not torch.is_grad_enabled():
        return function(*tensors)
    pieces = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return _join([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


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
