"""Section 1 of docs/design.md written once more, with loops over candidates and heads, in float64.

Imports nothing of the project: it takes a dictionary of weights by name, token ids, and sizes. The backbone is written
out too, so that tapped keys and values are checked as well.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def backbone(weights: Weights, ids: list[int], layers: int, heads: int, eps: float, first_position: int = 0):
    """One text without padding: final vectors (n, d) and, for every layer, keys and values (n, d)."""
    prefix = "backbone.embeddings"
    places = torch.arange(len(ids)) + first_position
    x = weights[f"{prefix}.word_embeddings.weight"][torch.tensor(ids)]
    x = x + weights[f"{prefix}.position_embeddings.weight"][places]
    x = x + weights[f"{prefix}.token_type_embeddings.weight"][0]
    x = norm(weights, f"{prefix}.LayerNorm", x, eps)
    keys_values = []
    for layer in range(layers):
        name = f"backbone.encoder.layer.{layer}"
        q = linear(weights, f"{name}.attention.self.query", x)
        k = linear(weights, f"{name}.attention.self.key", x)
        v = linear(weights, f"{name}.attention.self.value", x)
        keys_values.append((k, v))
        size = q.shape[1] // heads
        attended = torch.zeros_like(q)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            probabilities = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1)
            attended[:, part] = probabilities @ v[:, part]
        attended = linear(weights, f"{name}.attention.output.dense", attended)
        x = norm(weights, f"{name}.attention.output.LayerNorm", attended + x, eps)
        inner = linear(weights, f"{name}.output.dense", gelu(linear(weights, f"{name}.intermediate.dense", x)))
        x = norm(weights, f"{name}.output.LayerNorm", inner + x, eps)
    return x, keys_values


def context_embeddings(weights: Weights, tokens: Tensor) -> Tensor:
    """E_0 (k, d) of one candidate's final vectors (n, d)."""
    codes = weights["codes"]
    return torch.stack([(code @ tokens.T).softmax(-1) @ tokens for code in codes])


def interact(weights: Weights, context: Tensor, taps: list[tuple[Tensor, Tensor]], heads: int, eps: float):
    """One candidate (k, d) through all interaction layers: h and e, (d,) each."""
    k, d = context.shape
    size = d // heads
    state = torch.zeros(d, dtype=torch.float64)
    for number, (key, value) in enumerate(taps):
        name = f"interaction.{number}"
        hint = context.mean(0)
        q = linear(weights, f"{name}.query", context)
        own_k = linear(weights, f"{name}.key", context)
        own_v = linear(weights, f"{name}.value", context)
        qs = linear(weights, f"{name}.state_query", hint)
        attended, attended_state = torch.zeros_like(q), torch.zeros_like(qs)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for row in range(k):
                logits = torch.cat([key[:, part] @ q[row, part], own_k[:, part] @ q[row, part]]) / math.sqrt(size)
                attended[row, part] = logits.softmax(0) @ torch.cat([value[:, part], own_v[:, part]])
            logits = key[:, part] @ qs[part] / math.sqrt(size)
            attended_state[part] = logits.softmax(0) @ value[:, part]

        def finish(x: Tensor, name: str = name) -> Tensor:
            x = norm(weights, f"{name}.attention_norm", x, eps)
            inner = linear(weights, f"{name}.output", gelu(linear(weights, f"{name}.intermediate", x)))
            return norm(weights, f"{name}.output_norm", x + inner, eps)

        u = linear(weights, f"{name}.attention_output", attended_state)
        z = torch.sigmoid(linear(weights, "gate", torch.cat([hint, u, state])))
        state = finish(z * u + (1 - z) * state)
        context = finish(linear(weights, f"{name}.attention_output", attended) + context)
    return state, context.mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def classify(weights: Weights, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    features = torch.cat([torch.cat([a, b, (a - b).abs()]) for a, b in pairs])
    return linear(weights, "classifier.out_proj", linear(weights, "classifier.dense", features).clamp(min=0))
