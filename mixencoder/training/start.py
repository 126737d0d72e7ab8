"""The model that a run of the trainer starts from, with the heads that its data ask for."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.architectures import front_door, load_engine
from mixencoder.base.engine import Engine
from mixencoder.bundled import default_checkpoint
from mixencoder.data.examples import Data, class_names, warn_of_similar_names
from mixencoder.errors import DataError, InputError
from mixencoder.ranking.identity import ModelIdentity

logger = logging.getLogger(__name__)

BUNDLED = "bundled"
"""Name of the checkpoint that the package holds, where a model is named."""
CLASS_FIELDS = ("num_labels", "id2label", "label2id")
"""Fields of a configuration that tell a classification head's classes; the only ones for a model to go on from."""


class Start(NamedTuple):
    """What a run starts from."""

    engine: Engine
    read: str
    """Hash of the weights and the tokenizer that were read, not of what was made afresh."""


def identity(model: Any, tokenizer: Any) -> str:
    """Return a hash of a model's weights and its tokenizer."""
    parts = ModelIdentity(model, tokenizer).parts()
    return f"{parts['weights']} {parts['tokenizer']}"


def checkpoint_path(name: str | Path) -> str | Path:
    """Return where a model lies that a configuration names."""
    return default_checkpoint() if name == BUNDLED else name


def new_model(
    architecture: str,
    backbone: str | Path,
    fields: Mapping[str, Any],
    sources: Sequence[Data],
) -> Start:
    """Make an untrained model of an architecture on an encoder.

    Args:
        architecture: of `mixencoder.architectures.ARCHITECTURES`.
        backbone: the encoder, or a trained model whose encoder to take.
        fields: of the architecture's configuration; heads and classes that they leave out are read off the data.
        sources: the data.

    Raises:
        DataError, InputError, CheckpointError: something named cannot be used.
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
    engine = front_door(architecture).from_backbone(checkpoint_path(backbone), device="cpu", **fields)
    return Start(engine, identity(engine.model.backbone, engine.tokenizer))


def trained_model(
    name: str | Path,
    architecture: str | None,
    fields: Mapping[str, Any],
    sources: Sequence[Data],
) -> Start:
    """Load a model to go on from; with data that hold classes it gets a head for them if it has none.

    Args:
        name: its directory, hub id, or `BUNDLED`.
        architecture: what it must be; None takes any.
        fields: of `CLASS_FIELDS`; without any, classes are read off the data.
        sources: the data.

    Raises:
        DataError, InputError, CheckpointError: something named cannot be used, or the model has other classes.
    """
    engine = load_engine(checkpoint_path(name), device="cpu")
    if architecture is not None and not isinstance(engine, front_door(architecture)):
        raise InputError(f"{name} is a {type(engine).__name__}; expected a {architecture}")
    read = identity(engine.model, engine.tokenizer)
    # fitted to the scores of weights that are about to change
    engine.config.calibration = None
    names = _configured_classes(fields)
    if names is None and "num_labels" in fields:
        names = _numbered_classes(fields["num_labels"])
    asked = names is not None
    if names is None:
        names = sorted(set().union(*(class_names(source) for source in sources)))
    if not names:
        return Start(engine, read)
    if "classification" not in engine.config.heads:
        warn_of_similar_names(names, "data")
        logger.info("%s gets a classification head for %s", name, ", ".join(names))
        return Start(engine.with_head("classification", names), read)
    known = [name for _, name in sorted((engine.config.id2label or {}).items())]
    if names != known if asked else not set(names) <= set(known):
        raise DataError(
            f"{name} has the classes {', '.join(known)}, but the {'configuration has' if asked else 'data have'} "
            f"{', '.join(names)}; a trained head keeps its classes. Give labels the same names, or start a new model "
            "from its encoder (backbone)"
        )
    return Start(engine, read)


def _configured_classes(fields: Mapping[str, Any]) -> list[str] | None:
    """Return the classes' names in order of their numbers, None if fields name none.

    Raises:
        InputError: numbers are not those from 0 on, or a name is no text.
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
    """Return names as transformers gives them to classes that have none."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"num_labels is {count!r}; expected an integer of at least 1")
    return [f"LABEL_{number}" for number in range(count)]
