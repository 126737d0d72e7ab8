"""The model: backbone with tapped keys and values, the interaction layers, the two heads (docs/design.md, section 1).

Everything here takes and returns tensors; texts, batching and devices are in `mixencoder.fast`. Queries and documents
are encoded independently (`encode_query`, `encode_document`); `interact` is the hot path.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from mixencoder.base.backbones import (
    KeyValueTap,
    LastTapReached,
    LinearWeights,
    layout_of,
    start_weights,
)
from mixencoder.base.modeling import PairClassifier, RankingScores, TwoTowerModel, pool
from mixencoder.configuration import MixEncoderConfig
from mixkernels import candidate_attention

_NORM_START = 0.3
"""With the dual term the last LayerNorm's initial weights are scaled by this; h . e then starts at 9% of its size."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Attention of one layer: (context query, key, value, state query) -> (attended context, attended state).

The last is None without a state query. The caller chooses how candidates are matched with queries: one pool for all
queries, candidates of each query, or packed rows of several queries."""


@dataclass(frozen=True)
class QueryState:
    """B encoded queries: what interaction layers read of them. Made once, used for any number of candidates."""

    keys: tuple[Tensor, ...]
    """For every interaction layer (B, m, H, D)."""
    values: tuple[Tensor, ...]
    """For every interaction layer (B, m, H, D)."""
    lengths: Tensor
    """(B,) int64, number of tokens of each query; rows beyond are padding."""
    pooled: Tensor | None
    """(B, d), mean of the query's final token vectors, or the first by configuration; only with the dual term."""
    first: Tensor | None = None
    """(B, d), the query's final first-token vectors; only without the state row."""

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.lengths)

    def select(self, index: int) -> "QueryState":
        """Return the state of one query, B = 1, cut to its length."""
        length = int(self.lengths[index])
        rows = slice(index, index + 1)
        return QueryState(
            tuple(key[rows, :length] for key in self.keys),
            tuple(value[rows, :length] for value in self.values),
            self.lengths[rows],
            None if self.pooled is None else self.pooled[rows],
            None if self.first is None else self.first[rows],
        )


class InteractionLayer(nn.Module):
    """One interaction layer: context rows and the state row attend to the query, then share W_o, LN1, FFN and LN2.

    The ablations leave out the context rows (``context_update=False``) or the state row (``state_row=False``), and the
    weights that only those use.
    """

    def __init__(self, config: MixEncoderConfig) -> None:
        super().__init__()
        d = config.hidden_size
        settings = layout_of(config.backbone_config).settings(config.backbone_config)
        self.num_heads = config.backbone_config.num_attention_heads
        self.updates_context, self.has_state = config.context_update, config.state_row
        if self.updates_context:
            self.query = nn.Linear(d, d)
            self.key = nn.Linear(d, d)
            self.value = nn.Linear(d, d)
        if self.has_state:
            self.state_query = nn.Linear(d, d)
        self.attention_output = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=settings.norm_eps)
        self.intermediate = nn.Linear(d, settings.intermediate_size)
        self.output = nn.Linear(settings.intermediate_size, d)
        self.output_norm = nn.LayerNorm(d, eps=settings.norm_eps)
        self.activation = ACT2FN[settings.activation]
        self.dropout = nn.Dropout(settings.hidden_dropout)

    def forward(
        self, context: Tensor, state: Tensor | None, attend: Attend, gate: nn.Linear | None
    ) -> tuple[Tensor, Tensor | None]:
        """Update contexts (..., N, k, d) and states (..., N, d); a state of None is zero, as before the first layer.

        Without the state row, gate is None and the returned state is None.
        """
        # (..., N, d)
        hint = context.mean(dim=-2)
        # (..., N, k + 1, d): from here on one product serves context rows and state row
        rows = self.dropout(self.attention_output(self._attended(context, hint, attend)))
        k = context.shape[-2] if self.updates_context else 0
        parts = []
        if self.updates_context:
            parts.append(rows[..., :k, :] + context)
        if self.has_state:
            assert gate is not None, "a model with a state row has a gate"
            parts.append(_gated(hint, rows[..., k, :], state, gate).unsqueeze(-2))
        rows = self.attention_norm(torch.cat(parts, dim=-2))
        ffn = self.dropout(self.output(self.activation(self.intermediate(rows))))
        rows = self.output_norm(rows + ffn)
        return rows[..., :k, :] if self.updates_context else context, rows[..., k, :] if self.has_state else None

    def start_from(self, weights: Mapping[str, LinearWeights]) -> None:
        """Copy weights of a backbone layer, given by module name; `state_query` starts as a copy of "query"."""
        targets = [(name, source) for name, source in weights.items() if hasattr(self, name)]
        if self.has_state:
            targets.append(("state_query", weights["query"]))
        with torch.no_grad():
            for name, source in targets:
                module = getattr(self, name)
                module.weight.copy_(source.weight)
                if source.bias is None:
                    module.bias.zero_()
                else:
                    module.bias.copy_(source.bias)

    def _attended(self, context: Tensor, hint: Tensor, attend: Attend) -> Tensor:
        """Return the attended rows, contexts first, then the state: (..., N, k + 1, d)."""
        state_query = self._heads(self.state_query(hint)) if self.has_state else None
        if self.updates_context:
            query, key, value = (self._heads(project(context)) for project in (self.query, self.key, self.value))
        else:
            assert state_query is not None, "a layer without context rows has a state row"
            # the operator needs context rows: pass the state's query as one, and drop its result
            query = key = value = state_query.unsqueeze(-3)
        attended_context, attended_state = attend(query, key, value, state_query)
        parts = [attended_context.flatten(-2)] if self.updates_context else []
        if attended_state is not None:
            parts.append(attended_state.flatten(-2).unsqueeze(-2))
        return torch.cat(parts, dim=-2)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1))


