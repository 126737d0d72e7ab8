"""Poly-encoder (arXiv 1905.01969): a query is several code vectors, a candidate one vector that attends to them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers import initialization as init

from mixencoder.base.configuration import EncoderConfig, check_choice, check_integer
from mixencoder.base.modeling import PairClassifier, RankingScores, TwoTowerModel, at_least_float32, pool
from mixencoder.peers.base import VectorPeer


class PolyEncoderConfig(EncoderConfig):
    """Configuration of `PolyEncoderModel`.

    Args:
        num_codes: number of learned codes, which is the number of vectors of a query; published: 16 and 64.
        pooling: of a candidate: "mean" over tokens, or the "first" token.
        kwargs: fields of `EncoderConfig`.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder-poly-encoder"

    def __init__(self, backbone_config: Any = None, num_codes: int = 16, pooling: str = "mean", **kwargs: Any) -> None:
        check_integer("num_codes", num_codes, 1)
        check_choice("pooling", pooling, ("mean", "first"))
        self.num_codes = num_codes
        self.pooling = pooling
        super().__init__(backbone_config, **kwargs)


class PolyEncoderModel(TwoTowerModel):
    """``y = softmax(c Y^T) Y`` with the query's code vectors Y; ranks by ``y . c``, classifies by an MLP.

    Classification is ``MLP([y ; c ; |y-c|])``.
    """

    config_class = PolyEncoderConfig

    def __init__(self, config: PolyEncoderConfig) -> None:
        super().__init__(config)
        self.codes = nn.Parameter(torch.zeros(config.num_codes, config.hidden_size))
        self.classifier = PairClassifier(config.hidden_size, config) if "classification" in config.heads else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # gives logits of about size 1: every code starts as another mixture of tokens
            init.normal_(self.codes, mean=0.0, std=self.config.hidden_size**-0.5)

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode queries (B, m) into code vectors (B, num_codes, d): ``softmax(codes T^T + mask) T``, unscaled."""
        tokens = self.run_backbone(input_ids, attention_mask)
        # (B, num_codes, m)
        logits = at_least_float32(self.codes @ tokens.mT)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask.bool().unsqueeze(1), torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1).to(tokens.dtype) @ tokens

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode documents (N, n) into vectors (N, d)."""
        return pool(self.run_backbone(input_ids, attention_mask), attention_mask, self.config.pooling)

    def interact(self, query_state: Tensor, candidates: Tensor, head: str | None = None) -> RankingScores | Tensor:
        """Score candidates (N, d), or (B, N, d), for code vectors (B, num_codes, d), as `TwoTowerModel.interact`."""
        codes, candidate = at_least_float32(query_state), at_least_float32(candidates)
        if candidate.dim() == 2:
            # one product over all queries; (B, N, num_codes)
            logits = torch.matmul(candidate, codes.flatten(0, 1).T).unflatten(1, codes.shape[:2]).transpose(0, 1)
        else:
            logits = torch.matmul(candidate, codes.mT)
        weights = logits.softmax(dim=-1)
        if self.check_head(head) == "ranking":
            # (sum of w_i y_i) . c is the sum of w_i (y_i . c), and the logits are these products
            return RankingScores((weights * logits).sum(dim=-1), None)
        attended = torch.matmul(weights.to(query_state.dtype), query_state)
        assert self.classifier is not None, "check_head has found this head"
        return self.classifier((attended, candidates))


class PolyEncoder(VectorPeer):
    """Poly-encoder: a document is one vector (d), encoded ahead of time; a query is `num_codes` vectors (d).

    Configuration: `PolyEncoderConfig`.

    Example:
        >>> model = PolyEncoder.from_backbone("sentence-transformers/all-MiniLM-L6-v2", num_codes=64)
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': ..., 'score': ...}]
    """

    model_class = PolyEncoderModel
    query_block = 8
    candidate_block = 1024


AutoConfig.register(PolyEncoderConfig.model_type, PolyEncoderConfig)
AutoModel.register(PolyEncoderConfig, PolyEncoderModel)
