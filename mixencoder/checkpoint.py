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

from mixencoder.architectures import class_of, load_engine
from mixencoder.backbones import build_backbone, layout_of
from mixencoder.config_files import read_config
from mixencoder.configuration import checked_calibration
from mixencoder.durable import exclusive, finish, replace_file, write_folder
from mixencoder.errors import CheckpointError, UnsupportedBackboneError
from mixencoder.inputs import local_path
from mixencoder.loading import failures_named, load_weights, quiet_bars
from mixencoder.locations import located, standing_name
from mixencoder.modeling import HeadedModel
from mixencoder.vocabulary import check_tokenizer
from mixencoder.weight_files import WeightFiles

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
            owner = class_of(found)
            advice = (
                f"To build one on top of an encoder use {front_door}.from_backbone"
                if owner is None
                else f"Load it with {owner}.from_pretrained"
            )
            raise CheckpointError(f'{name_or_path} holds a model of type "{found}"; expected "{expected}". {advice}')
        if not isinstance(fields.get("backbone_config"), dict):
            raise CheckpointError(f"{name_or_path} names no backbone_config in its config.json; expected the encoder's")
        files = WeightFiles(path)
        labels = fields.get("num_labels")
        if isinstance(labels, int) and labels > files.largest_size:
            raise CheckpointError(
                f"{name_or_path} asks for {labels:,} labels in its config.json, but no weight in its files has more "
                f"than {files.largest_size:,} rows or columns"
            )
        fields["backbone_config"] = _without_labels(fields["backbone_config"])
        config = model_class.config_class.from_dict(fields)
        try:
            model = load_weights(path, files, config, model_class, dtype)
        except UnsupportedBackboneError as error:
            raise CheckpointError(f"{name_or_path} cannot be loaded: {error}") from error
    assert isinstance(model, model_class), "it was built by that class"
    model.name_or_path = model.config.name_or_path = standing_name(name_or_path)
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
    found = fields.get("model_type")
    if class_of(found) is not None:
        return load_engine(name_or_path, device="cpu").model.backbone
    with failures_named(name_or_path):
        if not isinstance(found, str) or found not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{name_or_path} names the model type {found!r} in its config.json, which transformers does not know"
            )
        config = CONFIG_MAPPING[found].from_dict(_without_labels(fields))
        options = layout_of(config).model_options
        backbone = load_weights(path, WeightFiles(path), config, build_backbone, torch.float32, **options)
    # where it lay on this machine is nobody's business once it is saved inside another checkpoint
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
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
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
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{directory} cannot be written: {reason}") from error


def write_calibration(directory: Path, calibration: Mapping[str, float]) -> None:
    """Store a calibration in the configuration of a checkpoint, whole or not at all.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be written.
    """
    directory = local_path(directory)
    path = directory / "config.json"
    located(directory)
    try:
        with exclusive(directory):
            finish(directory)
            read_config(directory)
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["calibration"] = checked_calibration(calibration)
            replace_file(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _without_labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoder's fields without the classes of a head that it is loaded without."""
    return {name: value for name, value in fields.items() if name not in ("num_labels", "id2label", "label2id")}
