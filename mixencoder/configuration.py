"""Configurations: the backbone's own, nested, and what stands on top of it.

`EncoderConfig` is what all architectures have in common, `MixEncoderConfig` a MixEncoder's; each peer's own fields
stand in its module.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

HEADS = ("ranking", "classification")
MAX_CONTEXT_EMBEDDINGS = 16
MAX_INTERACTION_LAYERS = 3
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
        self.heads = as_list("heads", [heads] if isinstance(heads, str) else heads, f"names of {', '.join(HEADS)}")
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
        if not _is_number(classifier_dropout) or not 0 <= classifier_dropout < 1:
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


class MixEncoderConfig(EncoderConfig):
    """Configuration of `MixEncoderModel` (docs/design.md, section 1). The defaults are the published setting.

    Args:
        backbone_config: configuration of the encoder, as an object or a dictionary with its ``model_type``.
        num_context_embeddings: k, context embeddings a candidate, 1 to 16.
        interaction_layers: backbone layers whose keys and values the interaction layers read, in order, 1 to 3 of
            them; negative numbers count from the last. A layer may be read twice.
        state_row: let a state of the query be gated through the interaction layers; its last value is h. False (an
            ablation of the paper): h is the query's final first-token vector, which takes a full query pass.
        context_update: update the context embeddings in every interaction layer; the mean of the last is e. False (an
            ablation): e is the mean of E_0, and every interaction layer meets E_0. At least one of the two stays.
        heads: which heads the checkpoint has, of "ranking" and "classification"; the first is the default.
        pooling: "codes" (published): context embeddings are what learned codes attend to, and the dual term's query
            vector is the mean of its tokens. "first" (an ablation, and for encoders whose sentence vector is their
            first token's): the first token's final vector is both; it takes k = 1.
        dual_term: add ``a * cos(mean of the query's tokens, mean of the candidate's context embeddings)`` to the
            ranking score, with learned a, and show both means to the classification head. The codes then start near
            zero, so that the candidate starts as the mean of its tokens.
        dual_scale_init: a at the start.
        max_query_length, max_document_length: tokens read of a text, special tokens included. None: all that the
            backbone has positions for.
        query_truncation_side: "right" keeps the start of a query that is too long; "left" keeps its end, for queries
            that are dialogues.
        classifier_dropout: dropout inside the classification head.
        calibration: {"temperature": above 0, "bias": number} of `mixencoder calibrate`: the probability that a document
            is right is ``sigmoid(score / temperature + bias)``. None: not fitted.
        num_labels, id2label, label2id: classes of the classification head, as in every transformers configuration.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder"

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_context_embeddings: int = 1,
        interaction_layers: Sequence[int] = (-1,),
        state_row: bool = True,
        context_update: bool = True,
        heads: Sequence[str] = ("ranking",),
        dual_term: bool = False,
        dual_scale_init: float = 20.0,
        max_query_length: int | None = None,
        max_document_length: int | None = None,
        query_truncation_side: str = "right",
        classifier_dropout: float = 0.1,
        calibration: Mapping[str, float] | None = None,
        pooling: str = "codes",
        **kwargs: Any,
    ) -> None:
        self.num_context_embeddings = num_context_embeddings
        self.interaction_layers = as_list("interaction_layers", interaction_layers, "layer numbers, such as [-1]")
        self.state_row = state_row
        self.context_update = context_update
        self.pooling = pooling
        self.dual_term = dual_term
        self.dual_scale_init = dual_scale_init
        super().__init__(
            backbone_config,
            heads,
            max_query_length,
            max_document_length,
            query_truncation_side,
            classifier_dropout,
            calibration,
            **kwargs,
        )
        self._check()

    @property
    def interaction_layer_indices(self) -> tuple[int, ...]:
        """The tapped backbone layers as numbers from 0."""
        count = self.backbone_config.num_hidden_layers
        return tuple(layer + count if layer < 0 else layer for layer in self.interaction_layers)

    def _check(self) -> None:
        check_integer("num_context_embeddings", self.num_context_embeddings, 1, MAX_CONTEXT_EMBEDDINGS)
        count = self.backbone_config.num_hidden_layers
        layers = self.interaction_layers
        if not 1 <= len(layers) <= MAX_INTERACTION_LAYERS or not all(
            _is_integer(layer) and -count <= layer < count for layer in layers
        ):
            raise ValueError(
                f"interaction_layers is {layers}; expected 1 to {MAX_INTERACTION_LAYERS} layer numbers in "
                f"{-count}..{count - 1}, the backbone has {count} layers"
            )
        check_choice("pooling", self.pooling, ("codes", "first"))
        if self.pooling == "first" and self.num_context_embeddings > 1:
            raise ValueError(
                f"pooling is 'first' and num_context_embeddings {self.num_context_embeddings}; a first token is one "
                "vector, expected num_context_embeddings = 1"
            )
        for name in ("state_row", "context_update", "dual_term"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if not self.state_row and not self.context_update:
            raise ValueError(
                "state_row and context_update are both False; expected at least one, or query and candidate never meet "
                "(that is a dual-encoder)"
            )
        if not _is_number(self.dual_scale_init):
            raise ValueError(f"dual_scale_init is {self.dual_scale_init!r}; expected a finite number")


def checked_calibration(value: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return a calibration as a configuration holds it.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return None
    fields = dict(value) if isinstance(value, Mapping) else {}
    if (
        set(fields) != {"temperature", "bias"}
        or not all(map(_is_number, fields.values()))
        or fields["temperature"] <= 0
    ):
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
    if not _is_integer(value) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer {limit}")


def as_list(name: str, values: Sequence[Any], expected: str) -> list[Any]:
    """Return a sequence that is no string as a list.

    Raises:
        ValueError: it is none.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; expected a list of {expected}")
    return list(values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
