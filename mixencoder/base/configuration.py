"""`EncoderConfig`, the base of all architectures' configurations, and checks of their fields."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

HEADS = ("ranking", "classification")
MIN_TOKENS = 3
"""Smallest limit on a text's length: one token between two special tokens."""


class EncoderConfig(PreTrainedConfig):
    """Base of the configurations of all architectures.

    Args:
        backbone_config: configuration of the encoder, as an object or a dictionary with its ``model_type``.
        heads: which heads the checkpoint has, of "ranking" and "classification"; the first is the default. A single one
            may be given as a string.
        max_query_length, max_document_length: most tokens of a text, special tokens included. None: the backbone's
            number of positions.
        query_truncation_side: "right" keeps the start of a query that is too long; "left" keeps its end, for queries
            that are dialogues.
        classifier_dropout: dropout inside the classification head, and before a learned ranking head.
        calibration: {"temperature": above 0, "bias": number}, fitted by `mixencoder calibrate`: the probability that a
            document is right is ``sigmoid(score / temperature + bias)``. None: not fitted.
        num_labels, id2label, label2id: classes of the classification head, as in every transformers configuration.

    Raises:
        ValueError: a value is outside its range.
    """

    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (the name and form that transformers reads)

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        heads: Sequence[str] = ("ranking",),
        max_query_length: int | None = None,
        max_document_length: int | None = None,
        query_truncation_side: str = "right",
        classifier_dropout: float = 0.1,
        calibration: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**{"model_type": "bert", **backbone_config})
        self.backbone_config = AutoConfig.for_model("bert") if backbone_config is None else backbone_config
        self.heads = list_field("heads", [heads] if isinstance(heads, str) else heads, f"names of {', '.join(HEADS)}")
        for head in self.heads:
            check_choice("a head", head, HEADS)
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads is {self.heads}; expected one or more of {', '.join(HEADS)}, each once")
        for name, length in (("max_query_length", max_query_length), ("max_document_length", max_document_length)):
            if length is not None:
                check_integer(name, length, MIN_TOKENS)
        self.max_query_length = max_query_length
        self.max_document_length = max_document_length
        check_choice("query_truncation_side", query_truncation_side, ("left", "right"))
        self.query_truncation_side = query_truncation_side
        if not is_number(classifier_dropout) or not 0 <= classifier_dropout < 1:
            raise ValueError(f"classifier_dropout is {classifier_dropout!r}; expected a number from 0 to below 1")
        self.classifier_dropout = classifier_dropout
        self.calibration = checked_calibration(calibration)
        super().__init__(**kwargs)
        if "classification" in self.heads:
            check_integer("num_labels", self.num_labels, 1)

    @property
    def hidden_size(self) -> int:
        """Width d of the backbone's vectors, and of the layers on top."""
        return self.backbone_config.hidden_size

    @property
    def num_classes(self) -> int:
        """The number of labels, 0 for none; transformers' ``num_labels`` may be None."""
        return self.num_labels or 0

    @property
    def class_numbers(self) -> dict[str, int] | None:
        """The classification head's labels and their numbers; None without such a head."""
        if "classification" not in self.heads:
            return None
        return {name: int(number) for name, number in (self.label2id or {}).items()}


def checked_calibration(value: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return a calibration in the form that a configuration stores.

    Raises:
        ValueError: value is not None, and not a temperature above 0 with a bias.
    """
    if value is None:
        return None
    fields = dict(value) if isinstance(value, Mapping) else {}
    if set(fields) != {"temperature", "bias"} or not all(map(is_number, fields.values())) or fields["temperature"] <= 0:
        raise ValueError(f"calibration is {value!r}; expected None or a temperature above 0 and a bias")
    return fields


def check_field_names(config_class: type[PreTrainedConfig], fields: Iterable[str]) -> None:
    """Raise if a configuration lacks some of the fields; transformers would store them, and they would have no effect.

    Raises:
        ValueError: fields are unknown; the message names them and the known ones.
    """
    known = {"num_labels", "id2label", "label2id"}
    for parent in config_class.__mro__[: config_class.__mro__.index(PreTrainedConfig)]:
        parameters = inspect.signature(parent.__init__).parameters.values()
        known |= {entry.name for entry in parameters if entry.kind == entry.POSITIONAL_OR_KEYWORD}
    known -= {"self", "backbone_config"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"there is no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Check that a value is an integer from least to most.

    Raises:
        ValueError: it is not.
    """
    if not is_integer(value) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer {limit}")


def list_field(name: str, values: Sequence[Any], expected: str) -> list[Any]:
    """Return the values of a field as a list.

    Raises:
        ValueError: values is a string, or not a sequence.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; expected a list of {expected}")
    return list(values)


def is_integer(value: Any) -> bool:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
