"""The peers written once more, one pair of texts at a time, with loops over heads, codes and tokens, in float64.

Imports nothing of the project: it takes a dictionary of weights by name, token ids, and sizes. A text is a list of
token ids, special tokens included.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.ranking.model_oracle import Weights, classify, cosine, gelu, linear, norm


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    eps: float
    first_position: int
    segments: bool


def embed(weights: Weights, ids: list[int], segments: list[int], shape: Shape) -> Tensor:
    name = "backbone.embeddings"
    rows = []
    for place, (token, segment) in enumerate(zip(ids, segments, strict=True)):
        row = weights[f"{name}.word_embeddings.weight"][token]
        row = row + weights[f"{name}.position_embeddings.weight"][place + shape.first_position]
        rows.append(row + weights[f"{name}.token_type_embeddings.weight"][segment if shape.segments else 0])
    x = norm(weights, f"{name}.LayerNorm", torch.stack(rows), shape.eps)
    if "backbone.embeddings_project.weight" in weights:
        x = linear(weights, "backbone.embeddings_project", x)
    return x


def layer(weights: Weights, number: int, x: Tensor, shape: Shape) -> Tensor:
    name = f"backbone.encoder.layer.{number}"
    q, k, v = (linear(weights, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
    size = q.shape[1] // shape.heads
    attended = torch.zeros_like(q)
    for row in range(len(x)):
        for h in range(shape.heads):
            part = slice(h * size, (h + 1) * size)
            attended[row, part] = (k[:, part] @ q[row, part] / math.sqrt(size)).softmax(0) @ v[:, part]
    attended = linear(weights, f"{name}.attention.output.dense", attended)
    x = norm(weights, f"{name}.attention.output.LayerNorm", attended + x, shape.eps)
    inner = gelu(linear(weights, f"{name}.intermediate.dense", x))
    return norm(weights, f"{name}.output.LayerNorm", linear(weights, f"{name}.output.dense", inner) + x, shape.eps)


def tokens(weights: Weights, ids: list[int], shape: Shape, segments: list[int] | None = None) -> Tensor:
    x = embed(weights, ids, segments or [0] * len(ids), shape)
    for number in range(shape.layers):
        x = layer(weights, number, x, shape)
    return x


def first_token_heads(weights: Weights, first: Tensor) -> tuple[Tensor, Tensor]:
    return linear(weights, "head.heads.ranking", first)[0], linear(weights, "head.heads.classification", first)


def cross_encoder(weights: Weights, query: list[int], document: list[int], shape: Shape, separator: list[int]):
    """[CLS] query [SEP] separator document [SEP], cut to 40 positions behind the first one."""
    head, tail = [*query, *separator], document[1:]
    room = 40 - shape.first_position - len(head)
    if len(tail) > room:
        tail = [*tail[: room - 1], tail[-1]]
    final = tokens(weights, head + tail, shape, [0] * len(head) + [1] * len(tail))
    return first_token_heads(weights, final[0])


def dual_encoder(weights: Weights, query: list[int], document: list[int], shape: Shape, how: str, similarity: str):
    u, v = (pool(tokens(weights, ids, shape), how) for ids in (query, document))
    score = weights["scale"] * cosine(u, v) if similarity == "cosine" else u @ v
    return score, classify(weights, [(u, v)])


def poly_encoder(weights: Weights, query: list[int], document: list[int], shape: Shape, how: str):
    words, candidate = tokens(weights, query, shape), pool(tokens(weights, document, shape), how)
    vectors = []
    for code in weights["codes"]:
        share = torch.stack([code @ word for word in words]).softmax(0)
        vectors.append(sum(p * word for p, word in zip(share, words, strict=True)))
    share = torch.stack([vector @ candidate for vector in vectors]).softmax(0)
    attended = sum(p * vector for p, vector in zip(share, vectors, strict=True))
    return attended @ candidate, classify(weights, [(attended, candidate)])


def late_interaction(weights: Weights, query: list[int], document: list[int], shape: Shape, similarity: str):
    def vectors(ids: list[int]) -> list[Tensor]:
        out = []
        for word in tokens(weights, ids, shape):
            if "projection.weight" in weights:
                word = weights["projection.weight"] @ word
            out.append(word / word.norm() if similarity == "cosine" else word)
        return out

    words, others = vectors(query), vectors(document)
    score, chosen = torch.zeros((), dtype=torch.float64), []
    for word in words:
        best = max(others, key=lambda other, word=word: float(word @ other))
        score = score + word @ best
        chosen.append(best)
    u, v = torch.stack(words).mean(0), torch.stack(chosen).mean(0)
    return score, classify(weights, [(u, v)])


def deformer(weights: Weights, query: list[int], document: list[int], shape: Shape, joint_layers: int):
    parts = []
    for segment, ids in enumerate((query, document)):
        x = embed(weights, ids, [segment] * len(ids), shape)
        for number in range(shape.layers - joint_layers):
            x = layer(weights, number, x, shape)
        parts.append(x)
    x = torch.cat(parts)
    for number in range(shape.layers - joint_layers, shape.layers):
        x = layer(weights, number, x, shape)
    return first_token_heads(weights, x[0])


def pool(x: Tensor, how: str) -> Tensor:
    return x[0] if how == "first" else sum(x) / len(x)
