"""What the peers' torch modules have in common: the backbone, heads, pooling, and the forward that a trainer calls."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mixencoder.backbones import build_backbone
from mixencoder.chunking import in_chunks
from mixencoder.configuration import EncoderConfig
from mixencoder.modeling import HeadedModel, RankingScores


class Batch(NamedTuple):
    """Texts as the backbone reads them, both tensors (B, n)."""

    ids: Tensor
    mask: Tensor


class TokenStates(NamedTuple):
    """A vector for every token of padded texts."""

    vectors: Tensor
    """(..., n, d)."""
    mask: Tensor
    """(..., n) bool, true for tokens."""

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "TokenStates":
        """Split a leading dimension of both tensors, as `torch.Tensor.unflatten` does."""
        return TokenStates(self.vectors.unflatten(dim, sizes), self.mask.unflatten(dim, sizes))


class PairClassifier(nn.Module):
    """``MLP([u ; v ; |u-v|])``, 3d -> 3d -> labels."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(3 * width, 3 * width)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(3 * width, config.num_classes)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """Logits (..., num_labels), at least float32, from vectors (..., d) that broadcast against each other."""
        u, v = torch.broadcast_tensors(u, v)
        hidden = F.relu(self.dense(torch.cat([u, v, (u - v).abs()], dim=-1)))
        return at_least_float32(self.out_proj(self.dropout(hidden)))


class FirstTokenHeads(nn.Module):
    """Linear heads on a vector (..., d) that has seen query and document: a score, class logits, or both."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout)
        sizes = {"ranking": 1, "classification": config.num_classes}
        self.heads = nn.ModuleDict({head: nn.Linear(config.hidden_size, sizes[head]) for head in config.heads})

    def forward(self, first: Tensor, head: str) -> Tensor:
        """Return scores (...) or logits (..., num_labels), at least float32."""
        out = at_least_float32(self.heads[head](self.dropout(first)))
        return out.squeeze(-1) if head == "ranking" else out


class PeerModel(HeadedModel):
    """A backbone and what a peer puts on top of it.

    ``forward`` is what a trainer calls, with the arguments and results of `MixEncoderModel.forward`. For ranking and
    classifying texts use the front doors of `mixencoder.peers`.
    """

    config_class = EncoderConfig
    base_model_prefix = "peer"
    _supports_sdpa = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what is not loaded: normal weights as in BERT."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.backbone_config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @property
    def _knows_segments(self) -> bool:
        """Whether the backbone tells a pair's second text from its first by token types."""
        return getattr(self.config.backbone_config, "type_vocab_size", 0) > 1

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        document_input_ids: Tensor,
        document_attention_mask: Tensor,
        candidates_per_query: int | None = None,
        head: str | None = None,
        mini_batch_size: int | None = None,
    ) -> RankingScores | Tensor:
        """Score queries (B, m) against documents (N, n), token ids of single texts padded on the right.

        Without candidates_per_query every query meets every document, (B, N). With it the documents are those of the
        queries in turn, N = B * candidates_per_query, and the result is (B, candidates_per_query). Ranking scores come
        as `RankingScores` (``full``), class logits with a last dimension num_labels. With mini_batch_size so many
        texts (for a cross-encoder: pairs) are encoded at once, and their activations again on the way back
        (`mixencoder.chunking`).

        Raises:
            InputError: the model has no such head.
        """
        query = Batch(query_input_ids, query_attention_mask)
        document = Batch(document_input_ids, document_attention_mask)
        return self._score_batch(query, document, candidates_per_query, self.check_head(head), mini_batch_size)

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        """Do what `forward` promises."""
        raise NotImplementedError


class TwoTowerModel(PeerModel):
    """A peer that encodes queries and documents apart: it has `encode_query`, `encode_document` and `interact`."""

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode queries (B, m), padded on the right; attention_mask is None when there is no padding."""
        raise NotImplementedError

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode documents (N, n), padded on the right; attention_mask is None when there is no padding."""
        raise NotImplementedError

    def interact(self, query_state: Any, candidates: Any, head: str | None = None) -> RankingScores | Tensor:
        """Score encoded candidates, N that all B queries meet or (B, N) of each query's own.

        Returns the ranking scores, ``full`` of which is (B, N), or class logits (B, N, num_labels); at least float32.

        Raises:
            InputError: the model has no such head.
        """
        raise NotImplementedError

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        query_state = in_chunks(self.encode_query, query, mini_batch_size)
        candidates = in_chunks(self.encode_document, document, mini_batch_size)
        if candidates_per_query is not None:
            candidates = candidates.unflatten(0, (-1, candidates_per_query))
        return self.interact(query_state, candidates, head)

    def _tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final token vectors (B, n, d)."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, in which scores are never computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(tokens: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector (B, d) of token vectors (B, n, d): the mean over tokens, or the first."""
    if how == "first":
        return tokens[:, 0]
    if attention_mask is None:
        return tokens.mean(dim=1)
    weights = attention_mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)


def token_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask (B, n) as bool, also where there is no padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()
