"""Arguments that users pass, checked: texts, integers, paths, devices and dtypes."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixencoder.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def positive_integer(value: Any, name: str) -> int:
    """Return a positive integer of any type that is one: int, numpy's integers, a tensor of one integer.

    Raises:
        InputError: value is a bool, is not an integer, or is below 1.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{name} is {value!r}; expected a positive integer")
    return number


def positive_integer_or_none(value: Any, name: str) -> int | None:
    """Return None as it is, anything else as `positive_integer` does.

    Raises:
        InputError: value is neither None nor a positive integer.
    """
    if value is None:
        return None
    try:
        return positive_integer(value, name)
    except InputError:
        raise InputError(f"{name} is {value!r}; expected a positive integer or None") from None


def check_batch_size(batch_size: int) -> None:
    """Check that a batch size is a positive integer.

    Raises:
        InputError: batch_size is not a positive integer.
    """
    positive_integer(batch_size, "batch_size")


def local_path(path: str | Path) -> Path:
    """Return a path that a user named, with a leading ``~`` as the home folder, as a shell would read it."""
    return Path(path).expanduser()


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
