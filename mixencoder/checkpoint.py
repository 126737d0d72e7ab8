"""Reading and writing checkpoints, reading encoders, with errors that say what was found.

Nothing is executed from a checkpoint, and nothing but safetensors is opened for weights.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from mixencoder.architectures import load_engine
from mixencoder.backbones import layout_of
from mixencoder.configuration import MixEncoderConfig, checked_calibration
from mixencoder.durable import finish, standing, write_folder
from mixencoder.errors import CheckpointError
from mixencoder.modeling import HeadedModel

_Model = TypeVar("_Model", bound=HeadedModel)


def load_model(
    name_or_path: str | Path, dtype: torch.dtype, model_class: type[_Model], *, front_door: str = "MixEncoder"
) -> _Model:
    """Load a model's configuration and weights; front_door is the name of the class that messages send users to.

    Raises:
        CheckpointError: nothing is there, it is damaged, weights are missing, or it is another kind of model.
    """
    path = located(name_or_path)
    found, expected = _read(AutoConfig, path).model_type, model_class.config_class.model_type
    if found != expected:
        raise CheckpointError(
            f'{name_or_path} holds a model of type "{found}"; expected "{expected}". To build one '
            f"on top of an encoder use {front_door}.from_backbone"
        )
    model, report = _read(model_class, path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "mismatched_keys") if report[name]}
    if wrong:
        raise CheckpointError(f"{name_or_path} does not hold the weights that its configuration asks for: {wrong}")
    return model


def model_type_of(name_or_path: str | Path) -> str:
    """Return the model type that a checkpoint's configuration names, "" for none.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
    """
    path = located(name_or_path)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        raise CheckpointError(f"{name_or_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return str(fields.get("model_type", ""))


def load_backbone(name_or_path: str | Path) -> PreTrainedModel:
    """Load a pretrained encoder without its pooler, in float32; of a checkpoint of this library, its backbone.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
        UnsupportedBackboneError: it cannot serve as backbone.
    """
    if model_type_of(name_or_path).partition("-")[0] == MixEncoderConfig.model_type:
        return load_engine(name_or_path, device="cpu").model.backbone
    path = located(name_or_path)
    options = layout_of(_read(AutoConfig, path)).model_options
    backbone = _read(AutoModel, path, dtype=torch.float32, use_safetensors=True, **options)
    # where it lay on this machine is nobody's business once it is saved inside another checkpoint
    backbone.config.name_or_path = ""
    return backbone


def load_tokenizer(name_or_path: str | Path) -> Any:
    """Load a tokenizer.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _read(AutoTokenizer, located(name_or_path))


def save(
    model: PreTrainedModel, tokenizer: Any, directory: Path, *, beside: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a checkpoint; a crash leaves the one that was there before or the new one, never a mix of them.

    Args:
        model, tokenizer: what is written.
        directory: where; other files in it stay.
        beside: texts of further files, by name.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, text in beside.items():
            Path(folder, name).write_text(text, encoding="utf-8")

    try:
        write_folder(directory, write)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


def write_calibration(directory: Path, calibration: Mapping[str, float]) -> None:
    """Store a calibration in the configuration of a checkpoint, whole or not at all.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be written.
    """
    located(directory)
    path = directory / "config.json"
    try:
        finish(directory)
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["calibration"] = checked_calibration(calibration)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".config-") as folder:
            written = Path(folder, path.name)
            written.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def located(name_or_path: str | Path) -> str | Path:
    """Return where to read a checkpoint: its directory, another where saving was interrupted, or the hub id as it is.

    Raises:
        CheckpointError: nothing is there, or its configuration is damaged.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        looks_local = isinstance(name_or_path, Path) or name_or_path.count("/") != 1 or str(path).startswith(".")
        if looks_local or path.exists():
            raise CheckpointError(f"{name_or_path} is not a directory; expected a checkpoint's directory or a hub id")
        return name_or_path
    path = standing(path)
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{path} holds no config.json; expected a checkpoint's directory")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{config} is not valid JSON: {error}") from error
    return path


def _read(loader: Any, name_or_path: str | Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name_or_path, **options)
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {name_or_path} are damaged: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name_or_path} cannot be loaded: {reason}") from error
