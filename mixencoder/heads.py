"""A further head for a model that is already trained: `model_with_head`, which `Engine.with_head` calls."""

from collections.abc import Sequence
from typing import TypeVar

from mixencoder.backbones import cast_parameters
from mixencoder.configuration import HEADS
from mixencoder.errors import InputError
from mixencoder.modeling import HeadedModel

_Model = TypeVar("_Model", bound=HeadedModel)


def model_with_head(model: _Model, head: str, class_names: Sequence[str] = ()) -> _Model:
    """Return a copy of a model with one more, untrained head, which comes last; other weights keep their bits.

    Args:
        model: of any of the architectures.
        head: "ranking" or "classification".
        class_names: for classification, the classes' names in order of their numbers.

    Raises:
        InputError: the model has that head, there is no such head, or the classes are not those of a head.
    """
    has = model.config.heads
    if head not in HEADS or head in has:
        raise InputError(
            f"head is {head!r}; expected one of {', '.join(HEADS)} that the model lacks, it has {', '.join(has)}"
        )
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if head == "ranking" and names:
        raise InputError(f"class_names is {names}; a ranking head has no classes")
    if head == "classification" and (not names or len(set(names)) < len(names)):
        raise InputError(f"class_names is {names}; expected names of classes, each once")
    fields = model.config.to_dict()
    fields["heads"] = [*has, head]
    if names:
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: number for number, name in enumerate(names)}
    extended = type(model)(type(model.config).from_dict(fields))
    # strict: all that the model had must have its place
    extended.load_state_dict({**extended.state_dict(), **model.state_dict()})
    cast_parameters(extended, model.dtype)
    return extended.to(model.device)
