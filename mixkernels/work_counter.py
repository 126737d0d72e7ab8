"""Count bytes and FLOPs of the ATen operators in a call; `mixkernels.profile` shows them next to their times."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from mixkernels.namespace import NAMESPACE


class Work(NamedTuple):
    """Bytes and FLOPs of all runs of one ATen operator in a call; FLOPs are None where PyTorch has no formula."""

    bytes: int
    flops: int | None


class WorkCounter(TorchDispatchMode):
    """Counts the bytes that each ATen operator reads and writes, and its FLOPs, from its arguments.

    For calls on the CPU. For operators of mixkernels, the ATen operators inside are counted. A broadcast dimension is
    counted once; views and allocations are free.
    """

    _OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operator and count its work."""
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            # run the operator's implementation with this mode active, to count what is inside
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name
        done = self.work.get(name, Work(0, None))
        flops = done.flops
        if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            # the only attention of PyTorch without a FLOP formula (2.13)
            flops = (flops or 0) + sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif func.overloadpacket in flop_registry:
            flops = (flops or 0) + flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        self.work[name] = Work(done.bytes + self._bytes(func, name, [*args, *kwargs.values()], out), flops)
        return out

    def _bytes(self, func: Any, name: str, given: Iterable[Any], out: object) -> int:
        read = _tensors(given)
        written = _tensors([out])
        held = {tensor.untyped_storage().data_ptr() for tensor in read}
        if "empty" in name:
            return 0
        if not func._schema.is_mutable:
            fresh = [tensor for tensor in written if tensor.untyped_storage().data_ptr() not in held]
            if not fresh:
                return 0
            return sum(map(_memory, fresh)) + (0 if name.endswith("_like") else sum(map(_memory, read)))
        reads = sum(map(_memory, read))
        return reads if name in self._OVERWRITES else reads + sum(map(_memory, written))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _memory(tensor: Tensor) -> int:
    """Bytes of memory that a tensor occupies; expanded dimensions count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(sizes).numel() * tensor.element_size() if tensor.numel() else 0
