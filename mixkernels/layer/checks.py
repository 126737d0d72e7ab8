"""Argument checks of the operators of `mixkernels.layer.operators`, made before any work.

Those of candidate attention are in `mixkernels.attention.checks`.
"""

import torch
from torch import Tensor

from mixkernels.dispatch import checks_on_gpu
from mixkernels.errors import DeviceError, DtypeError, ShapeError
from mixkernels.packed_keys import LARGEST_ID
from mixkernels.tensors import DTYPES


def checked_rows(leader: str, rows: dict[str, Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Check types, devices, dtypes and d, and return the tensors of rows, cast under autocast.

    Args:
        leader: the name of the tensor that the others must agree with.
        rows: tensors (..., d) by name.
        weight, bias: of the LayerNorm.

    Raises:
        ShapeError, DtypeError, DeviceError: as the message says.
    """
    everything = {**rows, "weight": weight, "bias": bias}
    for name, tensor in everything.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    device = rows[leader].device
    for name, tensor in everything.items():
        if tensor.device != device:
            raise DeviceError(f"{name} is on {tensor.device} but {leader} is on {device}; move them to one device")
    if torch.is_autocast_enabled(device.type):
        target = torch.get_autocast_dtype(device.type)
        rows = {name: t if t.dtype == torch.float64 else t.to(target) for name, t in rows.items()}
    dtype = rows[leader].dtype
    if dtype not in DTYPES:
        raise DtypeError(f"{leader} has dtype {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in rows.items():
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype} but {leader} has {dtype}; rows share one dtype")
    if rows[leader].dim() == 0 or rows[leader].shape[-1] < 1:
        raise ShapeError(f"{leader} has shape {tuple(rows[leader].shape)}; expected (..., d) with d at least 1")
    width = rows[leader].shape[-1]
    allowed = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype not in allowed:
            raise DtypeError(
                f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dict.fromkeys(allowed)))}"
            )
        if tensor.shape != (width,):
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({width},), because {leader} has "
                f"{tuple(rows[leader].shape)}"
            )
    return rows


def expanded(name: str, tensor: Tensor, other: str, like: Tensor) -> Tensor:
    """Return a view of the tensor in the shape of `like`: a pool shared by all queries has stride 0 over them.

    Raises:
        ShapeError: the tensor does not expand to that shape.
    """
    if tensor.shape == like.shape:
        return tensor
    fits = 1 <= tensor.dim() <= like.dim() and tensor.shape[-1] == like.shape[-1]
    pairs = zip(reversed(tensor.shape), reversed(like.shape), strict=False)
    if not fits or any(size not in (1, target) for size, target in pairs):
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}, the shape of {other}, or a "
            "shape that expands to it"
        )
    return tensor.expand(like.shape)


def checked_additive(additive: Tensor | None, state: Tensor) -> Tensor | None:
    """Return the additive score as a view with one number per candidate of state (..., N, d).

    Raises:
        ShapeError, DtypeError, DeviceError: as the message says.
    """
    if additive is None:
        return None
    if not isinstance(additive, Tensor) or not additive.is_floating_point():
        found = additive.dtype if isinstance(additive, Tensor) else type(additive).__name__
        raise DtypeError(f"additive is {found}; expected a floating torch.Tensor")
    if additive.device != state.device:
        raise DeviceError(f"additive is on {additive.device} but state is on {state.device}; move them to one device")
    expected = state.shape[:-1]
    pairs = zip(reversed(additive.shape), reversed(expected), strict=False)
    if additive.dim() > len(expected) or any(size not in (1, target) for size, target in pairs):
        raise ShapeError(
            f"additive has shape {tuple(additive.shape)}; expected {tuple(expected)}, one score per candidate, or a "
            "shape that expands to it"
        )
    return additive.expand(expected)


def check_ranking(top_k: int | None, running: tuple[Tensor, Tensor] | None, first_id: int, state: Tensor) -> None:
    """Check top_k, the range of this call's ids, and the running scores and ids.

    Raises:
        ShapeError, DtypeError, DeviceError: as the message says.
    """
    if top_k is None:
        if running is not None:
            raise ShapeError("running was given without top_k; expected top_k, the number of candidates to keep")
        return
    if not isinstance(top_k, int | torch.SymInt) or isinstance(top_k, bool) or top_k < 1:
        raise ShapeError(f"top_k is {top_k!r}; expected a positive integer or None")
    last_id = first_id + state.shape[-2] - 1
    if first_id < 0 or last_id > LARGEST_ID:
        raise ShapeError(f"ids reach from {first_id} to {last_id}; expected values in 0..{LARGEST_ID}")
    if running is None:
        return
    wide = torch.promote_types(state.dtype, torch.float32)
    for name, tensor, dtype in zip(("scores", "ids"), running, (wide, torch.int64), strict=True):
        if tensor.device != state.device:
            raise DeviceError(
                f"running {name} are on {tensor.device} but state is on {state.device}; move them to one device"
            )
        if tensor.dtype != dtype:
            raise DtypeError(f"running {name} have dtype {tensor.dtype}; expected {dtype}")
        if tensor.shape[:-1] != state.shape[:-2] or tensor.shape != running[0].shape:
            raise ShapeError(
                f"running {name} have shape {tuple(tensor.shape)}; expected {(*state.shape[:-2], 'n')}, scores and ids "
                f"alike, because state has {tuple(state.shape)}"
            )
    # on a GPU a range check would wait for the device
    readable = state.device.type == "cpu" or checks_on_gpu()
    if readable and not torch.compiler.is_compiling() and running[1].numel():
        low, high = (int(bound) for bound in running[1].aminmax())
        if low < 0 or high > LARGEST_ID:
            raise ShapeError(f"running ids reach from {low} to {high}; expected values in 0..{LARGEST_ID}")
