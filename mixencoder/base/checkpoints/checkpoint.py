"""Load and save checkpoints, and load pretrained encoders, with errors that say what was found.

No code of a checkpoint is executed, and weights are read from safetensors files only.
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
from mixencoder.base.checkpoints.loading import as_checkpoint_errors, check_sizes, hidden_progress_bars, load_weights
from mixencoder.base.checkpoints.locations import checkpoint_root, full_name, model_folder
from mixencoder.base.checkpoints.model_card import CARD, may_replace, model_card
from mixencoder.base.checkpoints.model_types import CLASS_NAMES, architecture_of
from mixencoder.base.checkpoints.sentence_transformers import advice_on
from mixencoder.base.checkpoints.tokenizer_checks import check_tokenizer
from mixencoder.base.checkpoints.weight_files import WeightFiles
from mixencoder.base.configuration import checked_calibration
from mixencoder.base.inputs import local_path
from mixencoder.base.modeling import HeadedModel
from mixencoder.durable import exclusive, finish_interrupted, replace_file, write_folder
from mixencoder.errors import CheckpointError, UnsupportedBackboneError

_Model = TypeVar("_Model", bound=HeadedModel)

RECORD = "training.json"
"""File next to the weights of a trained model: how it was trained."""


def load_model(
    name_or_path: str | Path, dtype: torch.dtype, model_class: type[_Model], *, engine_name: str = "MixEncoder"
) -> _Model:
    """Load a model's configuration and weights; engine_name is the class that error messages advise to use.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, weights are missing or not finite, or it holds another
            kind of model.
    """
    path = model_folder(name_or_path)
    with as_checkpoint_errors(name_or_path):
        fields = read_config(path)
        found, expected = fields.get("model_type"), model_class.config_class.model_type
        if found != expected:
            owner = CLASS_NAMES.get(architecture_of(found) or "")
            advice = (
                advice_on(checkpoint_root(name_or_path), fields, engine_name)
                if owner is None
                else f"Load it with {owner}.from_pretrained"
            )
            raise CheckpointError(f'{name_or_path} holds a model of type "{found}"; expected "{expected}". {advice}')
        encoder_fields = _encoder_fields(fields, name_or_path)
        files = WeightFiles(path)
        files.check_size("num_labels", fields.get("num_labels"))
        try:
            fields["backbone_config"] = _encoder_config(encoder_fields, path, files)
            model = load_weights(path, files, model_class.config_class.from_dict(fields), model_class, dtype)
        except UnsupportedBackboneError as error:
            raise CheckpointError(f"{name_or_path} cannot be loaded: {error}") from error
    assert isinstance(model, model_class), "load_weights builds it by that class"
    model.name_or_path = model.config.name_or_path = full_name(name_or_path)
    return model


def model_type_of(name_or_path: str | Path) -> str:
    """Return the model type in a checkpoint's config.json, "" if it has none.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return str(read_config(model_folder(name_or_path)).get("model_type", ""))


def load_backbone(name_or_path: str | Path) -> PreTrainedModel:
    """Load a pretrained encoder in float32 without its pooler, or the backbone of a checkpoint of this library.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or weights are missing, left over or not finite.
        UnsupportedBackboneError: the encoder cannot serve as backbone.
    """
    path = model_folder(name_or_path)
    fields = read_config(path)
    own = architecture_of(fields.get("model_type")) is not None
    with as_checkpoint_errors(name_or_path):
        if own:
            # WeightFiles finds the backbone's weights by their common prefix
            fields = _encoder_fields(fields, name_or_path)
        files = WeightFiles(path)
        try:
            config = _encoder_config(fields, path, files)
        except UnsupportedBackboneError as error:
            if not own:
                raise
            # this library saved a supported backbone, so the checkpoint was changed
            raise CheckpointError(f"{name_or_path} cannot be loaded: {error}") from error
        options = layout_of(config).model_options
        backbone = load_weights(path, files, config, build_backbone, torch.float32, **options)
    # do not save the local path inside another checkpoint
    backbone.config.name_or_path = ""
    return backbone


def load_tokenizer(name_or_path: str | Path, config: PreTrainedConfig | None = None) -> Any:
    """Load a tokenizer.

    Args:
        name_or_path: of the checkpoint.
        config: of its model, to check that the tokenizer fits; None checks the tokenizer alone.

    Raises:
        CheckpointError: there is no tokenizer, it is damaged, it knows no word, or it has more tokens than the model.
    """
    path = model_folder(name_or_path)
    with as_checkpoint_errors(name_or_path):
        # given a configuration, transformers does not read the unchecked config.json in the folder
        options = {"config": PreTrainedConfig() if config is None else config, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        check_tokenizer(tokenizer, None if config is None else getattr(config, "backbone_config", config), path)
    return tokenizer


def save(
    model: HeadedModel, tokenizer: Any, directory: str | Path, *, beside: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a checkpoint with a model card; a crash leaves the old one or the new one, never a mix.

    Args:
        model, tokenizer: what to write.
        directory: where to write; other files in it stay, and so does a model card that someone else wrote.
        beside: further text files, by name; the card describes the run of a `RECORD` among them.

    Raises:
        CheckpointError: the directory cannot be written.
    """

    def write(folder: Path) -> None:
        with hidden_progress_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        texts = dict(beside)
        if may_replace(local_path(directory)):
            texts[CARD] = model_card(model, beside.get(RECORD))
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")

    try:
        write_folder(local_path(directory), write)
    # ValueError: an unknown home folder, or a NUL in the path
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{directory} cannot be written: {reason}") from error


def write_calibration(directory: Path, calibration: Mapping[str, float]) -> None:
    """Write a calibration into a checkpoint's config.json; a crash leaves the old file or the new one.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be written.
    """
    model_folder(directory)
    directory = local_path(directory)
    path = directory / "config.json"
    try:
        with exclusive(directory):
            finish_interrupted(directory)
            read_config(directory)
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["calibration"] = checked_calibration(calibration)
            replace_file(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _encoder_fields(fields: Mapping[str, Any], name_or_path: str | Path) -> dict[str, Any]:
    """Return the fields of the encoder's configuration, which a checkpoint's config.json holds.

    Raises:
        CheckpointError: config.json does not hold them.
    """
    nested = fields.get("backbone_config")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{name_or_path} has no backbone_config in its config.json; expected that of its encoder")
    return nested


def _encoder_config(fields: Mapping[str, Any], folder: Path, files: WeightFiles) -> PreTrainedConfig:
    """Return an encoder's configuration with checked sizes, without the labels of its head, which is not loaded.

    Raises:
        CheckpointError: transformers does not know the model type, or a size is impossible.
        UnsupportedBackboneError: the encoder cannot serve as backbone.
    """
    found = fields.get("model_type")
    if not isinstance(found, str) or found not in CONFIG_MAPPING:
        raise CheckpointError(f"{folder} has model type {found!r} in its config.json, which transformers does not know")
    for name in ("hidden_size", "vocab_size"):
        files.check_size(name, fields.get(name))
    heads = ("num_labels", "id2label", "label2id")
    config = CONFIG_MAPPING[found].from_dict({name: value for name, value in fields.items() if name not in heads})
    layout_of(config)
    check_sizes(config, folder)
    return config
