"""Folders of sentence-transformers: find the encoder, and the pooling and modules that it was trained with.

`modules.json` lists the modules that turn a text into its vector: the encoder, the pooling, and any after them.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.base.checkpoints.config_files import read_json
from mixencoder.errors import CheckpointError, EncoderWarning

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS = {"mean": "mean", "cls": "first"}
"""From sentence-transformers' names of poolings to this library's, for those that it has."""


class SentenceModules(NamedTuple):
    """The modules after an encoder, which turn its token vectors into the text's vector."""

    poolings: tuple[str, ...]
    """As sentence-transformers names them; the results of several are concatenated."""
    others: tuple[str, ...]
    """Kinds of further modules, such as Dense and Normalize."""


def encoder_folder(folder: Path) -> Path:
    """Return the folder of the encoder: the one given, or the folder of the Transformer module in `MODULES`.

    Raises:
        CheckpointError: `MODULES` is damaged, lists no Transformer, or names a folder that is not below this one.
    """
    if (folder / "config.json").is_file() or not (folder / MODULES).is_file():
        return folder
    for kind, path in _modules(folder):
        if kind == "Transformer":
            return path
    raise CheckpointError(f"{folder / MODULES} lists no Transformer; expected a model with an encoder")


def modules_after_encoder(folder: Path) -> SentenceModules | None:
    """Return the modules that the encoder in a folder was trained with, None if the folder has no `MODULES`.

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
    return SentenceModules(tuple(poolings), tuple(others))


def advice_on(folder: Path, fields: Mapping[str, Any], engine_name: str) -> str:
    """Return what to do with a checkpoint that is not of this library, for an error message.

    Args:
        folder: of the checkpoint, with `MODULES` if there is one.
        fields: of its config.json.
        engine_name: the class that was to load it.
    """
    build = f"{engine_name}.from_backbone"
    described = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else None
    kind = described.get("model_type") if isinstance(described, dict) else None
    named = fields.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if kind == "CrossEncoder" or architecture.endswith("ForSequenceClassification"):
        return (
            "It is a cross-encoder or classifier that reads both texts together, so no document could be encoded ahead "
            f"of time. To build an untrained model on its encoder, without its head, use {build}"
        )
    if (folder / MODULES).is_file():
        start = ", which starts with its ranking if you pass dual_term=True" if engine_name == "MixEncoder" else ""
        return f"It is a sentence-transformers model. To build a model on top of its encoder use {build}{start}"
    return f"To build one on top of an encoder use {build}"


def follow_pooling(
    folder: Path, fields: Mapping[str, Any], choices: Mapping[str, Mapping[str, Any]], *, lengths_matter: bool = False
) -> dict[str, Any]:
    """Add to a new model's fields the pooling that its encoder was trained with; warn if the model does not have it.

    Called by `ModelHolder._make_untrained`, for `from_backbone`: the warnings point at the caller of the latter.

    Args:
        folder: of the encoder.
        fields: of the configuration, as the user gave them; a pooling among them stays.
        choices: the poolings that the model has, of "mean" and "first", each with the fields that select it.
        lengths_matter: whether the lengths of vectors affect the model's scores.

    Raises:
        CheckpointError: the folder's files are damaged.
    """
    modules = modules_after_encoder(folder)
    if modules is None or "pooling" in fields:
        return dict(fields)
    pooling = _POOLINGS.get(modules.poolings[0]) if len(modules.poolings) == 1 else None
    if modules.poolings and pooling not in choices:
        _warn(
            f"the encoder in {folder} was trained with {' and '.join(modules.poolings)} pooling, which this model does "
            f"not have with these settings. It uses another pooling, so its scores start worse than they could; "
            f"expected {' or '.join(choices)} pooling"
        )
    left_out = [kind for kind in modules.others if kind != "Normalize" or lengths_matter]
    if left_out:
        _warn(
            f"the encoder in {folder} was trained with modules after its pooling that are left out here: "
            f"{', '.join(left_out)}"
        )
    return {**fields, **choices.get(pooling or "", {})}


def _warn(message: str) -> None:
    # frames: _warn, follow_pooling, _make_untrained, from_backbone, the user's call
    warnings.warn(message, EncoderWarning, stacklevel=5)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the kind and the folder of each module."""
    path = folder / MODULES
    entries = read_json(path)
    modules = []
    for entry in entries if isinstance(entries, list) else [None]:
        kind, subfolder = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(subfolder, str):
            raise CheckpointError(f"{path} holds {entry!r}; expected modules, each with its type and path")
        if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
            raise CheckpointError(f"{path} names the folder {subfolder!r}; expected one below {folder}")
        modules.append((kind.rpartition(".")[2], folder / subfolder))
    return modules


def _poolings(path: Path) -> Sequence[str]:
    """Return the poolings that a Pooling module's configuration names."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}; expected a JSON object")
    named = fields.get("pooling_mode")
    if named is not None:
        return [str(name) for name in (named if isinstance(named, list) else [named])]
    return [name for field, name in _OLD_FLAGS.items() if fields.get(field) is True]
