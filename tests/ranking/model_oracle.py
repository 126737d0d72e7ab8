"""Section 1 of docs/design.md written once more, with loops over candidates and heads, in float64.

Imports nothing of the project: it takes a dictionary of weights by name, token ids, and sizes. The backbone is written
out too, so that tapped keys and values are checked as well.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = x @ weights[f"{name}.weight"].T
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    x = (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


BERT = {
    "layer": "encoder.layer.{}",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
DISTILBERT = {
    "layer": "transformer.layer.{}",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
ALBERT = {
    "layer": "encoder.albert_layer_groups.{}.albert_layers.0",
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "attention_output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "intermediate": "ffn",
    "output": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}
NAMES = {"distilbert": DISTILBERT, "albert": ALBERT}
# the tiny ALBERT's three layers share two groups of weights
GROUPS = {"albert": [0, 0, 1]}
ACTIVATIONS = {"albert": gelu_new}
PROJECTIONS = {"electra": "backbone.embeddings_project", "albert": "backbone.encoder.embedding_hidden_mapping_in"}


@dataclass(frozen=True)
class Sizes:
    """What weights do not tell."""

    kind: str
    layers: int
    heads: int
    eps: float
    first_position: int = 0
    window: int = 0
    """ModernBERT: how far tokens see in a layer that slides."""

    @property
    def activation(self):
        return ACTIVATIONS.get(self.kind, gelu)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, far: Tensor | None = None) -> Tensor:
    """(n, d) each; far (n, n) marks keys that a token does not see."""
    size = q.shape[1] // heads
    attended = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size)
        if far is not None:
            logits = logits.masked_fill(far, -torch.inf)
        attended[:, part] = logits.softmax(-1) @ v[:, part]
    return attended


def backbone(weights: Weights, ids: list[int], sizes: Sizes):
    """One text without padding: final vectors (n, d) and, for every layer, keys and values (n, d)."""
    if sizes.kind == "modernbert":
        return modernbert(weights, ids, sizes)
    prefix, eps = "backbone.embeddings", sizes.eps
    places = torch.arange(len(ids)) + sizes.first_position
    x = weights[f"{prefix}.word_embeddings.weight"][torch.tensor(ids)]
    x = x + weights[f"{prefix}.position_embeddings.weight"][places]
    if sizes.kind != "distilbert":
        x = x + weights[f"{prefix}.token_type_embeddings.weight"][0]
    x = norm(weights, f"{prefix}.LayerNorm", x, eps)
    if sizes.kind in PROJECTIONS:
        x = linear(weights, PROJECTIONS[sizes.kind], x)
    names = NAMES.get(sizes.kind, BERT)
    keys_values = []
    for number in GROUPS.get(sizes.kind, range(sizes.layers)):
        name = {part: f"backbone.{names['layer'].format(number)}.{path}" for part, path in names.items()}
        q, k, v = (linear(weights, name[part], x) for part in ("query", "key", "value"))
        keys_values.append((k, v))
        attended = linear(weights, name["attention_output"], attend(q, k, v, sizes.heads))
        x = norm(weights, name["attention_norm"], attended + x, eps)
        inner = linear(weights, name["output"], sizes.activation(linear(weights, name["intermediate"], x)))
        x = norm(weights, name["output_norm"], inner + x, eps)
    return x, keys_values


def rotate(x: Tensor, heads: int, theta: float) -> Tensor:
    """Turn coordinates i and i + D/2 of every head (n, d) by the angle place / theta^(2i/D)."""
    size = x.shape[1] // heads
    out = torch.empty_like(x)
    for place in range(len(x)):
        for h in range(heads):
            for i in range(size // 2):
                angle = place * theta ** (-2 * i / size)
                one, two = h * size + i, h * size + i + size // 2
                out[place, one] = x[place, one] * math.cos(angle) - x[place, two] * math.sin(angle)
                out[place, two] = x[place, two] * math.cos(angle) + x[place, one] * math.sin(angle)
    return out


def modernbert(weights: Weights, ids: list[int], sizes: Sizes):
    """Pre-norm, rotated queries and keys, a gated FFN; every layer but each third sees a window alone."""
    eps = sizes.eps
    x = weights["backbone.embeddings.tok_embeddings.weight"][torch.tensor(ids)]
    x = norm(weights, "backbone.embeddings.norm", x, eps)
    places = torch.arange(len(ids))
    far = (places[:, None] - places[None, :]).abs() > sizes.window
    keys_values = []
    for number in range(sizes.layers):
        name, slides = f"backbone.layers.{number}", number % 3 != 0
        normed = norm(weights, f"{name}.attn_norm", x, eps) if number else x
        q, k, v = linear(weights, f"{name}.attn.Wqkv", normed).chunk(3, dim=1)
        theta = 10_000.0 if slides else 160_000.0
        q, k = rotate(q, sizes.heads, theta), rotate(k, sizes.heads, theta)
        keys_values.append((k, v))
        x = x + linear(weights, f"{name}.attn.Wo", attend(q, k, v, sizes.heads, far if slides else None))
        inner, gate = linear(weights, f"{name}.mlp.Wi", norm(weights, f"{name}.mlp_norm", x, eps)).chunk(2, dim=1)
        x = x + linear(weights, f"{name}.mlp.Wo", gelu(inner) * gate)
    return norm(weights, "backbone.final_norm", x, eps), keys_values


def context_embeddings(weights: Weights, tokens: Tensor) -> Tensor:
    """E_0 (k, d) of one candidate's final vectors (n, d); without codes it is the first."""
    if "codes" not in weights:
        return tokens[:1]
    codes = weights["codes"]
    return torch.stack([(code @ tokens.T).softmax(-1) @ tokens for code in codes])


