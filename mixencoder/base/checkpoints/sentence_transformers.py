"""Folders of sentence-transformers: which part of them is the encoder, and how it was trained to be read.

`modules.json` lists the modules that turn a text into its vector: the encoder, the pooling, and what follows.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.base.checkpoints.config_files import read_json
from mixencoder.errors import CheckpointError, EncoderWarning

MODULES = "modules.json"
_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS = {"mean": "mean", "cls": "first"}
"""What this library calls the poolings that it has."""


class SentenceReading(NamedTuple):
    """How a text's vector was made of the encoder's tokens."""

    poolings: tuple[str, ...]
    """In the words of sentence-transformers; several were concatenated."""
    others: tuple[str, ...]
    """Kinds of further modules, such as Dense and Normalize."""


def encoder_folder(folder: Path) -> Path:
    """Return the folder of the encoder: the one given, or that of the module that `MODULES` names.

    Raises:
        CheckpointError: `MODULES` is damaged, or names a folder that is not below.
    """
    if (folder / "config.json").is_file() or not (folder / MODULES).is_file():
        return folder
    for kind, path in _modules(folder):
        if kind == "Transformer":
            return path
    raise CheckpointError(f"{folder / MODULES} names no Transformer; expected a model that holds an encoder")


def sentence_reading(folder: Path) -> SentenceReading | None:
    """Return how the encoder in a folder was trained to be read, None if the folder does not say.

    Raises:
        CheckpointError: `MODULES` or a module's configuration is damaged.
    """
    if not (folder / MODULES).is_file():
        return None
    poolings, others = [], []
    for kind, path in _modules(folder):
        if kind == "Pooling":
            poolings += _poolings(path / "config.json")
        elif kind != "Transformer":
            others.append(kind)
    return SentenceReading(tuple(poolings), tuple(others))


def follow_pooling(
    folder: Path, fields: Mapping[str, Any], choices: Mapping[str, Mapping[str, Any]], *, scales: bool = False
) -> dict[str, Any]:
    """Return a new model's fields with the pooling that its encoder was trained with; warn where it cannot be followed.

    Args:
        folder: of the encoder.
        fields: asked for; a pooling among them stays.
        choices: the fields that give each of the poolings "mean" and "first", as far as the model has it.
        scales: whether the lengths of vectors count in the model's scores.

    Raises:
        CheckpointError: the folder's files are damaged.
    """
    reading = sentence_reading(folder)
    if reading is None or "pooling" in fields:
        return dict(fields)
    followed = _POOLINGS.get(reading.poolings[0]) if len(reading.poolings) == 1 else None
    if reading.poolings and followed not in choices:
        _warn(
            f"the encoder in {folder} was trained with {' and '.join(reading.poolings)} pooling, which this model does "
            f"not have as it is set up; it pools otherwise, so that its scores start worse than they could. Expected "
            f"{' or '.join(choices)}"
        )
    left_out = [kind for kind in reading.others if kind != "Normalize" or scales]
    if left_out:
        _warn(
            f"the encoder in {folder} was trained with modules behind its pooling that are left out here: "
            f"{', '.join(left_out)}"
        )
    return {**fields, **choices.get(followed or "", {})}


def _warn(message: str) -> None:
    # points at who called from_backbone
    warnings.warn(message, EncoderWarning, stacklevel=5)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the kind and the folder of each module."""
    path = folder / MODULES
    entries = read_json(path)
    modules = []
    for entry in entries if isinstance(entries, list) else [None]:
        kind, place = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise CheckpointError(f"{path} holds {entry!r}; expected modules, each with its type and path")
        module = folder / place
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise CheckpointError(f"{path} names the folder {place!r}; expected one below {folder}")
        modules.append((kind.rpartition(".")[2], module))
    return modules


def _poolings(path: Path) -> Sequence[str]:
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}; expected a JSON object")
    named = fields.get("pooling_mode")
    if named is not None:
        return [str(name) for name in (named if isinstance(named, list) else [named])]
    return [name for field, name in _OLD_NAMES.items() if fields.get(field) is True]
