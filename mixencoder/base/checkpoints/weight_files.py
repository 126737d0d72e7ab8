"""A checkpoint's weight files: what they hold is read off their headers and compared with what a model asks for.

That comes before any memory is taken for the model, and nothing is loaded by halves. Only safetensors is opened: other
formats can run code.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixencoder.base.checkpoints.config_files import read_json
from mixencoder.errors import CheckpointError

SINGLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"
_FLOATING = {"F16", "BF16", "F32", "F64"}
_OLD_ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""What norms' weights were called once; files of that time are still about."""


class _Stored(NamedTuple):
    """A tensor as a header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The weights in a checkpoint's folder.

    Args:
        folder: holds `SINGLE`, or `SHARDED` and the files that it names.

    Raises:
        CheckpointError: there are none, one is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored = {_modern(stored.name): stored for stored in self._headers()}

    def check_size(self, name: str, size: Any) -> None:
        """Check that a size that config.json names is that of some weight at most, before anything of it is made.

        Raises:
            CheckpointError: it is an integer and larger than every weight in every dimension.
        """
        largest = max((size for stored in self._stored.values() for size in stored.shape), default=0)
        if isinstance(size, int) and size > largest:
            raise CheckpointError(
                f"{self._folder} has {name} {size:,} in its config.json, but no weight in its files has more than "
                f"{largest:,} rows or columns"
            )

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the weights that a model expects by their names, each mapped to its file.

        A prefix that stands before all of the names is taken off. Weights of other parts, such as poolers and heads,
        may be left over.

        Raises:
            CheckpointError: weights are missing, have other shapes or no floating dtype, or weights of the expected
                parts would be left out; the message counts them and names some.
        """
        prefix = self._prefix(expected)
        found = {name: self._stored.get(f"{prefix}{name}") for name in expected}
        wanted = {name: stored for name, stored in found.items() if stored is not None}
        if missing := [name for name in expected if name not in wanted]:
            raise CheckpointError(
                f"{self._folder} lacks {len(missing):,} of the {len(expected):,} weights that its config.json asks for "
                f"({_some(missing)}). Its files hold {self._extent()}, expected {_extent(expected.values())}"
            )
        if wrong := [name for name, stored in wanted.items() if stored.shape != tuple(expected[name])]:
            shapes = [f"{name} {wanted[name].shape} instead of {tuple(expected[name])}" for name in wrong]
            raise CheckpointError(
                f"{self._folder} holds {len(wrong):,} weights of other shapes than its config.json asks for: "
                f"{_some(shapes)}. Its files hold {self._extent()}, expected {_extent(expected.values())}"
            )
        if packed := [f"{name} {stored.dtype}" for name, stored in wanted.items() if stored.dtype not in _FLOATING]:
            raise CheckpointError(
                f"{self._folder} holds {len(packed):,} weights in dtypes that are not {', '.join(sorted(_FLOATING))}: "
                f"{_some(packed)}; expected an encoder that is not quantised"
            )
        if left := self._left_over(prefix, expected):
            raise CheckpointError(
                f"{self._folder} holds {len(left):,} weights that its config.json leaves no place for: {_some(left)}. "
                "With layers left out the model is another one; correct config.json, or save the smaller model"
            )
        return self._tensors(wanted)

    def _prefix(self, expected: Mapping[str, torch.Size]) -> str:
        """Return what stands before the expected names, or before most of them."""
        found: Counter[str] = Counter()
        for name in self._stored:
            parts = name.split(".")
            found.update(
                "".join(f"{part}." for part in parts[:number])
                for number in range(len(parts))
                if ".".join(parts[number:]) in expected
            )
        complete = [prefix for prefix, count in found.items() if count == len(expected)]
        if len(complete) > 1:
            raise CheckpointError(
                f"{self._folder} holds {len(complete)} encoders, whose weights begin with {_some(sorted(complete))}; "
                "expected one"
            )
        return complete[0] if complete else max(found, key=lambda prefix: found[prefix], default="")

    def _left_over(self, prefix: str, expected: Mapping[str, torch.Size]) -> list[str]:
        """Return weights of the expected parts that nothing asks for; integers are buffers of older versions."""
        parts = {name.partition(".")[0] for name in expected}
        return [
            name
            for name, stored in self._stored.items()
            if stored.dtype in _FLOATING
            and name.startswith(prefix)
            and name.removeprefix(prefix) not in expected
            and name.removeprefix(prefix).partition(".")[0] in parts
        ]

    def _tensors(self, wanted: Mapping[str, _Stored]) -> dict[str, Tensor]:
        tensors = {}
        with ExitStack() as stack:
            files = {path: stack.enter_context(_opened(path)) for path in {stored.path for stored in wanted.values()}}
            for name, stored in wanted.items():
                tensors[name] = files[stored.path].get_tensor(stored.name)
        return tensors

    def _headers(self) -> Iterable[_Stored]:
        for path, names in self._paths().items():
            with _opened(path) as file:
                held = set(file.keys())
                for name in held if names is None else names:
                    if name not in held:
                        raise CheckpointError(f"{path} lacks {name}, which {SHARDED} says is there")
                    entry = file.get_slice(name)
                    yield _Stored(path, name, tuple(entry.get_shape()), entry.get_dtype())

    def _paths(self) -> dict[Path, list[str] | None]:
        """Return the files, each with the names of weights to take from it, None for all."""
        single, index = self._folder / SINGLE, self._folder / SHARDED
        if single.is_file():
            return {single: None}
        if not index.is_file():
            others = sorted(
                path.name
                for path in self._folder.iterdir()
                if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack")
            )
            instead = f", only {_some(others)}, which can run code and is not opened" if others else ""
            raise CheckpointError(
                f"{self._folder} holds no {SINGLE}{instead}; expected weights in the safetensors format, as "
                "transformers' save_pretrained writes them"
            )
        fields = read_json(index)
        places = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise CheckpointError(f"{index} holds no weight_map of names to files")
        paths: dict[Path, list[str] | None] = {}
        for place in dict.fromkeys(places.values()):
            path = self._folder / place
            if Path(place).name != place or not path.is_file():
                raise CheckpointError(f"{index} names the file {place!r}, which is not in {self._folder}")
            paths[path] = [name for name, file in places.items() if file == place]
        return paths

    def _extent(self) -> str:
        return _extent([stored.shape for stored in self._stored.values()])


def check_finite_weights(model: nn.Module, name: str | Path) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        CheckpointError: naming the first one that is.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        return
    # a sum is finite only where all of its terms are, and takes a tenth of the time of looking at each
    sums = torch.stack([parameter.detach().sum().float() for parameter in parameters.values()])
    if bool(sums.isfinite().all()):
        return
    for parameter_name, parameter in parameters.items():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(
                f"{name} holds NaN or an infinity in {parameter_name}, as {parameter.dtype} reads it; expected finite "
                "weights"
            )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {path} are damaged: {error}") from error


def _modern(name: str) -> str:
    for old, new in _OLD_ENDS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _extent(shapes: Iterable[Iterable[int]]) -> str:
    return f"{sum(map(_count, shapes)):,} numbers"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
