"""What the configurations of all architectures have in common: `EncoderConfig`, and checks of their fields."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

HEADS = ("ranking", "classification")
MIN_TOKENS = 3
"""Shortest limit of a text: one token between two special ones."""


class EncoderConfig(PreTrainedConfig):
    """What the configurations of all architectures have in common.

    Args:
        backbone_config: configuration of the encoder, as an object or a dictionary with its ``model_type``.
        heads: which heads the checkpoint has, of "ranking" and "classification"; the first is the default. One alone
            may be given as its name.
        max_query_length, max_document_length: tokens read of a text, special tokens included. None: all that the
            backbone has positions for.
        query_truncation_side: "right" keeps the start of a query that is too long; "left" keeps its end, for queries
            that are dialogues.
        classifier_dropout: dropout inside the classification head, and before a learned ranking head.
        calibration: {"temperature": above 0, "bias": number} of `mixencoder calibrate`: the probability that a document
            is right is ``sigmoid(score / temperature + bias)``. None: not fitted.
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
        """Width d of the backbone, and of what stands on top of it."""
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
    """Return a calibration as a configuration holds it.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return None
    fields = dict(value) if isinstance(value, Mapping) else {}
    if set(fields) != {"temperature", "bias"} or not all(map(is_number, fields.values())) or fields["temperature"] <= 0:
        raise ValueError(f"calibration is {value!r}; expected None or a temperature above 0 and a bias")
    return fields


def check_names(config_class: type[PreTrainedConfig], fields: Iterable[str]) -> None:
    """Refuse fields that a configuration does not have, which transformers would keep and nobody read.

    Raises:
        ValueError: naming them and those that there are.
    """
    known = {"num_labels", "id2label", "label2id"}
    for parent in config_class.__mro__[: config_class.__mro__.index(PreTrainedConfig)]:
        parameters = inspect.signature(parent.__init__).parameters.values()
        known |= {entry.name for entry in parameters if entry.kind == entry.POSITIONAL_OR_KEYWORD}
    known -= {"self", "backbone_config"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"there is no field {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: with what was found and expected.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse a value that is no integer from least to most.

    Raises:
        ValueError: with what was found and expected.
    """
    if not is_integer(value) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer {limit}")


def list_field(name: str, values: Sequence[Any], expected: str) -> list[Any]:
    """Return a field that holds a list as a list.

    Raises:
        ValueError: it is a string, or no sequence.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; expected a list of {expected}")
    return list(values)


def is_integer(value: Any) -> bool:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
