"""Read a checkpoint's weight files, after comparing their headers with the weights that a model expects.

The comparison comes before any memory is allocated for the model, and a model is loaded completely or not at all. Only
safetensors files are opened: other formats can run code.
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
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Old names of LayerNorm weights, which old files still have -> today's names."""


class _StoredTensor(NamedTuple):
    """A tensor as a file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The weights in a checkpoint's folder.

    Args:
        folder: holds `SINGLE`, or `SHARDED` and the files that it names.

    Raises:
        CheckpointError: there are no weight files, or one is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored = {_modern_name(stored.name): stored for stored in self._headers()}

    def check_size(self, name: str, size: Any) -> None:
        """Check that a size in config.json is no larger than the largest dimension of a weight in the files.

        Called before a model is built, so that a huge size allocates no memory.

        Raises:
            CheckpointError: size is an integer and larger than every dimension of every weight.
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
        """Return the weights that a model expects, by name, memory-mapped from the files.

        The names in the files may all have one more prefix. Weights of other parts, such as poolers and heads, are left
        out.

        Raises:
            CheckpointError: weights are missing, have other shapes or no floating dtype, or weights of the expected
                parts would be left out, such as further layers; the message counts them and names some.
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
                f"{self._folder} holds {len(left):,} weights that its config.json does not describe: {_some(left)}. "
                "Without them the model would be a different one; correct config.json, or save the smaller model"
            )
        return self._tensors(wanted)

    def _prefix(self, expected: Mapping[str, torch.Size]) -> str:
        """Return the prefix of the expected names in the files; if some names are missing, that of most of them."""
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
        """Return weights in the expected parts that the model does not expect. Integers are old versions' buffers."""
        parts = {name.partition(".")[0] for name in expected}
        return [
            name
            for name, stored in self._stored.items()
            if stored.dtype in _FLOATING
            and name.startswith(prefix)
            and name.removeprefix(prefix) not in expected
            and name.removeprefix(prefix).partition(".")[0] in parts
        ]

    def _tensors(self, wanted: Mapping[str, _StoredTensor]) -> dict[str, Tensor]:
        tensors = {}
        with ExitStack() as stack:
            files = {path: stack.enter_context(_opened(path)) for path in {stored.path for stored in wanted.values()}}
            for name, stored in wanted.items():
                tensors[name] = files[stored.path].get_tensor(stored.name)
        return tensors

    def _headers(self) -> Iterable[_StoredTensor]:
        for path, names in self._paths().items():
            with _opened(path) as file:
                held = set(file.keys())
                for name in held if names is None else names:
                    if name not in held:
                        raise CheckpointError(f"{path} lacks {name}, which {SHARDED} lists")
                    entry = file.get_slice(name)
                    yield _StoredTensor(path, name, tuple(entry.get_shape()), entry.get_dtype())

    def _paths(self) -> dict[Path, list[str] | None]:
        """Return the files to read, each with the names of the weights to take from it; None takes all."""
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
        file_of = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
            raise CheckpointError(f"{index} holds no weight_map; expected one from names of weights to files")
        paths: dict[Path, list[str] | None] = {}
        for file in dict.fromkeys(file_of.values()):
            path = self._folder / file
            if Path(file).name != file or not path.is_file():
                raise CheckpointError(f"{index} names the file {file!r}, which is not in {self._folder}")
            paths[path] = [name for name, other in file_of.items() if other == file]
        return paths

    def _extent(self) -> str:
        return _extent([stored.shape for stored in self._stored.values()])


def check_finite_weights(model: nn.Module, name: str | Path) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        CheckpointError: a weight is; the message names the first one.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        return
    # a sum is finite only if all of its terms are, and takes a tenth of the time of checking each
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


def _modern_name(name: str) -> str:
    for old, new in _OLD_SUFFIXES.items():
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
