"""Read untrusted JSON files: sizes are limited, and fields that could make a library run code are dropped."""

import json
import math
from pathlib import Path
from typing import Any

from mixencoder.errors import CheckpointError

MAX_BYTES = 16 * 2**20
"""Largest JSON file; a configuration takes some thousand bytes, a list of sharded weights some hundred thousand."""
MAX_LAYERS = 1000
"""More layers than any encoder has. Each takes time to build, before its weights are looked for."""

_IGNORED = frozenset({
    "auto_map", "custom_pipelines",  # classes in Python files, which would be run
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",  # may name kernels to download
    "experts_implementation", "_experts_implementation", "fusion_config", "kernel_config",
    "transformers_weights",  # a path to other weights
    "dtype", "torch_dtype",  # the caller's choice
    "name_or_path", "_name_or_path", "_commit_hash",  # where the checkpoint was before
    # how the encoder is called: this library decides that
    "chunk_size_feed_forward", "output_hidden_states", "output_attentions", "return_dict", "torchscript", "use_cache",
})  # fmt: skip
_LAYER_COUNTS = frozenset({"num_hidden_layers", "n_layers", "num_layers", "num_hidden_groups", "inner_group_num"})


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is too large, or is not valid JSON; NaN and infinities are not valid.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; expected at most {MAX_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_reject_constant, parse_float=_finite)
    except RecursionError as error:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json, without those that this library ignores.

    Raises:
        CheckpointError: the file is missing or damaged, or describes a model that this library does not load.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no config.json; expected a checkpoint's directory")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), which cannot be loaded; expected an encoder that it was "
            "merged into (peft's merge_and_unload)"
        )
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}; expected a JSON object")
    return _cleaned(fields, path)


def _cleaned(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    cleaned = {}
    for name, value in fields.items():
        if name in _IGNORED:
            continue
        if name == "quantization_config" and value is not None:
            raise CheckpointError(
                f"{path} describes quantised weights ({name}), which cannot be loaded; expected plain ones"
            )
        if name in _LAYER_COUNTS and isinstance(value, int) and value > MAX_LAYERS:
            raise CheckpointError(f"{path} asks for {value:,} layers ({name}); expected at most {MAX_LAYERS:,}")
        cleaned[name] = _cleaned(value, path) if isinstance(value, dict) and name.endswith("_config") else value
    return cleaned


def _reject_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not allowed")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number
