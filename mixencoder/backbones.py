"""The encoders that can serve as backbone: which, how keys and values are tapped, and where a layer's weights stand.

Keys and values are tapped through transformers' attention interface. A registered attention function hands them to a
`KeyValueTap` that travels through the forward pass as a keyword, so that passes in several threads never meet, and then
calls transformers' own SDPA. The mask function is registered under the same name; without it transformers would drop
padding masks silently.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixencoder.errors import UnsupportedBackboneError

TAP_ATTENTION = "mixencoder_tap"
"""Name of the attention implementation that a backbone must use."""

SUPPORTED = ("bert", "roberta", "xlm-roberta")
"""Model types that are proven to work, by tests that compare tapped keys and values with those computed by hand."""

_REASONS = {
    "mpnet": "its attention adds a relative position bias and does not run through transformers' attention interface",
    "deberta": "its disentangled attention does not run through transformers' attention interface",
    "deberta-v2": "its disentangled attention does not run through transformers' attention interface",
}


class LastTapReached(Exception):  # noqa: N818  (control flow, not an error: see KeyValueTap.stop_after_last)
    """Leaves a forward pass once the last wanted layer's keys and values are known."""


class KeyValueTap:
    """Collects keys and values of chosen layers during one forward pass.

    Args:
        layers: layer numbers, from 0.
        stop_after_last: raise `LastTapReached` as soon as all are known; the caller of the forward pass catches it.
            The exception and the tap belong to that call alone, so other threads notice nothing.
    """

    def __init__(self, layers: Sequence[int], *, stop_after_last: bool) -> None:
        self._wanted = frozenset(layers)
        self._stop_after_last = stop_after_last
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep key and value (B, H, m, D) of a layer if wanted, as (B, m, H, D)."""
        if layer in self._wanted:
            self._taken[layer] = (key.transpose(1, 2), value.transpose(1, 2))
            if self._stop_after_last and len(self._taken) == len(self._wanted):
                raise LastTapReached

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value (B, m, H, D) of a tapped layer."""
        if layer not in self._taken:
            raise UnsupportedBackboneError(
                f"layer {layer} handed out no keys and values; the backbone must use attn_implementation="
                f'"{TAP_ATTENTION}" (was it changed by set_attn_implementation?)'
            )
        return self._taken[layer]


def _tapped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    key_value_tap: KeyValueTap | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if key_value_tap is not None:
        key_value_tap.take(module.layer_idx, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(TAP_ATTENTION, _tapped_attention)
AttentionMaskInterface.register(TAP_ATTENTION, sdpa_mask)


class LayerWeights(NamedTuple):
    """The modules of one encoder layer from which an interaction layer starts."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    output: nn.Linear
    output_norm: nn.LayerNorm


def check_backbone(config: PreTrainedConfig) -> None:
    """Refuse an encoder that cannot serve as backbone.

    Raises:
        UnsupportedBackboneError: with the model type found, the reason, and the supported ones.
    """
    if config.model_type in SUPPORTED:
        return
    reason = _REASONS.get(config.model_type, "its keys and values have not been shown to be tapped correctly")
    raise UnsupportedBackboneError(
        f'a backbone of model type "{config.model_type}" is not supported: {reason}. Supported: {", ".join(SUPPORTED)}'
    )


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder without pooler and with fresh weights, its attention tappable.

    Raises:
        UnsupportedBackboneError: the model type is not supported.
    """
    check_backbone(config)
    # probabilities are never dropped: candidates and queries must meet the same attention (docs/design.md, section 1)
    config.attention_probs_dropout_prob = 0.0
    return AutoModel.from_config(config, attn_implementation=TAP_ATTENTION, add_pooling_layer=False)


def layer_weights(backbone: PreTrainedModel, layer: int) -> LayerWeights:
    """Return the modules of encoder layer `layer` (from 0)."""
    block = backbone.encoder.layer[layer]
    attention = block.attention
    return LayerWeights(
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        attention_output=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        intermediate=block.intermediate.dense,
        output=block.output.dense,
        output_norm=block.output.LayerNorm,
    )


def max_positions(config: PreTrainedConfig) -> int:
    """Tokens that the backbone has positions for; RoBERTa's numbering starts after the padding index."""
    offset = 0 if config.model_type == "bert" else config.pad_token_id + 1
    return config.max_position_embeddings - offset
