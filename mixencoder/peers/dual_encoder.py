"""Dual-encoder: query and document are one vector each, compared by cosine or dot product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from mixencoder.base.configuration import EncoderConfig, check_choice
from mixencoder.base.modeling import PairClassifier, RankingScores, TwoTowerModel, at_least_float32, pool
from mixencoder.peers.base import VectorPeer


class DualEncoderConfig(EncoderConfig):
    """Configuration of `DualEncoderModel`.

    Args:
        pooling: "mean" over tokens, or the "first" token.
        similarity: "cosine", times a learned scale, or "dot".
        scale_init: the scale at the start.
        kwargs: fields of `EncoderConfig`.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder-dual-encoder"

    def __init__(
        self,
        backbone_config: Any = None,
        pooling: str = "mean",
        similarity: str = "cosine",
        scale_init: float = 20.0,
        **kwargs: Any,
    ) -> None:
        check_choice("pooling", pooling, ("mean", "first"))
        check_choice("similarity", similarity, ("cosine", "dot"))
        self.pooling = pooling
        self.similarity = similarity
        self.scale_init = scale_init
        super().__init__(backbone_config, **kwargs)


class DualEncoderModel(TwoTowerModel):
    """``a * cos(q, c)`` or ``q . c`` for ranking, ``MLP([q ; c ; |q-c|])`` for classification."""

    config_class = DualEncoderConfig

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        has_scale = config.similarity == "cosine" and "ranking" in config.heads
        self.scale = nn.Parameter(torch.tensor(float(config.scale_init))) if has_scale else None
        self.classifier = PairClassifier(config.hidden_size, config) if "classification" in config.heads else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.scale is not None:
            init.constant_(self.scale, self.config.scale_init)

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode queries (B, m) into vectors (B, d)."""
        return pool(self.run_backbone(input_ids, attention_mask), attention_mask, self.config.pooling)

    encode_document = encode_query

    def interact(self, query_state: Tensor, candidates: Tensor, head: str | None = None) -> RankingScores | Tensor:
        """Score candidates (N, d), or (B, N, d), for queries (B, d); results as in `TwoTowerModel.interact`."""
        if self.check_head(head) == "classification":
            assert self.classifier is not None, "check_head has found this head"
            return self.classifier((query_state.unsqueeze(1), candidates))
        query, candidate = at_least_float32(query_state), at_least_float32(candidates)
        if self.scale is not None:
            query = self.scale.to(query.dtype) * F.normalize(query, dim=-1)
        if candidate.dim() == 2:
            scores = torch.matmul(candidate, query.T).T
        else:
            scores = (candidate * query.unsqueeze(1)).sum(dim=-1)
        if self.scale is not None:
            # cheaper than normalising N candidates
            scores = scores / candidate.norm(dim=-1).clamp_min(1e-12)
        return RankingScores(scores, None)


class DualEncoder(VectorPeer):
    """Dual-encoder: a query and a document are one vector (d) each; documents are encoded ahead of time.

    Configuration: `DualEncoderConfig`.

    Example:
        >>> model = DualEncoder.from_backbone("sentence-transformers/all-MiniLM-L6-v2")
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': 0, 'score': ...}]
    """

    model_class = DualEncoderModel
    query_block = 64


AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig)
AutoModel.register(DualEncoderConfig, DualEncoderModel)