def _gated(hint: Tensor, u: Tensor, state: Tensor | None, gate: nn.Linear) -> Tensor:
    """Return ``z*u + (1-z)*h`` with ``z = sigmoid(W_g [g ; u ; h])``, inputs (..., d), without the concatenation.

    g is the hint, h the state; a state of None is zero.
    """
    w_hint, w_u, w_state = gate.weight.split(u.shape[-1], dim=1)
    logits = F.linear(hint, w_hint, gate.bias) + F.linear(u, w_u)
    if state is None:  # h = 0 contributes nothing
        return torch.sigmoid(logits) * u
    z = torch.sigmoid(logits + F.linear(state, w_state))
    # under autocast linear layers return half precision, but norms, which made the state, float32
    return torch.lerp(state, u.to(state.dtype), z.to(state.dtype))


class _ZeroLinear(nn.Linear):
    """A linear layer that is initialised to zero."""


class QueryAdapter(nn.Module):
    """A residual network on the dual term's query vector: ``q + |q| / sqrt(d) * W_2 GELU(W_1 q sqrt(d) / |q|)``.

    W_2 starts at zero, so that an untrained adapter changes nothing. Lengths do not matter to the network: encoders
    differ in how long their vectors are.
    """

    def __init__(self, d: int, size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d, size)
        self.outer = _ZeroLinear(size, d)

    def forward(self, q: Tensor) -> Tensor:
        """Adapt (..., d)."""
        scale = q.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny) / math.sqrt(q.shape[-1])
        return q + scale * self.outer(F.gelu(self.inner(q / scale)))


