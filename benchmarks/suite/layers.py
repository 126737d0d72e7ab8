"""One interaction layer and its score, against the same layer over standard attention; MiniLM's shape.

"fused" is the path that ranks an index: what depends only on a candidate is stored, and the rest runs in reused memory.
"torch" is the model's own layer on mixkernels' attention, as in training. Rivals are that layer with another attention.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention import Step, gradients, relative_error
from benchmarks.gpu.formulations import BATCH_RIVALS, ours, ours_batch
from benchmarks.measuring.costs import MINILM, interaction_cost, projection_cost, times
from benchmarks.measuring.formulations import RIVALS, Inputs
from benchmarks.measuring.models import backbone_config
from benchmarks.suite.case import Case, Contender, Prepared
from benchmarks.suite.operators import checked, mode_call
from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import Attend, MixEncoderModel, QueryState
from mixencoder.ranking.interaction import prepare_layers
from mixencoder.ranking.plan import PIECE
from mixencoder.ranking.workspace import Workspace
from mixkernels.roofline import Cost

CANDIDATES = 1024
TOKENS = (16, 64)
BATCH, POOL = 16, 64
ATTENTIONS = ("sdpa-expanded", "einsum-concatenated", "two-pass")


def random_model() -> MixEncoderModel:
    """A published MixEncoder with random weights, in inference mode: one layer, k = 1."""
    torch.manual_seed(0)
    return MixEncoderModel(MixEncoderConfig(backbone_config())).eval()


def score(model: MixEncoderModel, attend: Attend, context: Tensor) -> Tensor:
    """Scores of candidates (N, k, d): the model's layer, then ``h . e``."""
    h, e = model.run_interaction(context, [attend])
    return (h * e).sum(dim=-1)


def _attention_functions(key: Tensor, value: Tensor) -> dict[str, Attend]:
    """Attention of each contender to one query's keys and values (m, H, D)."""
    ways: dict[str, Callable[[Inputs], Any]] = {"torch": partial(ours, backend="torch")}
    ways |= {name: RIVALS[name] for name in ATTENTIONS}
    return {name: _attend_one(way, key, value) for name, way in ways.items()}


def _attend_one(way: Callable[[Inputs], Any], key: Tensor, value: Tensor) -> Attend:
    return lambda *rows: way(Inputs(*rows, key, value))


def forward_case(tokens: int, **options: Any) -> Case:
    """A query of m tokens against a pool of candidates."""
    return Case(
        "layers",
        "interaction layer",
        {"N": CANDIDATES, "k": 1, "m": tokens, "d": MINILM.d, "H": MINILM.heads},
        torch.float32,
        ("fused", "torch"),
        ATTENTIONS,
        partial(_prepare_forward, tokens),
        **options,
    )


