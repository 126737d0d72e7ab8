"""Make or load the model that training starts from, with the heads that the data need."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.architectures import engine_class, load_engine
from mixencoder.base.engine import Engine
from mixencoder.base.inputs import positive_integer
from mixencoder.bundled import default_checkpoint
from mixencoder.data.examples import Data, class_names, warn_of_similar_names
from mixencoder.errors import DataError, InputError
from mixencoder.ranking.identity import ModelIdentity

logger = logging.getLogger(__name__)

BUNDLED = "bundled"
"""Name of the bundled checkpoint in settings."""
CLASS_FIELDS = ("num_labels", "id2label", "label2id")
"""Configuration fields of a classification head's classes; the only fields allowed with a trained model."""


class Start(NamedTuple):
    """The model that a run starts from."""

    engine: Engine
    read: str
    """Hash of the weights and the tokenizer that were read, without new heads."""


def identity(model: Any, tokenizer: Any) -> str:
    """Return a hash of a model's weights and its tokenizer."""
    return " ".join(ModelIdentity(model, tokenizer).parts(("weights", "tokenizer")).values())


def checkpoint_path(name: str | Path) -> str | Path:
    """Return the path or hub id of a model that a configuration names."""
    return default_checkpoint() if name == BUNDLED else name


def new_model(
    architecture: str,
    backbone: str | Path,
    fields: Mapping[str, Any],
    sources: Sequence[Data],
) -> Start:
    """Make an untrained model of an architecture on an encoder.

    Args:
        architecture: one of `mixencoder.architectures.ARCHITECTURES`.
        backbone: the encoder, or a trained model whose encoder to use.
        fields: fields of the architecture's configuration; heads and classes that are left out come from the data.
        sources: the data.

    Raises:
        DataError, InputError, CheckpointError: an argument cannot be used.
    """
    fields = dict(fields)
    names = _configured_classes(fields)
    if names is None:
        found = [class_names(source) for source in sources]
        names = sorted(set().union(*found))
        warn_of_similar_names(names, "data")
        if names:
            fields.setdefault("heads", ["classification"] if all(found) else ["ranking", "classification"])
            if "classification" not in fields["heads"]:
                names = []
    if names:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    engine = engine_class(architecture).from_backbone(checkpoint_path(backbone), device="cpu", **fields)
    return Start(engine, identity(engine.model.backbone, engine.tokenizer))


def trained_model(
    name: str | Path,
    architecture: str | None,
    fields: Mapping[str, Any],
    sources: Sequence[Data],
) -> Start:
    """Load a model to continue from; add a classification head if the data hold classes and it has none.

    Args:
        name: its directory, hub id, or `BUNDLED`.
        architecture: its architecture; None accepts any.
        fields: some of `CLASS_FIELDS`; without any, the classes come from the data.
        sources: the data.

    Raises:
        DataError, InputError, CheckpointError: an argument cannot be used, or the model has other classes.
    """
    engine = load_engine(checkpoint_path(name), device="cpu")
    if architecture is not None and not isinstance(engine, engine_class(architecture)):
        raise InputError(f"{name} is a {type(engine).__name__}; expected a {architecture}")
    read = identity(engine.model, engine.tokenizer)
    # it is valid only for the weights before training
    engine.config.calibration = None
    names = _configured_classes(fields)
    if names is None and "num_labels" in fields:
        names = _numbered_classes(fields["num_labels"])
    is_configured = names is not None
    if names is None:
        names = sorted(set().union(*(class_names(source) for source in sources)))
    if not names:
        return Start(engine, read)
    if "classification" not in engine.config.heads:
        warn_of_similar_names(names, "data")
        logger.info("%s gets a classification head for %s", name, ", ".join(names))
        return Start(engine.with_head("classification", names), read)
    known = [name for _, name in sorted((engine.config.id2label or {}).items())]
    if names != known if is_configured else not set(names) <= set(known):
        raise DataError(
            f"{name} has the classes {', '.join(known)}, but the "
            f"{'configuration has' if is_configured else 'data have'} {', '.join(names)}; a trained "
            "head keeps its classes. Give labels the same names, or start a new model from its encoder (backbone)"
        )
    return Start(engine, read)


def _configured_classes(fields: Mapping[str, Any]) -> list[str] | None:
    """Return the classes' names in order of their numbers, None if the fields hold none.

    Raises:
        InputError: the numbers do not count from 0, or a name is not a string.
    """
    given = next((name for name in ("id2label", "label2id") if name in fields), None)
    if given is None:
        return None
    pairs = dict(fields[given]).items() if isinstance(fields[given], Mapping) else ()
    # YAML and JSON may hold class numbers as text
    numbered = {str(number): name for number, name in (pairs if given == "id2label" else ((n, c) for c, n in pairs))}
    found = [numbered.get(str(number)) for number in range(len(numbered))]
    names = [name for name in found if isinstance(name, str)]
    if not names or len(names) < len(found):
        raise InputError(f"{given} is {fields[given]!r}; expected names of classes, numbered from 0")
    return names


def _numbered_classes(count: Any) -> list[str]:
    """Return transformers' default names of classes."""
    return [f"LABEL_{number}" for number in range(positive_integer(count, "num_labels"))]
