"""What the configurations of all peers have in common; each peer's own fields stand in its module."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mixencoder.configuration import HEADS, checked_calibration


class PeerConfig(PreTrainedConfig):
    """Base of the peers' configurations.

    Args:
        backbone_config: configuration of the encoder, as an object or a dictionary with its ``model_type``.
        heads: which heads the checkpoint has, of "ranking" and "classification"; the first is the default.
        max_query_length, max_document_length: tokens read of a text, special tokens included. None: all that the
            backbone has positions for.
        query_truncation_side: "right" keeps the start of a query that is too long; "left" keeps its end.
        classifier_dropout: dropout inside the classification head, and before a learned ranking head.
        calibration: as in `mixencoder.configuration.MixEncoderConfig`.
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
        self.backbone_config = backbone_config or AutoConfig.for_model("bert")
        check_choice("query_truncation_side", query_truncation_side, ("left", "right"))
        self.query_truncation_side = query_truncation_side
        self.heads = [heads] if isinstance(heads, str) else list(heads)
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads is {self.heads}; expected one or more of {', '.join(HEADS)}, each once")
        for head in self.heads:
            check_choice("a head", head, HEADS)
        for name, length in (("max_query_length", max_query_length), ("max_document_length", max_document_length)):
            if length is not None:
                check_integer(name, length, 3)
            setattr(self, name, length)
        if not 0 <= classifier_dropout < 1:
            raise ValueError(f"classifier_dropout is {classifier_dropout}; expected a number from 0 to below 1")
        self.classifier_dropout = classifier_dropout
        self.calibration = checked_calibration(calibration)
        super().__init__(**kwargs)
        if "classification" in self.heads:
            check_integer("num_labels", self.num_labels, 1)

    @property
    def hidden_size(self) -> int:
        """Width d of the backbone."""
        return self.backbone_config.hidden_size


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
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer {limit}")
