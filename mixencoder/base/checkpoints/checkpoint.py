"""Reading and writing checkpoints, reading encoders, with errors that say what was found.

Nothing is executed from a checkpoint, and nothing but safetensors is opened for weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from mixencoder.base.backbones import build_backbone, layout_of
from mixencoder.base.checkpoints.config_files import read_config
from mixencoder.base.checkpoints.loading import check_sizes, failures_named, load_weights, quiet_bars
from mixencoder.base.checkpoints.locations import located, shown_name
from mixencoder.base.checkpoints.model_types import CLASS_NAMES, architecture_of
from mixencoder.base.checkpoints.tokenizer_checks import check_tokenizer
from mixencoder.base.checkpoints.weight_files import WeightFiles
from mixencoder.base.configuration import checked_calibration
from mixencoder.base.inputs import local_path
from mixencoder.base.modeling import HeadedModel
from mixencoder.durable import exclusive, finish, replace_file, write_folder
from mixencoder.errors import CheckpointError, UnsupportedBackboneError

_Model = TypeVar("_Model", bound=HeadedModel)


def load_model(
    name_or_path: str | Path, dtype: torch.dtype, model_class: type[_Model], *, front_door: str = "MixEncoder"
) -> _Model:
    """Load a model's configuration and weights; front_door is the name of the class that messages send users to.

    Raises:
        CheckpointError: nothing is there, it is damaged, weights are missing or not finite, or it is another kind of
            model.
    """
    path = located(name_or_path)
    with failures_named(name_or_path):
        fields = read_config(path)
        found, expected = fields.get("model_type"), model_class.config_class.model_type
        if found != expected:
            owner = CLASS_NAMES.get(architecture_of(found) or "")
            advice = (
                f"To build one on top of an encoder use {front_door}.from_backbone"
                if owner is None
                else f"Load it with {owner}.from_pretrained"
            )
            raise CheckpointError(f'{name_or_path} holds a model of type "{found}"; expected "{expected}". {advice}')
        nested = _nested_encoder(fields, name_or_path)
        files = WeightFiles(path)
        files.check_size("num_labels", fields.get("num_labels"))
        try:
            fields["backbone_config"] = _encoder_config(nested, path, files)
            model = load_weights(path, files, model_class.config_class.from_dict(fields), model_class, dtype)
        except UnsupportedBackboneError as error:
            raise CheckpointError(f"{name_or_path} cannot be loaded: {error}") from error
    assert isinstance(model, model_class), "it was built by that class"
    model.name_or_path = model.config.name_or_path = shown_name(name_or_path)
    return model


def model_type_of(name_or_path: str | Path) -> str:
    """Return the model type that a checkpoint's configuration names, "" for none.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
    """
    return str(read_config(located(name_or_path)).get("model_type", ""))


def load_backbone(name_or_path: str | Path) -> PreTrainedModel:
    """Load a pretrained encoder without its pooler, in float32; of a checkpoint of this library, its backbone.

    Raises:
        CheckpointError: nothing is there, it is damaged, or weights are missing, left over or not finite.
        UnsupportedBackboneError: it cannot serve as backbone.
    """
    path = located(name_or_path)
    fields = read_config(path)
    with failures_named(name_or_path):
        if architecture_of(fields.get("model_type")) is not None:
            # its weights are told apart by the prefix that all of them have
            fields = _nested_encoder(fields, name_or_path)
        files = WeightFiles(path)
        config = _encoder_config(fields, path, files)
        options = layout_of(config).model_options
        backbone = load_weights(path, files, config, build_backbone, torch.float32, **options)
    # do not save the local path inside another checkpoint
    backbone.config.name_or_path = ""
    return backbone


def load_tokenizer(name_or_path: str | Path, config: PreTrainedConfig | None = None) -> Any:
    """Load a tokenizer.

    Args:
        name_or_path: of the checkpoint.
        config: of its model, which the tokenizer is checked against; None checks the tokenizer alone.

    Raises:
        CheckpointError: there is none, it is damaged, it knows no word, or it has more tokens than the model.
    """
    path = located(name_or_path)
    with failures_named(name_or_path):
        # with a configuration at hand, that in the folder is not read again, by rules of its own
        options = {"config": PreTrainedConfig() if config is None else config, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        check_tokenizer(tokenizer, None if config is None else getattr(config, "backbone_config", config), path)
    return tokenizer


def save(
    model: PreTrainedModel, tokenizer: Any, directory: str | Path, *, beside: Mapping[str, str] = MappingProxyType({})
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
        with quiet_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, text in beside.items():
            Path(folder, name).write_text(text, encoding="utf-8")

    try:
        write_folder(local_path(directory), write)
    # a home folder of nobody and a NUL in a name are ValueErrors
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{directory} cannot be written: {reason}") from error


def write_calibration(directory: Path, calibration: Mapping[str, float]) -> None:
    """Store a calibration in the configuration of a checkpoint, whole or not at all.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be written.
    """
    located(directory)
    directory = local_path(directory)
    path = directory / "config.json"
    try:
        with exclusive(directory):
            finish(directory)
            read_config(directory)
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["calibration"] = checked_calibration(calibration)
            replace_file(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _nested_encoder(fields: Mapping[str, Any], name_or_path: str | Path) -> dict[str, Any]:
    """Return the fields of the encoder in a checkpoint's configuration.

    Raises:
        CheckpointError: there are none.
    """
    nested = fields.get("backbone_config")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{name_or_path} names no backbone_config in its config.json; expected the encoder's")
    return nested


def _encoder_config(fields: Mapping[str, Any], folder: Path, files: WeightFiles) -> PreTrainedConfig:
    """Return an encoder's configuration, its sizes checked; the classes of a head are left out, as the head is.

    Raises:
        CheckpointError: transformers knows no such model, or a size cannot be right.
        UnsupportedBackboneError: it cannot serve as backbone.
    """
    found = fields.get("model_type")
    if not isinstance(found, str) or found not in CONFIG_MAPPING:
        raise CheckpointError(f"{folder} names the model type {found!r} in its config.json, which transformers lacks")
    for name in ("hidden_size", "vocab_size"):
        files.check_size(name, fields.get(name))
    heads = ("num_labels", "id2label", "label2id")
    config = CONFIG_MAPPING[found].from_dict({name: value for name, value in fields.items() if name not in heads})
    layout_of(config)
    check_sizes(config, folder)
    return config
