"""The fields of an index's rows: each has a name, a shape and a dtype. Nothing here knows what they mean."""

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixencoder.errors import InputError

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int8", "uint8")}
_MAX_DIMENSIONS, _MAX_VALUES = 16, 2**40
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Field:
    """One array of an index.

    Attributes:
        name: lower-case letters, digits and underscores; part of the array's file names.
        shape: of one row, at most 2**40 numbers; () is one number per row.
        dtype: one of `DTYPES`.

    Raises:
        InputError: the name, shape or dtype cannot be used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"field name {self.name!r} cannot be used; expected lower-case letters, digits and _")
        if self.dtype not in DTYPES:
            raise InputError(f"field {self.name}: dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", tuple(map(operator.index, self.shape)))
        if any(size < 1 for size in self.shape) or len(self.shape) > _MAX_DIMENSIONS or self.values > _MAX_VALUES:
            raise InputError(
                f"field {self.name}: shape {self.shape}; expected at most {_MAX_DIMENSIONS} positive sizes and 2**40 "
                "numbers"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return DTYPES[self.dtype]

    @property
    def values(self) -> int:
        """Numbers per row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.values * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Schema:
    """The fields of a row, at least one.

    Raises:
        InputError: there are no fields, or two share a name.
    """

    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        names = [field.name for field in self.fields]
        if not names or len(set(names)) < len(names):
            raise InputError(f"fields are {names}; expected at least one, and distinct names")

    @property
    def row_bytes(self) -> int:
        """Bytes per row over all fields."""
        return sum(field.row_bytes for field in self.fields)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the fields as JSON values that `from_json` reads."""
        return [{"name": field.name, "shape": list(field.shape), "dtype": field.dtype} for field in self.fields]

    @classmethod
    def from_json(cls, fields: list[dict[str, Any]]) -> "Schema":
        """Return the schema that `to_json` wrote."""
        return cls(tuple(Field(field["name"], tuple(field["shape"]), field["dtype"]) for field in fields))

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {field.dtype} {list(field.shape)}" for field in self.fields)

    def check(self, fields: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the fields on the CPU, contiguous, and their number of rows.

        Raises:
            InputError: a field is missing or unknown, or has another shape, dtype or number of rows.
        """
        names = [field.name for field in self.fields]
        if sorted(fields) != sorted(names):
            raise InputError(f"fields are {', '.join(sorted(fields))}; expected {', '.join(sorted(names))}")
        rows = len(fields[names[0]])
        for field in self.fields:
            found = fields[field.name]
            if tuple(found.shape) != (rows, *field.shape) or found.dtype != field.torch_dtype:
                raise InputError(
                    f"field {field.name} is {found.dtype} {tuple(found.shape)}; "
                    f"expected {field.torch_dtype} {(rows, *field.shape)}"
                )
        return {name: fields[name].detach().cpu().contiguous() for name in names}, rows


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
