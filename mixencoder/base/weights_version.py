"""Notice that a model's weights have changed, so that nothing computed from the old ones is used again.

PyTorch counts changes in place, but not those made through ``.data`` or through a numpy array that shares memory. So a
sample of every weight is compared too. Every ranking of an index does this, so it must be cheap.
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from mixencoder.base.inference_context import once_a_call

WHOLE = 2048
"""Weights of at most this many numbers, such as biases and norms, are compared whole."""
SAMPLED = 64
"""Evenly spread numbers that are compared of a larger weight."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by size: bits are compared, not values, so an unchanged NaN is equal and -0.0 differs from 0.0."""

_Views = list[np.ndarray] | list[Tensor]

T = TypeVar("T")


class KeptForWeights(Generic[T]):
    """A value computed from a model's weights, kept while they stay the same.

    Safe to use from several threads; those that find nothing at the same time may each compute the value. A copy, by
    `copy` or `pickle`, starts empty, as versions are valid in one process only.
    """

    def __init__(self) -> None:
        self._kept: tuple[int, T] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def get(self, version: int, compute: Callable[[], T]) -> T:
        """Return the value for a version of the weights (`weights_version`); compute it if none is kept for it."""
        kept = self._kept
        return kept[1] if kept is not None and kept[0] == version else self.put(version, compute())

    def put(self, version: int, value: T) -> T:
        """Keep a value for a version of the weights in place of the last one; returns it."""
        self._kept = version, value
        return value


class _WeightsState(NamedTuple):
    """A model's weights when they were last compared."""

    tensor_states: list[tuple[int, torch.dtype, int]]
    """Address, dtype and PyTorch's count of changes of every weight."""
    samples: list[_Views]
    """Views of the weights, grouped by device and size of a number. They keep the memory alive, so that its addresses
    are not used again."""
    bits: list[bytes]
    """What the samples held, one string a group."""
    version: int


_last_states: "WeakKeyDictionary[nn.Module, _WeightsState]" = WeakKeyDictionary()
_lock = threading.Lock()
_numbers = itertools.count(1)


def weights_version(model: nn.Module) -> int:
    """Return a number that changes when the model's parameters or buffers change.

    Noticed: another tensor as parameter or buffer, and every change that PyTorch counts: in place, by
    `load_state_dict`, by a move or a cast. PyTorch does not count changes through ``.data`` or a numpy array that
    shares memory. Of these, every change of a weight of at most `WHOLE` numbers is noticed; of a larger weight, a
    change of one of the `SAMPLED` numbers that are compared.

    Not noticed: a change of a few numbers, such as one row, of a large weight through ``.data`` or numpy. Make it under
    ``torch.no_grad()`` without ``.data``; then PyTorch counts it.

    Takes some 0.2 ms for a model of MiniLM's size; a pass over all of its weights takes 10 ms.
    """
    tensors = _tensors(model)
    tensor_states = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    with _lock:
        last = _last_states.get(model)
        samples = last.samples if last is not None and last.tensor_states == tensor_states else _samples(tensors)
        bits = [_bits(views) for views in samples]
        if last is not None and samples is last.samples and bits == last.bits:
            return last.version
        version = next(_numbers)
        _last_states[model] = _WeightsState(tensor_states, samples, bits, version)
        return version


def version_in_call(model: nn.Module) -> int:
    """Return `weights_version`; in a call of the model's engine it is found once, at its first use.

    For calls that are short: in a longer one the weights may change meanwhile.
    """
    return once_a_call(model, "weights version", lambda: weights_version(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, in a fraction of the time of PyTorch's own methods, which also name them."""
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = [model]
    for module in modules:
        if module is not None:
            found += module._parameters.values()
            found += module._buffers.values()
            modules += module._modules.values()
    return [tensor for tensor in found if tensor is not None]


@torch.no_grad()
def _samples(tensors: list[Tensor]) -> list[_Views]:
    """Return the parts of the weights that are compared, as integers, in groups that can be joined."""
    groups: dict[tuple[torch.device, int], list[Any]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        # the memory that the tensor spans, whatever its strides: reshaping could copy
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size()
        flat = tensor.detach().as_strided((span,), (1,)).view(_INTEGERS[size])
        parts = [flat] if span <= WHOLE else [flat[:: -(-span // SAMPLED)], flat[-1:]]
        # numpy joins many small arrays in a fifth of PyTorch's time
        groups[tensor.device, size] += [part.numpy() for part in parts] if tensor.device.type == "cpu" else parts
    return list(groups.values())


def _bits(views: _Views) -> bytes:
    if isinstance(views[0], Tensor):
        return torch.cat(cast("list[Tensor]", views)).cpu().numpy().tobytes()
    return np.concatenate(views).tobytes()
