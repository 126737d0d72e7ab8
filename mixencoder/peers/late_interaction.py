"""Late interaction (ColBERT, arXiv 2004.12832): sums each query token's largest similarity to a document token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from mixencoder.base.configuration import EncoderConfig, check_choice, check_integer
from mixencoder.base.modeling import PairClassifier, RankingScores, TwoTowerModel, at_least_float32, pool
from mixencoder.peers.base import TokenPeer
from mixencoder.peers.token_states import TokenStates, token_mask


class LateInteractionConfig(EncoderConfig):
    """Configuration of `LateInteractionModel`.

    Args:
        projection_dim: size of a token's vector; None takes the backbone's vectors as they are.
        similarity: of two tokens, "cosine" or "dot".
        kwargs: fields of `EncoderConfig`.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder-late-interaction"

    def __init__(
        self,
        backbone_config: Any = None,
        projection_dim: int | None = 128,
        similarity: str = "cosine",
        **kwargs: Any,
    ) -> None:
        if projection_dim is not None:
            check_integer("projection_dim", projection_dim, 1)
        check_choice("similarity", similarity, ("cosine", "dot"))
        self.projection_dim = projection_dim
        self.similarity = similarity
        super().__init__(backbone_config, **kwargs)

    @property
    def token_size(self) -> int:
        """Size of a token's vector."""
        return self.projection_dim or self.hidden_size


class LateInteractionModel(TwoTowerModel):
    """``sum over i of max over j of q_i . c_j``, special tokens included.

    Classification is ``MLP([u ; v ; |u-v|])``: u is the mean of the query's token vectors, v the mean of the candidate
    vectors that are most similar to each of them.
    """

    config_class = LateInteractionConfig

    def __init__(self, config: LateInteractionConfig) -> None:
        super().__init__(config)
        size = config.projection_dim
        self.projection = None if size is None else nn.Linear(config.hidden_size, size, bias=False)
        self.classifier = PairClassifier(config.token_size, config) if "classification" in config.heads else None
        self.post_init()

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenStates:
        """Encode queries (B, m) into a vector for every token, (B, m, token_size)."""
        vectors = self.run_backbone(input_ids, attention_mask)
        if self.projection is not None:
            vectors = self.projection(vectors)
        if self.config.similarity == "cosine":
            vectors = F.normalize(vectors, dim=-1)
        return TokenStates(vectors, token_mask(input_ids, attention_mask))

    encode_document = encode_query

    def interact(
        self, query_state: TokenStates, candidates: TokenStates, head: str | None = None
    ) -> RankingScores | Tensor:
        """Score candidates (N, n, D), or (B, N, n, D), for queries (B, m, D); results as `TwoTowerModel.interact`."""
        query, candidate = query_state.vectors, candidates.vectors
        if candidate.dim() == 3:
            # one product over all queries; (N, n, B, m) -> (B, N, n, m)
            products = torch.matmul(candidate, query.flatten(0, 1).T).unflatten(2, query.shape[:2])
            similarity = products.permute(2, 0, 1, 3)
        else:
            similarity = torch.matmul(candidate, query.unsqueeze(1).mT)
        similarity = similarity.masked_fill(~candidates.mask.unsqueeze(-1), torch.finfo(similarity.dtype).min)
        if self.check_head(head) == "ranking":
            best = at_least_float32(similarity.amax(dim=2)).masked_fill(~query_state.mask.unsqueeze(1), 0.0)
            return RankingScores(best.sum(dim=-1), None)
        # (B, N, m): for each query token the most similar candidate token
        chosen = similarity.argmax(dim=2)
        vectors = candidate.expand(*chosen.shape[:2], -1, -1)
        matched = vectors.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, vectors.shape[-1]))
        mask = query_state.mask.unsqueeze(1).expand_as(chosen)
        v = pool(matched.flatten(0, 1), mask.flatten(0, 1), "mean").unflatten(0, chosen.shape[:2])
        assert self.classifier is not None, "check_head has found this head"
        return self.classifier((pool(query, query_state.mask, "mean").unsqueeze(1), v))


class LateInteraction(TokenPeer):
    """Late interaction: a document is one vector for every token, encoded ahead of time.

    Configuration: `LateInteractionConfig`.

    Example:
        >>> model = LateInteraction.from_backbone("sentence-transformers/all-MiniLM-L6-v2", projection_dim=None)
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': 0, 'score': ...}]
    """

    model_class = LateInteractionModel
    # in a product with other queries, a query's bits may depend on its columns
    query_block = 1
    tokens_at_once = 16384
    joins_query = False

    @property
    def _width(self) -> int:
        return self.config.token_size


AutoConfig.register(LateInteractionConfig.model_type, LateInteractionConfig)
AutoModel.register(LateInteractionConfig, LateInteractionModel)
