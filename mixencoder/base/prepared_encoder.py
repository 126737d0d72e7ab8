"""A backbone's layers prepared for inference on a CPU: the same computation with arranged weights and fewer calls.

A query has few tokens, and then a pass of the backbone is mostly overhead: modules, masks that are made again in every
layer, three products where one is enough, weights that are rearranged in every call. `PreparedEncoder` runs layers that
are built as BERT's: attention, residual and norm, FFN, residual and norm. Other backbones, and those that someone
changed (hooks, replaced modules), run as they are.

`mixencoder.base.modeling` uses it in calls of an engine only; results differ from the backbone's own by rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from mixencoder.base.backbones import TAP_ATTENTION, KeyValueTap, Layout, layout_of
from mixencoder.base.linears import Norm, arranged_linear, can_pack


class PreparedEncoder:
    """A backbone's embeddings, and its layers with copies of their weights.

    Args:
        backbone: in evaluation mode, one that `prepare` accepts.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        layout = layout_of(backbone.config)
        self._backbone, self._embed = backbone, layout.embed
        heads = backbone.config.num_attention_heads
        self._layers = [_PreparedLayer(layer, layout, heads) for layer in layout.layers(backbone)]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, tap: KeyValueTap | None = None, **inputs: Tensor
    ) -> Tensor:
        """Return the final token vectors (B, n, d).

        Args:
            input_ids: (B, n).
            attention_mask: (B, n), 1 for tokens; None if there is no padding.
            tap: takes the keys and values of every layer.
            inputs: further inputs of the embeddings (token_type_ids).

        Raises:
            LastTapReached: tap has all that it wants.
        """
        hidden = self._embed(self._backbone, input_ids, **inputs)
        mask = None
        if attention_mask is not None:
            n = input_ids.shape[1]
            mask = torch.zeros(attention_mask.shape, dtype=hidden.dtype, device=hidden.device)
            mask = mask.masked_fill_(attention_mask == 0, -math.inf)[:, None, None].expand(-1, 1, n, n)
        rows = hidden.flatten(0, 1)
        for layer in self._layers:
            rows = layer(rows, hidden.shape, mask, tap)
        return rows.view(hidden.shape)


class _PreparedLayer:
    """One layer: ``x = LN(x + W_o attention(x)); x = LN(x + FFN(x))``."""

    def __init__(self, layer: nn.Module, layout: Layout, heads: int) -> None:
        parts: dict[str, Any] = {name: layer.get_submodule(path) for name, path in layout.parts.items()}
        self._heads = heads
        projections = [parts[name] for name in ("query", "key", "value")]
        self.projection = arranged_linear(
            torch.cat([linear.weight for linear in projections]), torch.cat([linear.bias for linear in projections])
        )
        self.attention_output, self.intermediate, self.output = (
            arranged_linear(parts[name].weight, parts[name].bias)
            for name in ("attention_output", "intermediate", "output")
        )
        self._attention_norm, self._output_norm = (
            Norm(parts[name].weight, parts[name].bias, parts[name].eps) for name in ("attention_norm", "output_norm")
        )
        self._activation: Callable[[Tensor], Tensor] = layout.activation(layer)

    def __call__(self, rows: Tensor, shape: torch.Size, mask: Tensor | None, tap: KeyValueTap | None) -> Tensor:
        """Rows (B * n, d) of token vectors in the shape (B, n, d); mask (B, 1, n, n) is added to the logits."""
        batch, n, d = shape
        projected = self.projection(rows).view(batch, n, 3, self._heads, -1)
        # (B, H, n, D) each
        query, key, value = (projected[:, :, part].transpose(1, 2) for part in range(3))
        if tap is not None:
            # copies, as views would keep all three in memory
            tap.take(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value)))
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        attended = attended.transpose(1, 2).reshape(batch * n, d)
        rows = self._attention_norm(self.attention_output(attended, rows))
        return self._output_norm(self.output(self._activation(self.intermediate(rows)), rows))


def prepare(backbone: PreTrainedModel) -> PreparedEncoder | None:
    """Return a backbone prepared for inference, or None if its layers, dtype or device are not supported."""
    layout, dtype, config = layout_of(backbone.config), backbone.dtype, backbone.config
    if backbone.device.type != "cpu" or not (dtype == torch.float32 or can_pack(dtype, backbone.device)):
        return None
    layers = layout.layers(backbone)
    if any(type(layer).__name__ not in layout.prepared_layers for layer in layers):
        return None
    if config._attn_implementation != TAP_ATTENTION or getattr(config, "is_decoder", False):
        return None
    if getattr(config, "chunk_size_feed_forward", 0):
        return None
    for layer in layers:
        for name, path in layout.parts.items():
            part: Any = layer.get_submodule(path)
            # exact types: a quantised or adapted layer is a subclass or another class
            kind = nn.LayerNorm if name.endswith("_norm") else nn.Linear
            if type(part) is not kind or part.bias is None or part.weight.dtype != dtype:
                return None
    return PreparedEncoder(backbone)


def is_untouched(backbone: nn.Module) -> bool:
    """Whether no module has a hook or a `forward` of its own, which a prepared encoder would not call.

    Cheap, as every call of an engine asks for it.
    """
    if torch_module._has_any_global_hook():
        return False
    modules: list[nn.Module | None] = [backbone]
    for module in modules:
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
        modules += module._modules.values()
    return True
