"""Whether a model's weights are still those that something was computed from, asked on every ranking and so cheap.

PyTorch counts changes in place, but not those made through ``.data`` or through a numpy array that shares memory. So
numbers out of every weight are compared too.
"""

import itertools
import threading
from collections import defaultdict
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

WHOLE = 2048
"""Weights of at most so many numbers, which biases and norms are, are compared as a whole."""
SAMPLED = 64
"""Numbers, evenly spread, that are compared of a larger weight."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bits are compared, not values: NaN is no change, and -0.0 is one."""


_Views = list[np.ndarray] | list[Tensor]


class _Seen(NamedTuple):
    """What a model was like when it was last looked at."""

    places: list[tuple[int, torch.dtype, int]]
    """Of every weight its address, dtype and count of changes."""
    samples: list[_Views]
    """Views of weights, those that can be joined together; they keep addresses from being used again."""
    bits: list[bytes]
    """What the samples held, joined."""
    version: int


_seen: "WeakKeyDictionary[nn.Module, _Seen]" = WeakKeyDictionary()
_lock = threading.Lock()
_numbers = itertools.count(1)


def weights_version(model: nn.Module) -> int:
    """Return a number that changes when a model's parameters or buffers do, however they were changed.

    Noticed are other tensors in their place, and all changes that PyTorch counts: in place, by `load_state_dict`, by a
    move or a cast. Of those that it does not count, through ``.data`` or a numpy array that shares memory, every change
    of a weight of at most `WHOLE` numbers is noticed, and of a larger one a change that touches one of the `SAMPLED`
    numbers compared. What escapes is a change of a few numbers, such as one row, of a large weight through ``.data`` or
    numpy; made under ``torch.no_grad()`` without ``.data`` it is counted.

    Takes some 0.2 ms for a model of MiniLM's size; a pass over all of its weights takes 10 ms.
    """
    tensors = _tensors(model)
    places = [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
    with _lock:
        seen = _seen.get(model)
        samples = seen.samples if seen is not None and seen.places == places else _samples(tensors)
        bits = [_joined(views) for views in samples]
        if seen is not None and samples is seen.samples and bits == seen.bits:
            return seen.version
        version = next(_numbers)
        _seen[model] = _Seen(places, samples, bits, version)
        return version


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers; a walk of our own takes a fraction of the time of PyTorch's, which names them."""
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
    groups: dict[tuple[torch.device, int], list[Any]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        # the memory that the tensor spans, whatever its strides: reshaping could copy
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = tensor.element_size()
        flat = tensor.detach().as_strided((span,), (1,)).view(_INTEGERS[size])
        parts = [flat] if span <= WHOLE else [flat[:: -(-span // SAMPLED)], flat[-1:]]
        # numpy joins many small arrays in a fifth of the time
        groups[tensor.device, size] += [part.numpy() for part in parts] if tensor.device.type == "cpu" else parts
    return list(groups.values())


def _joined(views: _Views) -> bytes:
    if isinstance(views[0], Tensor):
        return torch.cat(cast("list[Tensor]", views)).cpu().numpy().tobytes()
    return np.concatenate(views).tobytes()
