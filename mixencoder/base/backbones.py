"""The encoders that can serve as backbone: which, how keys and values are tapped, and where a layer's weights stand.

What differs from one architecture to the next is said in its `Layout`, and nowhere else.

Keys and values are tapped through transformers' attention interface. A registered attention function hands them to a
`KeyValueTap` that travels through the forward pass as a keyword, so that passes in several threads never meet, and then
calls transformers' own SDPA. The mask function is registered under the same name; without it transformers would drop
padding masks silently.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixencoder.errors import UnsupportedBackboneError

TAP_ATTENTION = "mixencoder_tap"
"""Name of the attention implementation that a backbone must use."""

_REASONS = {
    "mpnet": "its attention adds a relative position bias and does not run through transformers' attention interface",
    "deberta": "its disentangled attention does not run through transformers' attention interface",
    "deberta-v2": "its disentangled attention does not run through transformers' attention interface",
}


class LastTapReached(Exception):  # noqa: N818  (control flow, not an error: see KeyValueTap.stop_after_last)
    """Leaves a forward pass once the last wanted layer's keys and values are known."""


class KeyValueTap:
    """Collects keys and values of chosen layers during one forward pass.

    Layers are told apart by counting calls: every layer attends once, in order, and ALBERT's and DistilBERT's modules
    carry no number of their own (ALBERT's layers even share one module).

    Args:
        layers: layer numbers, from 0.
        stop_after_last: raise `LastTapReached` as soon as all are known; the caller of the forward pass catches it.
            The exception and the tap belong to that call alone, so other threads notice nothing.
    """

    def __init__(self, layers: Sequence[int], *, stop_after_last: bool) -> None:
        self._wanted = frozenset(layers)
        self._stop_after_last = stop_after_last
        self._calls = 0
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, key: Tensor, value: Tensor) -> None:
        """Keep key and value (B, H, m, D) of the next layer if wanted, as (B, m, H, D)."""
        layer, self._calls = self._calls, self._calls + 1
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
        key_value_tap.take(key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _mask_where_given(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """As transformers' own, but a mask that is given is kept where it hides nothing.

    Attention with and without a mask rounds differently, and a text's bits must not depend on whether texts beside it
    are as long.
    """
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(TAP_ATTENTION, _tapped_attention)
AttentionMaskInterface.register(TAP_ATTENTION, _mask_where_given)


class LinearWeights(NamedTuple):
    """Weight and bias of a linear layer or a norm; None where the backbone has no bias."""

    weight: Tensor
    bias: Tensor | None


class LayerSettings(NamedTuple):
    """What an interaction layer has in common with the backbone's layers, beside hidden size and heads."""

    intermediate_size: int
    activation: str
    norm_eps: float
    hidden_dropout: float


class Layout:
    """Where an encoder keeps what the model needs: BERT's layout, and what others must override.

    Attributes:
        model_options: keywords of the model's class that leave its pooler out.
        attention_dropout: the configuration's name of it.
        parts: for the modules of an interaction layer, by name, where the layer's module that each starts from stands.
    """

    model_options: Mapping[str, Any] = {"add_pooling_layer": False}
    attention_dropout = "attention_probs_dropout_prob"
    parts: Mapping[str, str] = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    }

    def reason_against(self, config: PreTrainedConfig) -> str | None:
        """Return why an encoder of this configuration cannot be used, or None."""
        return None

    def settings(self, config: PreTrainedConfig) -> LayerSettings:
        """Return the settings that interaction layers share with the backbone."""
        return LayerSettings(
            config.intermediate_size, config.hidden_act, config.layer_norm_eps, config.hidden_dropout_prob
        )

    def first_position(self, config: PreTrainedConfig) -> int:
        """Return the position of a text's first token."""
        return 0

    def layers(self, backbone: Any) -> list[nn.Module]:
        """Return the encoder's layers in the order in which they run."""
        return list(backbone.encoder.layer)

    def start_weights(self, layer: Any) -> dict[str, LinearWeights]:
        """Return what an interaction layer starts from, by the name of its module; the rest starts fresh."""
        modules: dict[str, Any] = {name: layer.get_submodule(part) for name, part in self.parts.items()}
        return {name: LinearWeights(module.weight, module.bias) for name, module in modules.items()}


class _RobertaLayout(Layout):
    """Positions are numbered from behind the padding index."""

    def first_position(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1


class _ElectraLayout(Layout):
    """Has no pooler. The projection of narrower embeddings belongs to its forward pass."""

    model_options: Mapping[str, Any] = {}


class _DistilBertLayout(Layout):
    """Other names everywhere, no pooler, and norms whose epsilon is written into the model."""

    model_options: Mapping[str, Any] = {}
    attention_dropout = "attention_dropout"
    parts: Mapping[str, str] = {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "intermediate": "ffn.lin1",
        "output": "ffn.lin2",
        "output_norm": "output_layer_norm",
    }

    def settings(self, config: PreTrainedConfig) -> LayerSettings:
        return LayerSettings(config.hidden_dim, config.activation, 1e-12, config.dropout)

    def layers(self, backbone: Any) -> list[nn.Module]:
        return list(backbone.transformer.layer)


class _AlbertLayout(Layout):
    """Layers share weights by groups; interaction layers that read one group start as equals and then part."""

    parts: Mapping[str, str] = {
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "attention_output": "attention.dense",
        "attention_norm": "attention.LayerNorm",
        "intermediate": "ffn",
        "output": "ffn_output",
        "output_norm": "full_layer_layer_norm",
    }

    def reason_against(self, config: PreTrainedConfig) -> str | None:
        if config.inner_group_num == 1:
            return None
        return f"its layers attend {config.inner_group_num} times each (inner_group_num), so no keys are a layer's own"

    def layers(self, backbone: Any) -> list[nn.Module]:
        groups, count = backbone.encoder.albert_layer_groups, backbone.config.num_hidden_layers
        # transformers' own rule, rounding included: which group runs as a layer
        numbers = [int(layer / (count / len(groups))) for layer in range(count)]
        return [groups[number].albert_layers[0] for number in numbers]


class _ModernBertLayout(Layout):
    """Pre-norm with a gated FFN: lends its attention weights alone; an interaction layer's norms and FFN start fresh.

    Its keys arrive rotated and are used so: candidates stand at position 0, where the rotation is none.
    """

    model_options: Mapping[str, Any] = {}
    # transformers drops W_o's output by the same number
    attention_dropout = "attention_dropout"

    def settings(self, config: PreTrainedConfig) -> LayerSettings:
        return LayerSettings(config.intermediate_size, config.hidden_activation, config.norm_eps, config.mlp_dropout)

    def layers(self, backbone: Any) -> list[nn.Module]:
        return list(backbone.layers)

    def start_weights(self, layer: Any) -> dict[str, LinearWeights]:
        packed, output = layer.attn.Wqkv, layer.attn.Wo
        biases = (None, None, None) if packed.bias is None else packed.bias.chunk(3)
        parts = zip(("query", "key", "value"), packed.weight.chunk(3), biases, strict=True)
        weights = {name: LinearWeights(weight, bias) for name, weight, bias in parts}
        return {**weights, "attention_output": LinearWeights(output.weight, output.bias)}


_LAYOUTS: Mapping[str, Layout] = {
    "bert": Layout(),
    "roberta": _RobertaLayout(),
    "xlm-roberta": _RobertaLayout(),
    "electra": _ElectraLayout(),
    "distilbert": _DistilBertLayout(),
    "albert": _AlbertLayout(),
    "modernbert": _ModernBertLayout(),
}

SUPPORTED = tuple(_LAYOUTS)
"""Model types that are proven to work, by tests that compare tapped keys and values with those computed by hand."""


def layout_of(config: PreTrainedConfig) -> Layout:
    """Return the layout of an encoder that can serve as backbone.

    Raises:
        UnsupportedBackboneError: it cannot; with the model type found, the reason, and the supported ones.
    """
    found = config.model_type
    if found in _LAYOUTS:
        reason = _LAYOUTS[found].reason_against(config)
    else:
        reason = _REASONS.get(found, "its keys and values have not been shown to be tapped correctly")
    if reason is not None:
        raise UnsupportedBackboneError(
            f'a backbone of model type "{found}" is not supported: {reason}. Supported: {", ".join(SUPPORTED)}'
        )
    return _LAYOUTS[found]


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder without pooler and with fresh weights, its attention tappable.

    Raises:
        UnsupportedBackboneError: the encoder cannot serve as backbone.
    """
    layout = layout_of(config)
    # probabilities are never dropped: candidates and queries must meet the same attention (docs/design.md, section 1)
    setattr(config, layout.attention_dropout, 0.0)
    return AutoModel.from_config(
        config, attn_implementation=TAP_ATTENTION, trust_remote_code=False, **layout.model_options
    )


def encoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """Return the backbone's layers in the order in which they run; ALBERT's share modules."""
    return layout_of(backbone.config).layers(backbone)


def start_weights(backbone: PreTrainedModel, layer: int) -> dict[str, LinearWeights]:
    """Return what an interaction layer that reads encoder layer `layer` (from 0) starts from, by module name."""
    layout = layout_of(backbone.config)
    return layout.start_weights(layout.layers(backbone)[layer])


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, and leave its buffers: ModernBERT's frequencies of rotation stay float32.

    ``model.to(dtype)`` would round them, which turns far tokens by a wrong angle; loading leaves them too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def max_positions(config: PreTrainedConfig) -> int:
    """Tokens that the backbone has positions for."""
    return config.max_position_embeddings - layout_of(config).first_position(config)
