"""Compute a `PairExplanation`: run the interaction layers once and note the inputs of their attention operator."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.tokenization import TokenisedText
from mixencoder.explanation.result import PairExplanation, Token
from mixencoder.modeling import MixEncoderModel, QueryState
from mixkernels import candidate_attention

ReadText = tuple[str, TokenisedText]
"""A text, and its tokens."""


def explain_pair(
    model: MixEncoderModel,
    query: ReadText,
    document: ReadText,
    *,
    query_state: QueryState,
    contexts: Tensor,
    token_names: Callable[[list[int]], list[str]],
    scores: Mapping[str, float],
    probability: float | None,
) -> PairExplanation:
    """Return the explanation of one pair, in inference mode.

    Args:
        model: the model.
        query, document: what was read.
        query_state: of this query, B = 1.
        contexts: (1, k, d), the document's context embeddings.
        token_names: turns token ids into names.
        scores: the score and its terms, by their names in `MixEncoder.predict`.
        probability: see `PairExplanation`.
    """
    noted: list[tuple[Tensor, Tensor | None]] = []
    attends = [
        partial(_attend, noted, key, value, model.kernel_backend)
        for key, value in zip(query_state.keys, query_state.values, strict=True)
    ]
    model.run_interaction(contexts, attends, query_state.first)
    tokens = model.backbone(input_ids=torch.tensor([document[1].ids], device=model.device)).last_hidden_state
    states = [state for _, state in noted if state is not None]
    return PairExplanation(
        query=query[0],
        document=document[0],
        query_tokens=_tokens(query[1], token_names),
        document_tokens=_tokens(document[1], token_names),
        layers=model.config.interaction_layer_indices,
        # without the context update the operator's context rows are not the model's
        context_attention=_array([context for context, _ in noted]) if model.config.context_update else None,
        state_attention=_array(states) if states else None,
        pooling=_array([model.pooling_weights(tokens)[0]])[0],
        score=scores["full"],
        interaction=scores["interaction"],
        dual=scores.get("dual"),
        probability=probability,
    )


def _attend(
    noted: list[tuple[Tensor, Tensor | None]],
    key: Tensor,
    value: Tensor,
    backend: str,
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model does, and note the attention of the one candidate: (H, k, m + k), and (H, m) of the state."""
    result = candidate_attention(context_query, context_key, context_value, state_query, key, value, backend=backend)
    dtype = torch.promote_types(key.dtype, torch.float32)
    # (k, H, D), and (m, H, D); after the first layer candidates have a dimension for queries, of size 1
    query, own = (part.to(dtype).flatten(0, -4)[0] for part in (context_query, context_key))
    shared = key[0].to(dtype)
    scale = query.shape[-1] ** -0.5
    logits = torch.einsum("khd,mhd->hkm", query, torch.cat([shared, own])) * scale
    state = None
    if state_query is not None:
        state = (torch.einsum("hd,mhd->hm", state_query.to(dtype).flatten(0, -3)[0], shared) * scale).softmax(dim=-1)
    noted.append((logits.softmax(dim=-1), state))
    return result.context, result.state


def _tokens(read: TokenisedText, token_names: Callable[[list[int]], list[str]]) -> tuple[Token, ...]:
    return tuple(
        Token(name, *(span or (None, None)), word)
        for name, span, word in zip(token_names(read.ids), read.spans, read.words, strict=True)
    )


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.stack(parts).float().cpu().numpy()
