"""What is stored of a candidate: shapes, sizes, exactness, and rows that do not notice their neighbours."""

import dataclasses

import pytest
import torch

from mixencoder.configuration import MixEncoderConfig
from mixencoder.errors import InputError, NonFiniteError
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.record_format import ENCODE_CHUNK, LAYOUTS, PRECISIONS, RecordFormat
from tests.conftest import backbone_config

FORMS = [{}, {"num_context_embeddings": 3}, {"state_row": False}, {"context_update": False, "dual_term": True}]


def make_model(**options) -> MixEncoderModel:
    torch.manual_seed(0)
    return MixEncoderModel(MixEncoderConfig(backbone_config(initializer_range=0.3), **options)).eval()


def contexts(model: MixEncoderModel, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *model.context_shape, generator=torch.Generator().manual_seed(seed))


def numbers(record_format: RecordFormat, rows: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    out = {name: torch.full((count, *shape), torch.nan) for name, shape in record_format.parts.items()}
    record_format.read(rows, 0, count, out, 0)
    return out


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_have_the_schemas_shapes_dtypes_and_bytes(options, layout, precision):
    model = make_model(**options)
    record_format = RecordFormat(model, layout, precision)
    rows = record_format.encode(contexts(model, 5))
    assert list(rows) == [field.name for field in record_format.schema.fields]
    for name, shape, dtype in map(dataclasses.astuple, record_format.schema.fields):
        assert rows[name].shape == (5, *shape)
        assert rows[name].dtype == getattr(torch, dtype)
        assert rows[name].is_contiguous()
    total = sum(tensor.numel() * tensor.element_size() for tensor in rows.values())
    assert total == 5 * record_format.bytes_per_candidate
    assert {name: len(tensor) for name, tensor in record_format.encode(contexts(model, 0)).items()} == dict.fromkeys(
        rows, 0
    )


def test_projected_rows_are_what_the_first_layer_computes():
    model = make_model(num_context_embeddings=3)
    record_format = RecordFormat(model, "projected", "float32")
    context = contexts(model, 4)
    stored = numbers(record_format, record_format.encode(context), 4)
    layer, d, heads = model.interaction[0], context.shape[-1], 2
    with torch.no_grad():
        hint = context.mean(dim=1)
        query, key = layer.query(context), layer.key(context)
        own = torch.zeros(4, 3, 3, heads)
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            own[..., head] = query[..., part] @ key[..., part].transpose(1, 2) / (d // heads) ** 0.5
        want = {
            "context": context,
            "context_query": query,
            "context_value": layer.value(context),
            "own_logits": own,
            "state_query": layer.state_query(hint),
            "gate": hint @ model.gate.weight[:, :d].T + model.gate.bias,
        }
    assert set(stored) == set(want)
    for name, tensor in want.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", FORMS)
def test_a_model_stores_no_part_that_it_does_not_read(options):
    parts = set(RecordFormat(make_model(**options), "projected").parts)
    assert ("state_query" in parts) == ("gate" in parts) == options.get("state_row", True)
    assert ("context_value" in parts) == ("context" in parts) == options.get("context_update", True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_number_is_off_by_no_more_than_its_precision_allows(precision):
    model = make_model(num_context_embeddings=2)
    exact = RecordFormat(model, "projected", "float32")
    record_format = RecordFormat(model, "projected", precision)
    # magnitudes of ten decades, each candidate its own
    context = contexts(model, 10) * 10.0 ** torch.arange(-8, 2).view(-1, 1, 1)
    context[0, 0, : context.shape[-1] // 2] = 0
    want, got = (numbers(form, form.encode(context), 10) for form in (exact, record_format))
    for name, tensor in want.items():
        if precision == "int8" and name != "own_logits":
            # half a step; a scale is at most 2^-7 above the least that will do
            largest = tensor.unflatten(-1, (2, -1)).abs().amax(dim=-1, keepdim=True)
            budget = (largest / 254 * (1 + 2**-7)).expand_as(tensor.unflatten(-1, (2, -1))).flatten(-2)
        else:
            info = torch.finfo(torch.float16 if precision == "int8" else getattr(torch, precision))
            budget = tensor.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2
        assert ((got[name] - tensor).abs() <= budget * (1 + 1e-6)).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stored_row_does_not_notice_its_neighbours(layout, precision, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make_model(num_context_embeddings=3)
        record_format = RecordFormat(model, layout, precision)
        context = contexts(model, 2 * ENCODE_CHUNK + 7)
        crowd = record_format.encode(context)
        order = torch.randperm(len(context), generator=torch.Generator().manual_seed(0))
        shuffled = record_format.encode(context[order])
        for name, tensor in crowd.items():
            assert torch.equal(shuffled[name], tensor[order])
        for i in (0, ENCODE_CHUNK - 1, len(context) - 1):
            alone = record_format.encode(context[i : i + 1])
            assert all(torch.equal(alone[name][0], tensor[i]) for name, tensor in crowd.items())
    finally:
        torch.set_num_threads(before)


def test_numbers_too_large_for_a_precision_are_an_error():
    model = make_model()
    context = contexts(model, 3)
    context[1] *= 1e5
    with pytest.raises(NonFiniteError, match="context of 1 of 3 candidates is not finite in float16"):
        RecordFormat(model, "compact", "float16").encode(context)
    RecordFormat(model, "compact", "bfloat16").encode(context)
    context[2, 0, 0] = torch.nan
    for precision in PRECISIONS:
        with pytest.raises(NonFiniteError, match="is not finite"):
            RecordFormat(model, "projected", precision).encode(context)


def test_bad_arguments_are_named():
    model = make_model()
    with pytest.raises(InputError, match="layout is 'wide'; expected one of projected, compact"):
        RecordFormat(model, "wide")
    with pytest.raises(InputError, match="precision is 'int4'; expected one of float32"):
        RecordFormat(model, "compact", "int4")
    with pytest.raises(InputError, match=r"context is \(2, 3, 32\); expected context embeddings \(N, 1, 32\)"):
        RecordFormat(model).encode(torch.zeros(2, 3, 32))
