"""Checks of arguments that users pass: texts, integers, paths, devices and dtypes."""

import math
import operator
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixkernels.devices import multiplies_faster

DTYPES = ("float32", "bfloat16", "float16", "float64")
_DTYPE_NAMES = {
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "double": "float64",
    "fp64": "float64",
}


def positive_integer(value: Any, name: str) -> int:
    """Return value as an int; it may be an int, a numpy integer, or a tensor of one integer.

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
    """Return None for None, and other values as `positive_integer` does.

    Raises:
        InputError: value is neither None nor a positive integer.
    """
    if value is None:
        return None
    try:
        return positive_integer(value, name)
    except InputError:
        raise InputError(f"{name} is {value!r}; expected a positive integer or None") from None


def local_path(path: str | Path) -> Path:
    """Return a path that a user gave; a leading ``~`` or ``~user`` becomes the home folder, as in a shell.

    Raises:
        InputError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"no home folder is known for {path}: {error}") from error


def as_list(texts: Iterable[Any], role: str) -> list[Any]:
    """Return one text, or several from an ordered iterable such as a generator, array or column, as a list.

    Raises:
        InputError: as in `check_ordered`; the elements are not checked.
    """
    if isinstance(texts, str):
        return [texts]
    return list(check_ordered(texts, role))


def check_ordered(values: Iterable[Any], name: str) -> Iterable[Any]:
    """Check that values is an ordered, one-dimensional iterable, and return it unread.

    Raises:
        InputError: values is a number, string, bytes, tensor, mapping or set, or has several dimensions (a table).
    """
    kind, expected = type(values).__name__, "expected a string or a list of strings"
    if isinstance(values, Mapping):
        raise InputError(f"{name} is a {kind}; {expected}: its keys or its values()")
    if isinstance(values, set | frozenset):
        raise InputError(f"{name} is a {kind}; {expected}: a set has no order, so there are no positions to rank")
    dimensions = getattr(values, "ndim", 1)
    if dimensions != 1 and hasattr(values, "shape"):
        raise InputError(f"{name} is a {kind} of {dimensions} dimensions; {expected}, such as one column")
    if isinstance(values, bytes | bytearray | memoryview | Tensor | str) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a {kind}; {expected}")
    return values


def check_documents(documents: Iterable[Any]) -> Iterable[Any]:
    """Check that documents is an ordered iterable of several documents, and return it unread.

    Raises:
        InputError: documents is a single string or a path, or fails `check_ordered`.
    """
    if not isinstance(documents, str | PathLike):
        return check_ordered(documents, "documents")
    kind = "string" if isinstance(documents, str) else type(documents).__name__
    if _is_index(documents):
        raise InputError(
            f"documents is a {kind} that names the folder of an index; open it first: model.open_index({documents!r})"
        )
    shown = repr(documents if len(str(documents)) <= 40 else str(documents)[:40] + "...")
    raise InputError(f"documents is a {kind}, {shown}; expected a list of strings, [text] for a single one")


def _is_index(path: str | PathLike[str]) -> bool:
    try:
        return (local_path(Path(path)) / "index.json").is_file()
    except (OSError, ValueError, RuntimeError):
        # a text that is too long for a path, or holds a NUL
        return False


def not_a_text_message(value: Any, name: str) -> str:
    """Return an error message for a value that should be a text."""
    kind = type(value).__name__
    missing = value is None or kind in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))
    if missing:
        return f"{name} is a {kind} ({value!r}: a missing value); expected a string: leave it out, or fill it in"
    return f"{name} is a {kind}; expected a string"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None and "auto" give a GPU if there is one, else the CPU.

    Raises:
        InputError: the device cannot be used here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}; expected for example cpu") from error
    return device


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return a dtype, given as object, name or common short form.

    None gives float32, as its results are the most exact and the same on all processors but for rounding. "auto" gives
    the fastest dtype of the device that ranks alike: bfloat16 where the device multiplies it faster, else float32.

    Raises:
        InputError: dtype is not one of `DTYPES`.
    """
    if dtype == "auto":
        return torch.bfloat16 if multiplies_faster(torch.bfloat16, device.type) else torch.float32
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r} cannot be used; expected one of {', '.join(DTYPES)}, or auto")
    return getattr(torch, name)


def placement(
    *where: str | torch.device | torch.dtype,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    current: torch.device,
) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype among the arguments of `ModelHolder.to`, None for one that is not given.

    Args:
        where, device, dtype: as in `ModelHolder.to`.
        current: the device that the model is on.

    Raises:
        InputError: a device or dtype does not exist or is given twice, or there is no argument.
    """
    names = (*DTYPES, *_DTYPE_NAMES)
    devices: list[str | torch.device] = [] if device is None else [device]
    dtypes: list[str | torch.dtype] = [] if dtype is None else [dtype]
    for value in where:
        if isinstance(value, torch.dtype) or (isinstance(value, str) and value in names):
            dtypes.append(value)
        else:
            devices.append(value)
    if len(dtypes) > 1 or len(devices) > 1 or not (dtypes or devices):
        found = ", ".join(map(repr, (*devices, *dtypes))) or "nothing"
        raise InputError(f"to() was given {found}; expected a device, a dtype, or one of each")
    to_device = resolve_device(devices[0]) if devices else None
    return to_device, resolve_dtype(dtypes[0], to_device or current) if dtypes else None


def read_pairs(pairs: Iterable[Any]) -> tuple[list[tuple[Any, Any]], bool]:
    """Return (query, document) pairs as a list, and whether pairs was a single pair.

    Raises:
        InputError: an element is not a pair; the types of its two parts are not checked.
    """
    # iterating over a table gives the names of its columns, and two names would look like a pair
    is_table = getattr(pairs, "ndim", 1) != 1 and not isinstance(pairs, np.ndarray)
    if is_table or not _is_sequence(pairs):
        raise InputError(f"pairs is a {type(pairs).__name__}; expected (query, document) pairs, or one of them")
    listed = list(pairs)
    single = len(listed) == 2 and all(isinstance(text, str) for text in listed)
    listed = [tuple(listed)] if single else [tuple(pair) if _is_sequence(pair) else pair for pair in listed]
    for number, pair in enumerate(listed):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"pair {number} is {pair!r}; expected (query, document)")
    return listed, single


def _is_sequence(values: Any) -> bool:
    """Whether values is an ordered iterable, and not a string or bytes."""
    unordered = str | bytes | bytearray | memoryview | Mapping | set | frozenset
    return isinstance(values, Iterable) and not isinstance(values, unordered) and getattr(values, "ndim", 1) > 0
