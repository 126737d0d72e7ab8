"""`out`: results in memory of the caller, whatever its strides, and what is refused."""

import pytest
import torch

from mixkernels import (
    BackendError,
    DeviceError,
    DtypeError,
    ShapeError,
    candidate_attention,
    gate_layer_norm,
    residual_layer_norm,
    score_candidates,
)
from tests.kernels.attention_cases import FORMS, Case, device_of
from tests.kernels.test_plans import assert_equal, fast_backends, layer_calls, small, tensors_of


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "dtype"), [(1, torch.bfloat16), (1, torch.float32), (3, torch.float32)])
@pytest.mark.parametrize("layout", ["alternating rows", "contexts first", "heads apart"])
@fast_backends
def test_attention_writes_where_it_is_told(backend, form, k, dtype, layout):
    case, device = Case.random(n=5, k=k, b=2, form=form, lengths=[7, 3], dtype=dtype), device_of(backend)
    want = case.run(backend)
    lead, (heads, dim) = want.state.shape[:-2], want.state.shape[-2:]
    if layout == "alternating rows":
        room = torch.full((*lead, k + 1, heads, dim), 7.0, dtype=dtype, device=device)
        out = (room[..., :k, :, :], room[..., k, :, :])
    elif layout == "contexts first":
        context = torch.full((k, *lead, heads, dim), 7.0, dtype=dtype, device=device)
        out = (context.movedim(0, len(lead)), torch.full((*lead, heads, dim), 7.0, dtype=dtype, device=device))
    else:
        shapes = ((heads, *lead, k, dim), (heads, *lead, dim))
        out = tuple(torch.full(shape, 7.0, dtype=dtype, device=device).movedim(0, -2) for shape in shapes)
    for _ in range(3):
        for tensor in out:
            tensor.fill_(7.0)
        got = case.run(backend, out=out)
        assert_equal(tuple(tensor.cpu() for tensor in out), want[:2])
        assert_equal(got, want)
    with torch.no_grad():
        assert case.call(backend, out=out).context is out[0]


@pytest.mark.parametrize("name", layer_calls("torch", 0))
@fast_backends
def test_other_operators_write_where_they_are_told(backend, name):
    call = layer_calls(backend, 0)[name]
    want = tensors_of(call())
    out = [torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)[..., 1] for tensor in want]
    if "gate" in name or name in ("residual", "pool"):
        # rows of a larger tensor
        out = [torch.zeros(2, 7, 3, 16, dtype=want[0].dtype, device=want[0].device)[:, :, 1]]
    for _ in range(3):
        for tensor in out:
            tensor.zero_()
        got = call(out=tuple(out) if len(out) > 1 else out[0])
        assert_equal(out, want)
        assert_equal(got, want)


@pytest.mark.parametrize(
    ("context", "state", "error", "words"),
    [
        (torch.empty(1, 3, 2, 2, 8), torch.empty(1, 3, 2, 16), ShapeError, r"out context has shape \(1, 3, 2, 2, 8\)"),
        (torch.empty(1, 3, 2, 2, 16), torch.empty(3, 2, 16), ShapeError, r"out state has shape \(3, 2, 16\)"),
        (torch.empty(1, 3, 2, 2, 16), None, ShapeError, r"expected \(context, state\)"),
        (torch.empty(1, 3, 2, 2, 16).half(), torch.empty(1, 3, 2, 16), DtypeError, "out context has dtype"),
        (torch.empty(1, 3, 2, 2, 16, device="meta"), torch.empty(1, 3, 2, 16), DeviceError, "out context is on meta"),
        ([1.0], torch.empty(1, 3, 2, 16), DtypeError, "out context is a list"),
        (torch.empty(2, 2, 16).expand(1, 3, 2, 2, 16), torch.empty(1, 3, 2, 16), ShapeError, "may share memory"),
    ],
)
def test_an_out_that_does_not_fit_is_named(context, state, error, words):
    inputs = small(backend="torch")
    for _ in range(2):
        with pytest.raises(error, match=words):
            candidate_attention(**inputs, out=(context, state))
        candidate_attention(**inputs)


def test_out_shares_no_memory_with_inputs_or_itself():
    inputs = small(backend="torch")
    fine = (torch.empty(1, 3, 2, 2, 16), torch.empty(1, 3, 2, 16))
    for _ in range(3):
        candidate_attention(**inputs, out=fine)
        with pytest.raises(ShapeError, match="out and context_query share memory"):
            candidate_attention(**inputs, out=(inputs["context_query"][None], fine[1]))
        with pytest.raises(ShapeError, match="tensors of out share memory"):
            candidate_attention(**inputs, out=(fine[0], fine[0][:, :, 0]))
        # the last context's row would be the state's
        room = torch.empty(1, 3, 3, 2, 16)
        with pytest.raises(ShapeError, match="tensors of out share memory"):
            candidate_attention(**inputs, out=(room[:, :, :2], room[:, :, 1]))
    x, weight = torch.randn(3, 16), torch.ones(16)
    for _ in range(3):
        residual_layer_norm(x, x.clone(), weight, weight, out=torch.empty(3, 16))
        with pytest.raises(ShapeError, match="out and residual share memory"):
            residual_layer_norm(x.clone(), x, weight, weight, out=x)
        with pytest.raises(ShapeError, match="out and state share memory"):
            gate_layer_norm(x.clone(), x.clone(), x, weight, weight, out=x)
    with pytest.raises(ShapeError, match=r"out has shape \(2, 16\)"):
        residual_layer_norm(x, x.clone(), weight, weight, out=torch.empty(2, 16))
    with pytest.raises(ShapeError, match="out holds 1 tensors"):
        score_candidates(x[:, None], x[:, None], x, x, weight, weight, top_k=2, out=(torch.empty(2),))


def test_out_is_for_inference():
    inputs = small(backend="torch")
    out = (torch.empty(1, 3, 2, 2, 16), torch.empty(1, 3, 2, 16))
    learned = {**inputs, "key": inputs["key"].clone().requires_grad_()}
    for _ in range(2):
        candidate_attention(**inputs, out=out)
        with pytest.raises(BackendError, match="out is for inference"):
            candidate_attention(**learned, out=out)
    with torch.no_grad():
        candidate_attention(**learned, out=out)
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(BackendError, match="out is for inference"):
        residual_layer_norm(x, torch.randn(3, 16), torch.ones(16), torch.ones(16), out=torch.empty(3, 16))
