"""DeFormer (arXiv 2005.00697): lower layers run on query and document separately, upper layers on both together."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.masking_utils import create_bidirectional_mask

from mixencoder.base.backbones import encoder_layers
from mixencoder.base.configuration import EncoderConfig, check_integer
from mixencoder.base.modeling import RankingScores, TwoTowerModel
from mixencoder.errors import UnsupportedBackboneError
from mixencoder.peers.base import TokenPeer
from mixencoder.peers.token_states import FirstTokenHeads, TokenStates, has_token_types, token_mask

SPLITTABLE = ("bert", "roberta", "xlm-roberta", "electra")
"""Backbones whose layers are a list of modules, each of which maps states and a mask to states."""

_REASONS = {
    "albert": "its layers share their weights, so that upper layers cannot learn anything else than lower ones",
    "modernbert": "its layers rotate keys by position, but two joined texts do not have positions in one sequence",
}


class DeFormerConfig(EncoderConfig):
    """Configuration of `DeFormerModel`.

    Args:
        joint_layers: number of upper layers, which run on query and document together; published: 2 and 3.
        kwargs: fields of `EncoderConfig`.

    Raises:
        ValueError: a value is outside its range.
    """

    model_type = "mixencoder-deformer"

    def __init__(self, backbone_config: Any = None, joint_layers: int = 2, **kwargs: Any) -> None:
        self.joint_layers = joint_layers
        super().__init__(backbone_config, **kwargs)
        check_integer("joint_layers", joint_layers, 1, self.backbone_config.num_hidden_layers)


class DeFormerModel(TwoTowerModel):
    """Linear heads on the query's first token after the joint layers.

    Both texts keep their special tokens, and the positions of each start at 0. If the backbone has token types, the
    query has type 0 and the document type 1, as in a pair.
    """

    config_class = DeFormerConfig

    def __init__(self, config: DeFormerConfig) -> None:
        found = config.backbone_config.model_type
        if found not in SPLITTABLE:
            reason = _REASONS.get(found, "its layers have not been tested outside its own forward pass")
            raise UnsupportedBackboneError(
                f'DeFormer cannot split a backbone of model type "{found}": {reason}. '
                f"Supported: {', '.join(SPLITTABLE)}"
            )
        super().__init__(config)
        self.head = FirstTokenHeads(config)
        self.post_init()

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenStates:
        """Run queries (B, m) through the lower layers: states (B, m, d)."""
        return self._lower(input_ids, attention_mask, 0)

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenStates:
        """Run documents (N, n) through the lower layers: states (N, n, d)."""
        return self._lower(input_ids, attention_mask, 1)

    def interact(
        self, query_state: TokenStates, candidates: TokenStates, head: str | None = None
    ) -> RankingScores | Tensor:
        """Run the joint layers on every query with candidates shared by all queries (N, n, d), or its own (B, N, n, d).

        Results as in `TwoTowerModel.interact`.
        """
        head = self.check_head(head)
        # (B, N, n, d) and (B, N, m, d), expanded without copying
        batch, count = len(query_state.vectors), candidates.vectors.shape[-3]
        documents = candidates.vectors.expand(batch, -1, -1, -1)
        queries = query_state.vectors.unsqueeze(1).expand(-1, count, -1, -1)
        masks = query_state.mask.unsqueeze(1).expand(-1, count, -1), candidates.mask.expand(batch, -1, -1)
        joint = torch.cat([queries, documents], dim=2).flatten(0, 1)
        states = self._run(joint, torch.cat(masks, dim=2).flatten(0, 1), upper=True)
        out = self.head(states[:, 0].unflatten(0, (batch, count)), head)
        return RankingScores(out, None) if head == "ranking" else out

    def _lower(self, input_ids: Tensor, attention_mask: Tensor | None, token_type: int) -> TokenStates:
        """Run texts (R, n), whose tokens have one type, through the lower layers."""
        types = torch.full_like(input_ids, token_type) if has_token_types(self.config) else None
        states = self.backbone.embeddings(input_ids=input_ids, token_type_ids=types)
        # ELECTRA's embeddings may be narrower than its layers
        project = getattr(self.backbone, "embeddings_project", None)
        states = states if project is None else project(states)
        return TokenStates(self._run(states, attention_mask, upper=False), token_mask(input_ids, attention_mask))

    def _run(self, states: Tensor, mask: Tensor | None, *, upper: bool) -> Tensor:
        """Run states (R, n, d) with mask (R, n) through the upper or the lower layers."""
        allowed = create_bidirectional_mask(config=self.backbone.config, inputs_embeds=states, attention_mask=mask)
        layers = encoder_layers(self.backbone)
        split = len(layers) - self.config.joint_layers
        for layer in layers[split:] if upper else layers[:split]:
            states = layer(states, allowed)
        return states


class DeFormer(TokenPeer):
    """DeFormer: the lower layers encode documents ahead of time, the upper layers run for each pair.

    Configuration: `DeFormerConfig`. Backbones: `SPLITTABLE`.

    Example:
        >>> model = DeFormer.from_backbone("sentence-transformers/all-MiniLM-L6-v2", joint_layers=2)
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': ..., 'score': ...}]
    """

    model_class = DeFormerModel
    reads_jointly = True
    tokens_at_once = 4096
    joins_query = True


AutoConfig.register(DeFormerConfig.model_type, DeFormerConfig)
AutoModel.register(DeFormerConfig, DeFormerModel)