class MixEncoderModel(TwoTowerModel):
    """Score queries against candidates that were encoded before the query arrived.

    Trainers call ``forward``. To rank and classify texts use `mixencoder.fast.MixEncoder`.
    """

    config_class = MixEncoderConfig
    config: MixEncoderConfig

    def __init__(self, config: MixEncoderConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        codes = torch.zeros(config.num_context_embeddings, d)
        self.codes = nn.Parameter(codes) if config.pooling == "codes" else None
        self.interaction = nn.ModuleList(InteractionLayer(config) for _ in config.interaction_layers)
        self.gate = nn.Linear(3 * d, d) if config.state_row else None
        self.dual_scale = nn.Parameter(torch.zeros(())) if config.dual_term else None
        size = config.query_adapter_size
        self.query_adapter = None if size is None else QueryAdapter(d, size)
        pairs = 2 if config.dual_term else 1
        self.classifier = PairClassifier(d, config, pairs=pairs) if "classification" in config.heads else None
        self.kernel_backend = "auto"
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that are not loaded: codes ~ N(0, 1) as published, the rest as in `HeadedModel`.

        With the dual term a single code starts at zero, so that a candidate starts as the mean of its tokens. Several
        codes start near zero, as equal codes would stay equal for ever.
        """
        if isinstance(module, _ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if module is self:
            if self.codes is not None:
                self._init_codes(self.codes, self.config.backbone_config.initializer_range)
            if self.dual_scale is not None:
                init.constant_(self.dual_scale, self.config.dual_scale_init)

    def _init_codes(self, codes: Tensor, std: float) -> None:
        if not self.config.dual_term:
            init.normal_(codes, mean=0.0, std=1.0)
        elif len(codes) > 1:
            init.normal_(codes, mean=0.0, std=std)
        else:
            init.zeros_(codes)

    @property
    def context_shape(self) -> tuple[int, int]:
        """(k, d) of a candidate's context embeddings."""
        return self.config.num_context_embeddings, self.config.hidden_size

    @property
    def interaction_layers(self) -> list[InteractionLayer]:
        """The interaction layers, in the order in which they run."""
        return cast("list[InteractionLayer]", list(self.interaction))

    def encoder_weights(self) -> dict[str, Tensor]:
        """Return the weights that `encode_document` reads, backbone and codes, by their names in the state dict."""
        return {
            name: weight
            for name, weight in self.state_dict().items()
            if name == "codes" or name.startswith("backbone.")
        }

    def start_from_backbone(self) -> None:
        """Copy to each interaction layer the matching weights of the backbone layer that it reads.

        With the dual term the last LayerNorm is scaled down: ``h . e``, still meaningless, then starts small, and the
        score starts at the quality of the dual term.
        """
        for layer, index in zip(self.interaction_layers, self.config.interaction_layer_indices, strict=True):
            layer.start_from(start_weights(self.backbone, index))
        if self.config.dual_term:
            with torch.no_grad():
                for parameter in self.interaction_layers[-1].output_norm.parameters():
                    parameter.mul_(_NORM_START)

    def forward(
        self,
        query_input_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        document_input_ids: Tensor | None = None,
        document_attention_mask: Tensor | None = None,
        candidates_per_query: int | None = None,
        head: str | None = None,
        mini_batch_size: int | None = None,
        *,
        query_state: Mapping[str, Any] | None = None,
        document_contexts: Tensor | None = None,
    ) -> RankingScores | Tensor:
        """As `TwoTowerModel.forward`; or, for an encoder that is not trained, with encodings in place of token ids.

        Args:
            query_input_ids, query_attention_mask, document_input_ids, document_attention_mask: texts; None with
                encodings.
            candidates_per_query, head, mini_batch_size: as in `TwoTowerModel.forward`.
            query_state: fields of the `QueryState` that `read_query` returns.
            document_contexts: (N, k, d), from `encode_document`.

        Raises:
            InputError: the model has no such head.
        """
        if query_state is None or document_contexts is None:
            texts = query_input_ids, query_attention_mask, document_input_ids, document_attention_mask
            return super().forward(
                *cast("tuple[Tensor, Tensor, Tensor, Tensor]", texts), candidates_per_query, head, mini_batch_size
            )
        candidates = document_contexts
        if candidates_per_query is not None:
            candidates = candidates.unflatten(0, (-1, candidates_per_query))
        return self.interact(self._adapted(QueryState(**query_state)), candidates, head)

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> QueryState:
        """Encode queries (B, m): `read_query`, and the query adapter if there is one.

        Padding is on the right; attention_mask (B, m) is 1 for tokens, None if there is no padding.
        """
        return self._adapted(self.read_query(input_ids, attention_mask))

    def _adapted(self, state: QueryState) -> QueryState:
        if self.query_adapter is None:
            return state
        assert state.pooled is not None, "an adapter belongs to a dual term"
        if torch.is_grad_enabled():
            return replace(state, pooled=self.query_adapter(state.pooled))
        # one query at a time: the bits of a product depend on its number of rows
        return replace(state, pooled=torch.stack([self.query_adapter(query) for query in state.pooled]))

    def read_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> QueryState:
        """Run the backbone over queries (B, m) and keep what the interaction layers read, without the query adapter.

        The pass stops at the last tapped layer, unless the dual term or an ablation needs the final vectors. Padding is
        on the right; attention_mask (B, m) is 1 for tokens, None if there is no padding.
        """
        indices = self.config.interaction_layer_indices
        # an exporter cannot follow the exception that stops the pass; it drops what is not used
        stops = self.config.state_row and not self.config.dual_term and not torch.compiler.is_exporting()
        tap = KeyValueTap(indices, stop_after_last=stops)
        pooled = first = None
        try:
            tokens = self.run_backbone(input_ids, attention_mask, tap)
        except LastTapReached:
            pass
        else:
            if self.config.dual_term:
                pooled = pool(tokens, attention_mask, "first" if self.codes is None else "mean")
            if not self.config.state_row:
                first = tokens[:, 0]
        keys, values = zip(*(tap[index] for index in indices), strict=True)
        if attention_mask is None:
            lengths = torch.full((input_ids.shape[0],), input_ids.shape[1], device=input_ids.device)
        else:
            lengths = attention_mask.sum(dim=1)
        return QueryState(keys, values, lengths, pooled, first)

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compress candidates (N, n) into context embeddings E_0 (N, k, d): ``softmax(C T^T + mask) T``, unscaled.

        C are the codes, T a candidate's final token vectors. With the pooling "first", E_0 is the first row of T.
        """
        tokens = self.run_backbone(input_ids, attention_mask)
        return self.scaled_contexts(self._pooled(tokens, attention_mask))

    def scaled_contexts(self, contexts: Tensor) -> Tensor:
        """Scale context embeddings (..., d) to the configured length, if there is one."""
        norm = self.config.context_norm
        if norm is None:
            return contexts
        wide = contexts.to(torch.promote_types(contexts.dtype, torch.float32))
        return (wide * (norm / wide.square().sum(dim=-1, keepdim=True).sqrt())).to(contexts.dtype)

    def _pooled(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Pool token vectors (N, n, d) into context embeddings (N, k, d)."""
        if self.codes is None:
            return tokens[:, :1]
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        weights = self.pooling_weights(wide, attention_mask)
        pooled = [(wide * weights[:, code].unsqueeze(-1)).sum(dim=1) for code in range(len(self.codes))]
        return torch.stack(pooled, dim=1).to(tokens.dtype)

    def pooling_weights(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return how much of each token is in each context embedding, (N, k, n), for token vectors (N, n, d).

        Rows sum to 1. With the pooling "first" all weight is on the first token.
        """
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if self.codes is None:
            weights = wide.new_zeros(len(tokens), 1, tokens.shape[1])
            weights[..., 0] = 1
            return weights
        # one code at a time, as row sums: the bits of batched products with few rows depend on the number of texts
        scores = torch.stack([(wide * code).sum(dim=-1) for code in self.codes], dim=1)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def run_interaction(
        self, candidates: Tensor, attends: Sequence[Attend], first: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the interaction layers over candidates (..., N, k, d); attends holds one `Attend` for each layer.

        Returns h (..., N, d), the last state, and e (..., N, d), the mean of the last contexts. Without the state row h
        is `first`, the query's first-token vectors, (..., N or 1, d). Without the context update e depends on no query,
        so it has only the leading dimensions of the candidates.
        """
        context, state = candidates, None
        for layer, attend in zip(self.interaction, attends, strict=True):
            context, state = layer(context, state, attend, self.gate)
        h = state if self.config.state_row else first
        assert h is not None, "without a state row the query's first-token vectors are given"
        return h, context.mean(dim=-2)

    def rank_head(self, h: Tensor, e: Tensor, pooled_query: Tensor | None, pooled_candidate: Tensor) -> RankingScores:
        """Return ``h . e``, summed in float32, and the dual term; inputs (..., d) are broadcast against each other."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        interaction = (h.to(dtype) * e.to(dtype)).sum(dim=-1)
        return RankingScores(interaction, self.dual_term(pooled_query, pooled_candidate))

    def dual_term(self, pooled_query: Tensor | None, pooled_candidate: Tensor) -> Tensor | None:
        """Return ``a cos(q, c)`` of inputs (..., d), at least float32; None if the model has no dual term."""
        if self.dual_scale is None:
            return None
        assert pooled_query is not None, "with the dual term the pooled query is given"
        dtype = torch.promote_types(pooled_candidate.dtype, torch.float32)
        cosine = F.cosine_similarity(pooled_query.to(dtype), pooled_candidate.to(dtype), dim=-1)
        return self.dual_scale.to(dtype) * cosine

    def classification_head(self, h: Tensor, e: Tensor, pooled_query: Tensor | None, pooled: Tensor) -> Tensor:
        """Return logits (..., num_labels), at least float32, from inputs (..., d)."""
        assert self.classifier is not None, "check_head raises if this head is missing"
        if not self.config.dual_term:
            return self.classifier((h, e))
        assert pooled_query is not None, "with the dual term the pooled query is given"
        return self.classifier((h, e), (pooled_query, pooled))

    def interact(self, query_state: QueryState, candidates: Tensor, head: str | None = None) -> RankingScores | Tensor:
        """Score candidates for B queries: (N, k, d), one pool for all queries, or (B, N, k, d).

        Returns the ranking scores, each (B, N), or classification logits (B, N, num_labels).

        Raises:
            InputError: the model has no such head.
        """
        head = self.check_head(head)

        attends = [
            partial(_attend, key, value, query_state.lengths, self.kernel_backend)
            for key, value in zip(query_state.keys, query_state.values, strict=True)
        ]
        # (B, 1, d): the same for all candidates of a query
        pooled_query, first = (
            None if vector is None else vector.unsqueeze(1) for vector in (query_state.pooled, query_state.first)
        )
        h, e = self.run_interaction(candidates, attends, first)
        apply_head = self.rank_head if head == "ranking" else self.classification_head
        return apply_head(h, e, pooled_query, candidates.mean(dim=-2))


def _attend(
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    backend: str,
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`Attend` for one pool that all queries score, or for candidates of each query."""
    result = candidate_attention(
        context_query, context_key, context_value, state_query, key, value, key_lengths=lengths, backend=backend
    )
    return result.context, result.state


AutoConfig.register(MixEncoderConfig.model_type, MixEncoderConfig)
AutoModel.register(MixEncoderConfig, MixEncoderModel)