def _prepare_forward(tokens: int, names: Collection[str]) -> Prepared:
    model, generator = random_model(), torch.Generator().manual_seed(0)
    sizes = (tokens, MINILM.heads, MINILM.d // MINILM.heads)
    key, value = (torch.randn(sizes, generator=generator) for _ in range(2))
    context = torch.randn(CANDIDATES, 1, MINILM.d, generator=generator)
    ways = _attention_functions(key, value)
    with torch.no_grad():
        wide = copy.deepcopy(model).double()
        exact = score(wide, _attention_functions(key.double(), value.double())["einsum-concatenated"], context.double())
    contenders = {
        name: _fused(model, key, value, context)
        if name == "fused"
        else Contender(partial(score, model, ways[name], context))
        for name in names
    }
    return Prepared(
        contenders,
        lambda name, result: checked(relative_error([result], [exact]), torch.float32, name),
        layer_cost(CANDIDATES, tokens),
    )


def layer_cost(candidates: int, tokens: int, *, queries: int = 1) -> Cost:
    """Cost of a layer over a pool that all queries share, with nothing stored: the pool is projected once."""
    rest = interaction_cost(
        MINILM, candidates * queries, 1, tokens, torch.float32, stored_bytes=MINILM.d * torch.float32.itemsize
    )
    return projection_cost(MINILM, candidates, 1, torch.float32).and_then(rest)


def _fused(model: MixEncoderModel, key: Tensor, value: Tensor, context: Tensor) -> Contender:
    """The layers as `mixencoder.ranking.streaming` runs them, piece by piece, on inputs projected ahead."""
    layers, workspace = prepare_layers(model), Workspace(torch.float32, torch.device("cpu"))
    lengths = torch.tensor([len(key)])
    query = layers.query(QueryState((key.unsqueeze(0),), (value.unsqueeze(0),), lengths, None), 0)
    pieces = []
    with torch.inference_mode():
        for piece in context.split(PIECE):
            # projections stay in the workspace that made them
            hint = piece[:, 0]
            pieces.append((layers.project(Workspace(torch.float32, hint.device), 0, piece, hint), hint))

    def call() -> Tensor:
        return torch.cat([layers.interact(workspace, inputs, hint, query) for inputs, hint in pieces])

    inputs, hint = pieces[0]
    stored = sum(part.nbytes for part in inputs if part is not None) // len(hint)
    cost = interaction_cost(MINILM, CANDIDATES, 1, len(key), torch.float32, stored_bytes=stored)
    return Contender(call, cost, facts={"stored": "what depends on the candidate alone"})


# -- training ----------------------------------------------------------------------------------------------------------


def training_case(**options: Any) -> Case:
    """A training step of B queries that share a pool; gradients of the layer's weights and of all its inputs."""
    return Case(
        "layers",
        "interaction layer training step",
        {"B": BATCH, "N": POOL, "k": 1, "m": 64, "d": MINILM.d, "H": MINILM.heads},
        torch.float32,
        ("torch",),
        tuple(BATCH_RIVALS),
        _prepare_training,
        gradients=True,
        **options,
    )


def _prepare_training(names: Collection[str]) -> Prepared:
    model, generator = random_model(), torch.Generator().manual_seed(0)
    sizes = (BATCH, 64, MINILM.heads, MINILM.d // MINILM.heads)
    tensors = [torch.randn(size, generator=generator) for size in ((POOL, 1, MINILM.d), sizes, sizes)]
    grads = (torch.randn(BATCH, POOL, generator=generator),)
    ways: Mapping[str, Callable[..., Any]] = {"torch": partial(ours_batch, backend="torch"), **BATCH_RIVALS}

    def step_of(one: MixEncoderModel, dtype: torch.dtype) -> Step:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        return Step((*leaves, *_weights(one)), tuple(grad.to(dtype) for grad in grads))

    def forward_of(one: MixEncoderModel, way: Callable[..., Any]) -> Callable[..., Tensor]:
        # the weights are leaves of the step, and the model's own
        return lambda context, key, value, *weights: score(one, lambda *rows: way(*rows, key, value), context)

    wide = copy.deepcopy(model).double()
    exact = gradients(forward_of(wide, BATCH_RIVALS["einsum-concatenated"]), step_of(wide, torch.float64))
    step = step_of(model, torch.float32)
    return Prepared(
        {name: Contender(mode_call(forward_of(model, ways[name]), step, forward_too=True)) for name in names},
        lambda name, result: checked(relative_error(result, exact), torch.float32, name),
        # a product has two gradients, each as large as itself
        times(layer_cost(POOL, 64, queries=BATCH), 3),
    )


def _weights(model: MixEncoderModel) -> Sequence[Tensor]:
    """Parameters that get a gradient: the layer's and the gate's."""
    return [*model.interaction.parameters(), *model.gate.parameters()]


CASES = (
    *(forward_case(tokens, quick=ATTENTIONS[1:] if tokens == TOKENS[0] else ()) for tokens in TOKENS),
    training_case(),
)
