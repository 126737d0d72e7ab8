"""The encoders that can serve as backbone, how their keys and values are tapped, and where their layers' weights are.

All differences between the encoders are in their `Layout`.

Keys and values are tapped through transformers' attention interface: a registered attention function passes them to a
`KeyValueTap`, and then calls transformers' own SDPA. The tap is a keyword argument of the forward pass, so concurrent
passes in several threads do not share it. A mask function is registered under the same name; without it transformers
would silently drop padding masks.
"""

from collections.abc import Callable, Mapping, Sequence
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

    A layer's number is the count of attention calls before it: every layer attends once, in order. Modules of ALBERT
    and DistilBERT do not know their layer's number, and ALBERT's layers even share modules.

    Args:
        layers: layer numbers, from 0.
        stop_after_last: raise `LastTapReached` as soon as all are known; the caller of the forward pass catches it.
            Other threads are not affected.
    """

    def __init__(self, layers: Sequence[int], *, stop_after_last: bool) -> None:
        self._wanted = frozenset(layers)
        self._stop_after_last = stop_after_last
        self._calls = 0
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, key: Tensor, value: Tensor) -> None:
        """Count a layer's call; if the layer is wanted, keep its key and value (B, H, m, D) as (B, m, H, D)."""
        layer, self._calls = self._calls, self._calls + 1
        if layer in self._wanted:
            self._taken[layer] = (key.transpose(1, 2), value.transpose(1, 2))
            if self._stop_after_last and len(self._taken) == len(self._wanted):
                raise LastTapReached

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return key and value (B, m, H, D) of a tapped layer."""
        if layer not in self._taken:
            raise UnsupportedBackboneError(
                f"no keys and values came from layer {layer}; the backbone must use attn_implementation="
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
    if not _slow_backward(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    with torch.autocast("cpu", enabled=False):
        attended, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return attended.to(query.dtype), weights


def _slow_backward(query: Tensor) -> bool:
    """Whether the backward pass is faster in float32: in bfloat16, PyTorch takes several times as long on a CPU."""
    trained = torch.is_grad_enabled() and query.requires_grad
    return trained and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _mask_kept(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """As transformers' `sdpa_mask`, but keep a given mask that masks nothing; transformers would drop it.

    Attention with and without a mask rounds differently, and a text's bits must not depend on the length of other texts
    in the batch.
    """
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(TAP_ATTENTION, _tapped_attention)
AttentionMaskInterface.register(TAP_ATTENTION, _mask_kept)


class LinearWeights(NamedTuple):
    """Weight and bias of a linear layer or a norm; None where the backbone has no bias."""

    weight: Tensor
    bias: Tensor | None


class LayerSettings(NamedTuple):
    """Settings that interaction layers take from the backbone, besides hidden size and number of attention heads."""

    intermediate_size: int
    activation: str
    norm_eps: float
    hidden_dropout: float


class Layout:
    """Where an encoder keeps its settings, layers and weights: as in BERT, unless a subclass overrides it.

    Attributes:
        model_options: arguments for the encoder's class, to build it without its pooler.
        attention_dropout: name of the configuration's field for dropout of attention weights.
        parts: from each module of an interaction layer to the backbone layer's module that it starts as a copy of.
        prepared_layers: names of the classes of layers that are built as BERT's, of these parts alone
            (`mixencoder.base.prepared_encoder`).
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
    prepared_layers: tuple[str, ...] = ("BertLayer",)

    def embed(self, backbone: Any, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Return what the first layer reads, (B, n, d); inputs are further inputs of the embeddings."""
        return backbone.embeddings(input_ids=input_ids, **inputs)

    def activation(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """Return the activation of a layer's FFN."""
        return layer.intermediate.intermediate_act_fn

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
        """Return the weights that an interaction layer starts from, by module name; its other modules start random."""
        modules: dict[str, Any] = {name: layer.get_submodule(part) for name, part in self.parts.items()}
        return {name: LinearWeights(module.weight, module.bias) for name, module in modules.items()}


class _RobertaLayout(Layout):
    """RoBERTa and XLM-R: positions start after the padding index."""

    prepared_layers = ("RobertaLayer", "XLMRobertaLayer")

    def first_position(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1


class _ElectraLayout(Layout):
    """ELECTRA: no pooler. Its forward pass includes the projection of narrower embeddings."""

    model_options: Mapping[str, Any] = {}
    prepared_layers = ("ElectraLayer",)

    def embed(self, backbone: Any, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        embedded = super().embed(backbone, input_ids, **inputs)
        return backbone.embeddings_project(embedded) if hasattr(backbone, "embeddings_project") else embedded


class _DistilBertLayout(Layout):
    """DistilBERT: other names, no pooler, and a constant epsilon in its norms."""

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
    prepared_layers = ("TransformerBlock",)

    def activation(self, layer: Any) -> Callable[[Tensor], Tensor]:
        return layer.ffn.activation

    def settings(self, config: PreTrainedConfig) -> LayerSettings:
        return LayerSettings(config.hidden_dim, config.activation, 1e-12, config.dropout)

    def layers(self, backbone: Any) -> list[nn.Module]:
        return list(backbone.transformer.layer)


class _AlbertLayout(Layout):
    """ALBERT: layers share weights by groups. Interaction layers that read one group start equal, but share nothing."""

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
    prepared_layers = ()

    def reason_against(self, config: PreTrainedConfig) -> str | None:
        if config.inner_group_num == 1:
            return None
        return f"its layers attend {config.inner_group_num} times each (inner_group_num), so a layer has no single keys"

    def layers(self, backbone: Any) -> list[nn.Module]:
        groups, count = backbone.encoder.albert_layer_groups, backbone.config.num_hidden_layers
        # the group of each layer, computed as in transformers, rounding included
        numbers = [int(layer / (count / len(groups))) for layer in range(count)]
        return [groups[number].albert_layers[0] for number in numbers]


class _ModernBertLayout(Layout):
    """ModernBERT: pre-norm with a gated FFN. Only its attention weights are copied; norms and FFN start random.

    Its keys are tapped after rotation by position. Candidates have position 0, at which nothing is rotated.
    """

    model_options: Mapping[str, Any] = {}
    # transformers uses this field for the dropout after W_o, too
    attention_dropout = "attention_dropout"
    prepared_layers = ()

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
"""Model types that work, as tests show that compare tapped keys and values with those computed by hand."""


def layout_of(config: PreTrainedConfig) -> Layout:
    """Return the layout of an encoder that can serve as backbone.

    Raises:
        UnsupportedBackboneError: the encoder cannot; the message gives its model type, the reason and the supported
            types.
    """
    found = config.model_type
    if found in _LAYOUTS:
        reason = _LAYOUTS[found].reason_against(config)
    else:
        reason = _REASONS.get(found, "no test has shown that its keys and values are tapped correctly")
    if reason is not None:
        raise UnsupportedBackboneError(
            f'a backbone of model type "{found}" is not supported: {reason}. Supported: {", ".join(SUPPORTED)}'
        )
    return _LAYOUTS[found]


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an encoder with random weights, without pooler, whose keys and values can be tapped.

    Raises:
        UnsupportedBackboneError: the encoder cannot serve as backbone.
    """
    layout = layout_of(config)
    # attention weights are never dropped, as in the interaction layers (docs/design.md, section 1)
    setattr(config, layout.attention_dropout, 0.0)
    return AutoModel.from_config(
        config, attn_implementation=TAP_ATTENTION, trust_remote_code=False, **layout.model_options
    )


def encoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """Return the backbone's layers in the order in which they run; ALBERT's share modules."""
    return layout_of(backbone.config).layers(backbone)


def start_weights(backbone: PreTrainedModel, layer: int) -> dict[str, LinearWeights]:
    """Return the weights that an interaction layer on backbone layer `layer` (from 0) starts from, by module name."""
    layout = layout_of(backbone.config)
    return layout.start_weights(layout.layers(backbone)[layer])


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, but not its buffers: ModernBERT's rotation frequencies must stay float32.

    ``model.to(dtype)`` would round them and rotate distant tokens by wrong angles. Loading keeps them in float32, too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def max_positions(config: PreTrainedConfig) -> int:
    """Return the number of tokens that the backbone has positions for."""
    return config.max_position_embeddings - layout_of(config).first_position(config)
