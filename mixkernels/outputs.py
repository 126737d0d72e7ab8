"""Check the tensors that a caller gives for an operator's results (`out`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixkernels.errors import BackendError, DeviceError, DtypeError, ShapeError
from mixkernels.tensors import needs_grad


def check_out(name: str, out: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Check that a result of this shape can be written into `out`, whatever its strides.

    Raises:
        ShapeError, DtypeError, DeviceError: as the message says.
    """
    if not isinstance(out, Tensor):
        raise DtypeError(f"{name} is a {type(out).__name__}; expected a torch.Tensor")
    if out.device != device:
        raise DeviceError(f"{name} is on {out.device} but the inputs are on {device}; move them to one device")
    if out.dtype != dtype:
        raise DtypeError(f"{name} has dtype {out.dtype}; expected {dtype}, the dtype of the result")
    if out.shape != tuple(shape):
        raise ShapeError(f"{name} has shape {tuple(out.shape)}; expected {tuple(shape)}, the shape of the result")
    reach = 0
    for size, stride in sorted(zip(out.shape, out.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride <= reach:
                raise ShapeError(
                    f"{name} has strides {out.stride()} for shape {tuple(out.shape)}: elements may share memory; "
                    "expected memory for every element"
                )
            reach += (size - 1) * stride


def check_no_gradients(out: Any, *tensors: Tensor | None) -> None:
    """Check that nothing is recorded where results are written into `out`.

    Raises:
        BackendError: a tensor requires a gradient.
    """
    if out is not None and needs_grad(*tensors):
        raise BackendError(
            "out is for inference, but a tensor requires a gradient; call under torch.no_grad(), or leave out out"
        )


def reach_of(tensor: Tensor | None) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor is None or tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def check_apart(out: Sequence[Tensor | None], inputs: Sequence[Tensor | None], names: Sequence[str] = ()) -> None:
    """Check that results are not written into memory from the first to the last element of an input.

    Args:
        out: where results are written; of a context and a state, the rows of one may lie between those of the other.
        inputs: of the call.
        names: of the inputs, for the message.

    Raises:
        ShapeError: memory is shared.
    """
    outputs = [
        (tensor, tensor.data_ptr(), tensor.data_ptr() + reach_of(tensor)) for tensor in out if tensor is not None
    ]
    for number, tensor in enumerate(inputs):
        if tensor is None:
            continue
        start = tensor.data_ptr()
        for _, first, end in outputs:
            if start < end and first < start + reach_of(tensor):
                name = names[number] if names else "an input"
                raise ShapeError(f"out and {name} share memory; expected memory of its own for out")
    if len(outputs) == 2:
        (one, first, end), (other, start, stop) = outputs
        if start < end and first < stop and not _interleaved(one, other):
            raise ShapeError("the tensors of out share memory; expected different memory, or rows that alternate")


def _interleaved(context: Tensor, state: Tensor) -> bool:
    """Whether the rows of states (..., H, D) lie between those of contexts (..., k, H, D)."""
    size, candidates = state.element_size(), state.dim() - 3
    if state.dim() != context.dim() - 1 or candidates < 0:
        return False
    distance = state.stride(candidates)
    if distance != context.stride(candidates) or distance == 0:
        return False
    # where a candidate's state begins, after its contexts
    start = (state.data_ptr() - context.data_ptr()) % (distance * size)
    inner = [reach_of(tensor[(0,) * (candidates + 1)]) for tensor in (context, state)]
    return inner[0] <= start and start + inner[1] <= distance * size
