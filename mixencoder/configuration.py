"""Configuration of a MixEncoder: the backbone's configuration, nested, and the fields of the layers on top."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from mixencoder.base.configuration import (
    EncoderConfig,
    check_choice,
    check_integer,
    is_integer,
    is_number,
    list_field,
)

MAX_CONTEXT_EMBEDDINGS = 16
MAX_INTERACTION_LAYERS = 3


class MixEncoderConfig(EncoderConfig):
    """Configuration of `MixEncoderModel` (docs/design.md, section 1). The defaults are the published setting.

    Args:
        backbone_config: configuration of the encoder, as an object or a dictionary with its ``model_type``.
        num_context_embeddings: k, context embeddings of a candidate, 1 to 16.
        interaction_layers: backbone layers whose keys and values the interaction layers read, in order, 1 to 3 of
            them; negative numbers count from the last. A layer may be read twice.
        state_row: carry a state of the query through the interaction layers, updated by a gate; its last value is h.
            False (an ablation of the paper): h is the query's final first-token vector, which takes a full query pass.
        context_update: update the context embeddings in every interaction layer; the mean of the last is e. False (an
            ablation): every interaction layer reads E_0, and e is the mean of E_0. Then state_row must be True.
        heads: which heads the checkpoint has, of "ranking" and "classification"; the first is the default.
        pooling: "codes" (published): learned codes attend to a document's tokens and give its context embeddings; the
            dual term's query vector is the mean of the query's tokens. "first" (an ablation, and for encoders whose
            sentence vector is their first token's): the first token's final vector is both; needs k = 1.
        dual_term: add ``a * cos(mean of the query's tokens, mean of the candidate's context embeddings)`` to the
            ranking score, with learned a, and pass both means to the classification head too. The codes then start
            near zero, so that the candidate starts as the mean of its tokens.
        dual_scale_init: the initial value of a.
        query_adapter_size: hidden units of a residual network on the query's vector of the dual term, which starts as
            the identity: it adapts the dual term while candidates' vectors stay as they are. None: no such network.
        context_norm: Euclidean length to which every context embedding is scaled, so that stored vectors of any length
            serve (`MixEncoder.from_vectors`). None: as the encoder gives them.
        max_query_length, max_document_length: most tokens of a text, special tokens included. None: the backbone's
            number of positions.
        query_truncation_side: "right" keeps the start of a query that is too long; "left" keeps its end, for queries
            that are dialogues.
        classifier_dropout: dropout inside the classification head.
        calibration: {"temperature": above 0, "bias": number}, fitted by `mixencoder calibrate`: the probability that a
            document is right is ``sigmoid(score / temperature + bias)``. None: not fitted.
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
        query_adapter_size: int | None = None,
        context_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_context_embeddings = num_context_embeddings
        self.interaction_layers = list_field("interaction_layers", interaction_layers, "layer numbers, such as [-1]")
        self.state_row = state_row
        self.context_update = context_update
        self.pooling = pooling
        self.query_adapter_size = query_adapter_size
        self.context_norm = context_norm
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
        """`interaction_layers` as numbers from 0."""
        count = self.backbone_config.num_hidden_layers
        return tuple(layer + count if layer < 0 else layer for layer in self.interaction_layers)

    def _check(self) -> None:
        check_integer("num_context_embeddings", self.num_context_embeddings, 1, MAX_CONTEXT_EMBEDDINGS)
        count = self.backbone_config.num_hidden_layers
        layers = self.interaction_layers
        if not 1 <= len(layers) <= MAX_INTERACTION_LAYERS or not all(
            is_integer(layer) and -count <= layer < count for layer in layers
        ):
            raise ValueError(
                f"interaction_layers is {layers}; expected 1 to {MAX_INTERACTION_LAYERS} layer numbers in "
                f"{-count}..{count - 1}, the backbone has {count} layers"
            )
        check_choice("pooling", self.pooling, ("codes", "first"))
        if self.pooling == "first" and self.num_context_embeddings > 1:
            raise ValueError(
                f"pooling is 'first' and num_context_embeddings {self.num_context_embeddings}; the first token gives "
                "one vector, expected num_context_embeddings = 1"
            )
        for name in ("state_row", "context_update", "dual_term"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if not self.state_row and not self.context_update:
            raise ValueError(
                "state_row and context_update are both False; expected at least one, as otherwise query and candidate "
                "do not interact (for that use a dual-encoder)"
            )
        if self.query_adapter_size is not None:
            check_integer("query_adapter_size", self.query_adapter_size, 1)
            if not self.dual_term:
                raise ValueError(
                    f"query_adapter_size is {self.query_adapter_size}, but dual_term is False; the adapter changes the "
                    "dual term's query vector, expected dual_term = True or no adapter"
                )
        if self.context_norm is not None and (not is_number(self.context_norm) or self.context_norm <= 0):
            raise ValueError(f"context_norm is {self.context_norm!r}; expected a positive number or None")
        if not is_number(self.dual_scale_init):
            raise ValueError(f"dual_scale_init is {self.dual_scale_init!r}; expected a finite number")
