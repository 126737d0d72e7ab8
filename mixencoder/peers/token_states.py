"""Parts that several peers' torch modules share: states of tokens, and heads on the first token."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mixencoder.base.configuration import EncoderConfig
from mixencoder.base.modeling import at_least_float32


class TokenStates(NamedTuple):
    """A vector for every token of padded texts."""

    vectors: Tensor
    """(..., n, d)."""
    mask: Tensor
    """(..., n) bool, true for tokens."""

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "TokenStates":
        """Split a leading dimension of both tensors, as `torch.Tensor.unflatten` does."""
        return TokenStates(self.vectors.unflatten(dim, sizes), self.mask.unflatten(dim, sizes))


class FirstTokenHeads(nn.Module):
    """Linear heads on a vector (..., d) that depends on query and document: for a score, class logits, or both."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout)
        sizes = {"ranking": 1, "classification": config.num_classes}
        self.heads = nn.ModuleDict({head: nn.Linear(config.hidden_size, sizes[head]) for head in config.heads})

    def forward(self, first: Tensor, head: str) -> Tensor:
        """Return scores (...) or logits (..., num_labels), at least float32."""
        out = at_least_float32(self.heads[head](self.dropout(first)))
        return out.squeeze(-1) if head == "ranking" else out


def token_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the mask (B, n) as bool; None means that there is no padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def has_token_types(config: EncoderConfig) -> bool:
    """Whether the backbone has several token types, which tell the second text of a pair from the first."""
    return getattr(config.backbone_config, "type_vocab_size", 0) > 1