def interact(weights: Weights, context: Tensor, taps: list[tuple[Tensor, Tensor]], sizes: Sizes, without: str = ""):
    """One candidate (k, d) through all interaction layers: h and e, (d,) each; without "state" or "context" rows."""
    k, d = context.shape
    size = d // sizes.heads
    state = torch.zeros(d, dtype=torch.float64)
    for number, (key, value) in enumerate(taps):
        name = f"interaction.{number}"

        def finish(x: Tensor, name: str = name) -> Tensor:
            x = norm(weights, f"{name}.attention_norm", x, sizes.eps)
            inner = linear(weights, f"{name}.output", sizes.activation(linear(weights, f"{name}.intermediate", x)))
            return norm(weights, f"{name}.output_norm", x + inner, sizes.eps)

        hint = context.mean(0)
        if without != "state":
            qs = linear(weights, f"{name}.state_query", hint)
            attended = torch.zeros_like(qs)
            for h in range(sizes.heads):
                part = slice(h * size, (h + 1) * size)
                logits = key[:, part] @ qs[part] / math.sqrt(size)
                attended[part] = logits.softmax(0) @ value[:, part]
            u = linear(weights, f"{name}.attention_output", attended)
            z = torch.sigmoid(linear(weights, "gate", torch.cat([hint, u, state])))
            state = finish(z * u + (1 - z) * state)
        if without != "context":
            q, own_k, own_v = (linear(weights, f"{name}.{part}", context) for part in ("query", "key", "value"))
            attended = torch.zeros_like(q)
            for h in range(sizes.heads):
                part = slice(h * size, (h + 1) * size)
                for row in range(k):
                    logits = torch.cat([key[:, part] @ q[row, part], own_k[:, part] @ q[row, part]]) / math.sqrt(size)
                    attended[row, part] = logits.softmax(0) @ torch.cat([value[:, part], own_v[:, part]])
            context = finish(linear(weights, f"{name}.attention_output", attended) + context)
    return state, context.mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def classify(weights: Weights, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    features = torch.cat([torch.cat([a, b, (a - b).abs()]) for a, b in pairs])
    return linear(weights, "classifier.out_proj", linear(weights, "classifier.dense", features).clamp(min=0))
