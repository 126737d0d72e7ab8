"""Least work of whole models, by docs/design.md section 2; `mixkernels.roofline` counts single operators.

Bytes: weights and stored candidates, each read once, and outputs; activations between layers could stay in cache and
are not counted. Exponentials: those of softmax and gate.
"""

from typing import NamedTuple

import torch

from mixkernels.roofline import Cost

_INDEX_BYTES = 8


class Encoder(NamedTuple):
    """Sizes of a backbone."""

    layers: int
    d: int
    heads: int
    inner: int

    @property
    def layer_weights(self) -> int:
        """Number of elements in the weight matrices of a layer."""
        return 4 * self.d**2 + 2 * self.d * self.inner


MINILM = Encoder(layers=6, d=384, heads=12, inner=1536)
"""The shape of all-MiniLM-L6-v2, the bundled checkpoint's backbone."""


def times(cost: Cost, count: float) -> Cost:
    """Cost of `count` times the same work."""
    return Cost(round(cost.flops * count), round(cost.bytes * count), round(cost.exps * count))


def encoder_cost(encoder: Encoder, texts: int, tokens: int, dtype: torch.dtype, *, layers: int | None = None) -> Cost:
    """Cost of the first `layers` (None: all) for texts of equal length: 24 t d^2 + 4 t^2 d a layer at inner = 4 d."""
    layers = encoder.layers if layers is None else layers
    rows = texts * tokens
    return Cost(
        flops=layers * (2 * rows * encoder.layer_weights + 4 * rows * tokens * encoder.d),
        bytes=(layers * encoder.layer_weights + rows * encoder.d) * dtype.itemsize,
        exps=layers * encoder.heads * rows * tokens,
    )


def query_cost(encoder: Encoder, tokens: int, dtype: torch.dtype) -> Cost:
    """Cost of the published MixEncoder's query pass, which ends with the last layer's keys and values."""
    below = encoder_cost(encoder, 1, tokens, dtype, layers=encoder.layers - 1)
    d = encoder.d
    return below.and_then(Cost(4 * tokens * d**2, (2 * d**2 + 2 * tokens * d) * dtype.itemsize, 0))


def projection_cost(encoder: Encoder, candidates: int, k: int, dtype: torch.dtype) -> Cost:
    """Cost of a first interaction layer's work on candidates alone: 6 k d^2 + 4 d^2 FLOPs and own logits per candidate.

    Contexts' query, key and value, the state's query, the gate's hint part.
    """
    d = encoder.d
    return Cost(
        flops=candidates * (6 * k * d**2 + 4 * d**2 + 2 * k * k * d),
        bytes=(5 * d**2 + candidates * k * d) * dtype.itemsize,
        exps=0,
    )


def interaction_cost(
    encoder: Encoder, candidates: int, k: int, tokens: int, dtype: torch.dtype, *, stored_bytes: int
) -> Cost:
    """Cost of the rest of a first interaction layer, and of the score: 38 d^2 FLOPs at k = 1, plus attention.

    Args:
        encoder, candidates, k, tokens, dtype: sizes; tokens are the query's.
        stored_bytes: bytes read per candidate, the result of what `projection_cost` counts.
    """
    d, inner, rows = encoder.d, encoder.inner, k + 1
    # output, the gate's update part, FFN, the score
    flops = 2 * rows * d**2 + 2 * d**2 + 4 * rows * d * inner + 2 * d
    # shared keys and values, own values
    flops += 4 * rows * tokens * d + 2 * k * k * d
    return Cost(
        flops=candidates * flops,
        bytes=(2 * d**2 + 2 * d * inner) * dtype.itemsize + candidates * (stored_bytes + 4),
        exps=candidates * (encoder.heads * (rows * tokens + k * k) + d),
    )


def vectors_cost(
    encoder: Encoder, candidates: int, query: int, dtype: torch.dtype, *, query_vectors: int, vectors: int, size: int
) -> Cost:
    """Cost of a query pass and products of the query's vectors with a candidate's: dual, Poly, late interaction."""
    products = dot_products_cost(candidates, dtype, query_vectors=query_vectors, vectors=vectors, size=size)
    return encoder_cost(encoder, 1, query, dtype).and_then(products)


def dot_products_cost(
    candidates: int, dtype: torch.dtype, *, query_vectors: int = 1, vectors: int = 1, size: int
) -> Cost:
    """Cost of the products of the query's vectors with every candidate's, which are stored in `dtype`."""
    return Cost(
        flops=2 * candidates * query_vectors * vectors * size,
        bytes=candidates * (vectors * size * dtype.itemsize + 4),
        exps=0,
    )


def residual_layer_norm_backward_cost(rows: int, d: int, dtype: torch.dtype) -> Cost:
    """Gradients of LN(x + residual): gradient and saved sum read, one gradient for both written; 11 FLOPs per element.

    The gradient times weight (1), two means (4), their combination (4), weight and bias (2).
    """
    return Cost(flops=11 * rows * d, bytes=(3 * rows * d + 3 * d) * dtype.itemsize, exps=0)


def gate_layer_norm_backward_cost(rows: int, d: int, dtype: torch.dtype) -> Cost:
    """Gradients of the gated LN: gradient, gate, update and state read, three gradients written; 20 FLOPs per element.

    LN's 11, and 9 for the gradients of a sigmoid and of a mix. No exponential, since the sigmoid may have been saved.
    """
    return Cost(flops=20 * rows * d, bytes=(7 * rows * d + 3 * d) * dtype.itemsize, exps=0)


def score_candidates_backward_cost(candidates: int, k: int, d: int, dtype: torch.dtype) -> Cost:
    """Gradients of the scores: k + 1 saved rows read, as many gradients written; 13 FLOPs per element."""
    elements = candidates * (k + 1) * d
    return Cost(flops=13 * elements, bytes=(2 * elements + 3 * d) * dtype.itemsize + 4 * candidates, exps=0)


def copy_cost(stored: int, flops: int = 0) -> Cost:
    """Cost of reading and writing `stored` bytes once, which is all that an index must do with its rows."""
    return Cost(flops=flops, bytes=2 * stored, exps=0)
