"""Models, queries and streamed candidates for the tests of ranking."""

import torch

from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import MixEncoderModel, QueryState
from tests.conftest import backbone_config

FORMS = [
    {},
    {"num_context_embeddings": 3, "dual_term": True},
    {"num_context_embeddings": 16, "interaction_layers": (0, 1, 2)},
    {"interaction_layers": (1, -1), "dual_term": True},
    {"state_row": False, "num_context_embeddings": 3, "interaction_layers": (0, 2)},
    {"context_update": False, "num_context_embeddings": 2, "interaction_layers": (0, 2), "dual_term": True},
]
N = 1100
"""Two full pieces, and some."""


def make_model(options, dtype=torch.float32, **changes) -> MixEncoderModel:
    torch.manual_seed(0)
    config = MixEncoderConfig(backbone_config(initializer_range=0.3, **changes), **options)
    return MixEncoderModel(config).eval().to(dtype)


def queries(model, lengths=(9, 4, 17)) -> QueryState:
    """Queries of several lengths, padded."""
    ids = torch.randint(5, 27, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.inference_mode():
        return model.encode_query(ids, mask)


def contexts(model, count=N, seed=1) -> torch.Tensor:
    return torch.randn(count, *model.context_shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def chunks(rows, positions=None, size=400):
    count = len(next(iter(rows.values())))
    positions = torch.arange(count) if positions is None else positions
    return [
        (positions[start : start + size], {name: tensor[start : start + size] for name, tensor in rows.items()})
        for start in range(0, count, size)
    ]


def dense(ranking, count=N) -> torch.Tensor:
    """Scores (B, N) by position."""
    assert ranking.ids.shape[1] == count
    return torch.full((len(ranking.ids), count), torch.nan).scatter_(1, ranking.ids, ranking.scores)


@torch.inference_mode()
def exact_scores(model, query_state, context, score="full") -> torch.Tensor:
    """The model's own scores in float64."""
    state = QueryState(
        tuple(key.double() for key in query_state.keys),
        tuple(value.double() for value in query_state.values),
        query_state.lengths,
        *(None if vector is None else vector.double() for vector in (query_state.pooled, query_state.first)),
    )
    parameters = {name: parameter.double() for name, parameter in model.named_parameters()}
    model = make_model_like(model)
    model.load_state_dict(parameters)
    return getattr(model.interact(state, context.double()), score)


def make_model_like(model) -> MixEncoderModel:
    return MixEncoderModel(model.config).eval().double()


def ratio_of_errors(got, want, plain) -> float:
    """Largest error beside the largest that PyTorch's plain expressions make in the same precision."""
    floor = 1e-6 * float(want.abs().max())
    return float((got - want).abs().max()) / (float((plain - want).abs().max()) + floor)
