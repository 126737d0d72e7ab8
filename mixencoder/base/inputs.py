"""Arguments that users pass, checked: texts, integers, paths, devices and dtypes."""

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

DTYPES = ("float32", "bfloat16", "float16", "float64")
_DTYPE_NAMES = {
    "auto": "float32",
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "double": "float64",
    "fp64": "float64",
}
"""Further names; "auto" is what None gives, on every device."""


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


def local_path(path: str | Path) -> Path:
    """Return a path that a user named, with a leading ``~`` as the home folder, as a shell would read it.

    Raises:
        InputError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"no home folder is known for {path}: {error}") from error


def as_list(texts: Iterable[Any], role: str) -> list[Any]:
    """Return one text or several as a list: whatever gives them in an order, such as a generator, array or column.

    Raises:
        InputError: it is neither; what its elements are is not looked at.
    """
    if isinstance(texts, str):
        return [texts]
    return list(check_series(texts, role))


def check_series(values: Iterable[Any], name: str) -> Iterable[Any]:
    """Return what gives values in an order, one dimension of them; it is not read here.

    Raises:
        InputError: a number, bytes, a mapping or a set, or a table of several columns.
    """
    kind, expected = type(values).__name__, "expected a string or a list of strings"
    if isinstance(values, Mapping):
        raise InputError(f"{name} is a {kind}; {expected}: its keys or its values()")
    if isinstance(values, set | frozenset):
        raise InputError(f"{name} is a {kind}; {expected}: a set has no order that places in a ranking could mean")
    dimensions = getattr(values, "ndim", 1)
    if dimensions != 1 and hasattr(values, "shape"):
        raise InputError(f"{name} is a {kind} of {dimensions} dimensions; {expected}, such as one column")
    if isinstance(values, bytes | bytearray | memoryview | Tensor | str) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a {kind}; {expected}")
    return values


def check_documents(documents: Iterable[Any]) -> Iterable[Any]:
    """Return several documents as they are given; what gives them is not read here.

    Raises:
        InputError: it is one string, a path, or as in `check_series`.
    """
    if not isinstance(documents, str | PathLike):
        return check_series(documents, "documents")
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
        # no text is too long, or too odd, to be no path
        return False


def not_a_text(value: Any, name: str) -> str:
    """Say what is found where a text is expected."""
    kind = type(value).__name__
    missing = value is None or kind in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))
    if missing:
        return f"{name} is a {kind} ({value!r}: a missing value); expected a string: leave it out, or fill it in"
    return f"{name} is a {kind}; expected a string"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device; None and "auto" take a GPU if there is one, else the CPU.

    Raises:
        InputError: it cannot be used here.
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


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype by object or name, of `DTYPES` or a usual short form; None and "auto" are float32.

    Raises:
        InputError: it is none of them.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r} cannot be used; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def placement(
    *where: str | torch.device | torch.dtype,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[torch.device | None, torch.dtype | None]:
    """Return the device and the dtype among some arguments, None where none is named.

    Raises:
        InputError: there is no such device or dtype, or one is named twice.
    """
    names = (*DTYPES, *_DTYPE_NAMES)
    devices: list[str | torch.device] = [] if device is None else [device]
    dtypes: list[str | torch.dtype] = [] if dtype is None else [dtype]
    for place in where:
        if isinstance(place, torch.dtype) or (isinstance(place, str) and place in names and place != "auto"):
            dtypes.append(place)
        else:
            devices.append(place)
    if len(dtypes) > 1 or len(devices) > 1 or not (dtypes or devices):
        found = ", ".join(map(repr, (*devices, *dtypes))) or "nothing"
        raise InputError(f"the model is to go to {found}; expected a device, a dtype, or one of each")
    return resolve_device(devices[0]) if devices else None, resolve_dtype(dtypes[0]) if dtypes else None


def read_pairs(pairs: Iterable[Any]) -> tuple[list[tuple[Any, Any]], bool]:
    """Return (query, document) pairs as a list, and whether they were one pair alone.

    Raises:
        InputError: they are no pairs; whether both are strings is not looked at.
    """
    # a table gives the names of its columns, two of which would pass for a pair
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
    """Whether values come one after the other, and are not the letters of a text."""
    unordered = str | bytes | bytearray | memoryview | Mapping | set | frozenset
    return isinstance(values, Iterable) and not isinstance(values, unordered) and getattr(values, "ndim", 1) > 0
