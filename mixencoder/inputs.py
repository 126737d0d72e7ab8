"""Arguments that users pass, checked: texts, batch sizes, devices and dtypes."""

from collections.abc import Sequence

import torch

from mixencoder.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size that is no positive integer.

    Raises:
        InputError: it is none.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a positive integer")


def as_list(texts: str | Sequence[str], role: str) -> list[str]:
    """Return one text or several as a list.

    Raises:
        InputError: it is neither.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise InputError(f"{role} is a {type(texts).__name__}; expected a string or a list of strings")
    return list(texts)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None takes a GPU if there is one, else the CPU.

    Raises:
        InputError: it cannot be used here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}; expected for example cpu") from error
    return device


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype by object or name, of `DTYPES`; None is float32.

    Raises:
        InputError: it is none of them.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r} cannot be used; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)
