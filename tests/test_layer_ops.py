"""The contract of the operators of the rest of the layer, one property a test, every backend."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import count_kernel_run
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracle import gate_norm_by_loops, residual_norm_by_loops, scores_by_loops
from torch import Tensor
from torch.nn import functional as F

from mixkernels import (
    BackendError,
    DeviceError,
    DtypeError,
    ShapeError,
    TopK,
    gate_layer_norm,
    residual_layer_norm,
    score_candidates,
    select_backend,
)
from mixkernels.ranking import best_of, pack_keys, unpack_keys

BACKENDS = ["reference", "torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-12
# one unit in the last place of an output near 4; of a score, a sum of d products near 1, that of its partial sums
ABSOLUTE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ABSOLUTE_SCORE = 2e-5


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request, pytestconfig) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        count_kernel_run(pytestconfig)
    return request.param


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * randn(d, seed=101, dtype=dtype), 0.3 * randn(d, seed=102, dtype=dtype)


def scoring_rows(batch=2, n=11, k=3, d=48, *, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Inputs of `score_candidates`: contexts, their residual, states, theirs, weight, bias."""
    shapes = [(batch, n, k, d)] * 2 + [(batch, n, d)] * 2
    return [randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)] + [*parameters(d, dtype)]


def run(operator, backend: str, *tensors: Tensor | None, **options):
    """Call an operator on the backend's device and bring the result back."""
    device = device_of(backend)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    if options.get("running") is not None:
        options["running"] = TopK(*(t.to(device) for t in options["running"]))
    result = operator(*(None if t is None else t.to(device) for t in tensors), backend=backend, **options)
    return result.cpu() if isinstance(result, Tensor) else TopK(*(t.cpu() for t in result))


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 48), (3, 5, 100), (1,), (2, 3, 2, 20), (33, 16)])
def test_residual_norm_equals_the_formula_written_with_loops(backend, dtype, shape):
    x, residual = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    weight, bias = parameters(shape[-1], dtype)
    exact = residual_norm_by_loops(x, residual, weight, bias, EPS)
    got = run(residual_layer_norm, backend, x, residual, weight, bias)
    plain = F.layer_norm(x + residual, shape[-1:], weight, bias, EPS)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert error(got, exact) <= 2 * error(plain, exact) + ABSOLUTE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "first layer"])
@pytest.mark.parametrize("shape", [(9, 48), (2, 5, 100)])
def test_gate_norm_equals_the_formula_written_with_loops(backend, dtype, has_state, shape):
    gate, update, state = (randn(*shape, seed=seed, dtype=dtype) for seed in range(3))
    gate, state = 3 * gate, state if has_state else None
    weight, bias = parameters(shape[-1], dtype)
    exact = gate_norm_by_loops(gate, update, state, weight, bias, EPS)
    got = run(gate_layer_norm, backend, gate, update, state, weight, bias)
    z = gate.sigmoid()
    mixed = z * update if state is None else torch.lerp(state, update, z)
    plain = F.layer_norm(mixed, shape[-1:], weight, bias, EPS)
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * error(plain, exact) + ABSOLUTE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("with_additive", [True, False], ids=["additive", "alone"])
def test_scores_equal_the_formula_written_with_loops(backend, dtype, k, with_additive):
    rows = scoring_rows(n=37, k=k, dtype=dtype)
    additive = randn(2, 37, seed=9) if with_additive else None
    exact = scores_by_loops(*rows, EPS, additive)
    got = run(score_candidates, backend, *rows, additive=additive)
    context, context_residual, state, state_residual, weight, bias = rows
    e = F.layer_norm(context + context_residual, (48,), weight, bias, EPS).mean(dim=-2)
    h = F.layer_norm(state + state_residual, (48,), weight, bias, EPS)
    plain = (h.float() * e.float()).sum(dim=-1) + (0 if additive is None else additive)
    assert got.dtype == torch.float32
    assert got.shape == (2, 37)
    assert error(got, exact) <= 2 * error(plain, exact) + ABSOLUTE_SCORE


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64_is_computed_in_float64(backend):
    rows = scoring_rows(dtype=torch.float64)
    additive = randn(2, 11, dtype=torch.float64)
    context, residual, state, _, weight, bias = rows
    for got, exact in (
        (score_candidates(*rows, additive=additive, backend=backend), scores_by_loops(*rows, EPS, additive)),
        (
            residual_layer_norm(context, residual, weight, bias, backend=backend),
            residual_norm_by_loops(context, residual, weight, bias, EPS),
        ),
        (
            gate_layer_norm(state, state + 1, state * 2, weight, bias, backend=backend),
            gate_norm_by_loops(state, state + 1, state * 2, weight, bias, EPS),
        ),
    ):
        assert got.dtype == torch.float64
        assert error(got, exact) < 1e-13
    best = score_candidates(*rows, top_k=4, backend=backend)
    exact = scores_by_loops(*rows, EPS, None).sort(dim=-1, descending=True)
    assert best.scores.dtype == torch.float64
    assert torch.equal(best.ids, exact.indices[:, :4])


def test_float32_parameters_serve_rows_of_low_precision(backend):
    x, residual = randn(4, 48, dtype=torch.bfloat16), randn(4, 48, seed=1, dtype=torch.bfloat16)
    weight, bias = parameters(48)
    exact = residual_norm_by_loops(x, residual, weight, bias, EPS)
    got = run(residual_layer_norm, backend, x, residual, weight, bias)
    assert got.dtype == torch.bfloat16
    assert error(got, exact) <= ABSOLUTE[torch.bfloat16]


def test_strided_rows_are_read_where_they_lie(backend):
    weight, bias = parameters(20)
    stacked = randn(2, 3, 4, 20)
    # context rows out of stacked rows, a pool over queries, transposes, and more dimensions than the kernels address
    views = [
        (stacked[:, :, :3], randn(3, 3, 20, seed=1)),
        (stacked[:, :, 3], stacked.transpose(0, 1)[:, :, 0].transpose(0, 1)),
        (randn(3, 5, 40, seed=2)[..., ::2], randn(20, 5, 3, seed=3).permute(2, 1, 0)),
        (randn(3, 2, 4, 2, 20, seed=4).permute(3, 2, 1, 0, 4), randn(2, 4, 2, 3, 20, seed=5)),
    ]
    for x, residual in views:
        assert not (x.is_contiguous() and residual.is_contiguous())
        plain = residual.expand(x.shape).contiguous()
        got = run(residual_layer_norm, backend, x, residual, weight, bias)
        assert got.is_contiguous()
        torch.testing.assert_close(got, run(residual_layer_norm, backend, x.contiguous(), plain, weight, bias))
        got = run(gate_layer_norm, backend, x, x.flip(0), residual, weight, bias)
        expected = run(gate_layer_norm, backend, x.contiguous(), x.flip(0).contiguous(), plain, weight, bias)
        torch.testing.assert_close(got, expected)


def test_scoring_reads_stacked_rows_and_expanded_pools(backend):
    weight, bias = parameters(20)
    stacked = randn(2, 9, 4, 20)
    pool, pool_state = randn(9, 3, 20, seed=1), randn(9, 20, seed=2)
    additive = randn(9, seed=3)
    views = (stacked[:, :, :3], pool, stacked[:, :, 3], pool_state)
    got = run(score_candidates, backend, *views, weight, bias, additive=additive)
    dense = [stacked[:, :, :3], pool.expand(2, 9, 3, 20), stacked[:, :, 3], pool_state.expand(2, 9, 20)]
    dense = [tensor.contiguous() for tensor in dense]
    exact = scores_by_loops(*dense, weight, bias, EPS, additive.expand(2, 9))
    assert error(got, exact) < ABSOLUTE_SCORE
    alone = run(score_candidates, backend, *(tensor[0] for tensor in dense), weight, bias, additive=additive)
    assert alone.shape == (9,)
    torch.testing.assert_close(alone, got[0], rtol=0, atol=ABSOLUTE_SCORE)
    best = run(score_candidates, backend, *(tensor[0] for tensor in dense), weight, bias, additive=additive, top_k=2)
    assert best.ids.tolist() == exact[0].argsort(descending=True)[:2].tolist()


def test_no_candidates_give_empty_results(backend):
    rows = scoring_rows(n=0)
    assert run(residual_layer_norm, backend, *rows[:2], *rows[4:]).shape == (2, 0, 3, 48)
    assert run(gate_layer_norm, backend, rows[2], rows[3], None, *rows[4:]).shape == (2, 0, 48)
    assert run(score_candidates, backend, *rows).shape == (2, 0)
    best = run(score_candidates, backend, *rows, top_k=3)
    assert best.scores.shape == best.ids.shape == (2, 0)
    running = TopK(torch.tensor([[2.0, 1.0]] * 2), torch.tensor([[7, 5]] * 2))
    kept = run(score_candidates, backend, *rows, top_k=1, running=running)
    assert (kept.scores.tolist(), kept.ids.tolist()) == ([[2.0]] * 2, [[7]] * 2)
    leaves = [tensor.clone().requires_grad_() for tensor in rows]
    total = score_candidates(*leaves, backend="torch" if backend == "triton" else backend).sum()
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, leaves))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, interpreted: the sigmoid of -200 is 0
def test_rows_without_variance_and_large_rows_stay_finite(backend):
    weight, bias = parameters(48)
    x = torch.stack([torch.full((48,), 3.0), randn(48) * 1e15, randn(48) + 1e4, torch.zeros(48)])
    got = run(residual_layer_norm, backend, x, torch.zeros_like(x), weight, bias)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0], bias)
    torch.testing.assert_close(got[3], bias)
    gates = torch.tensor([-200.0, 200.0, 0.0, 88.0])[:, None].expand(4, 48)
    assert run(gate_layer_norm, backend, gates, x, -x, weight, bias).isfinite().all()


def test_every_output_element_is_written(backend):
    rows = scoring_rows(n=40, k=2)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        results = [
            run(residual_layer_norm, backend, *rows[:2], *rows[4:]),
            run(gate_layer_norm, backend, rows[2], rows[3], None, *rows[4:]),
            run(score_candidates, backend, *rows),
            run(score_candidates, backend, *rows, top_k=100).scores,
        ]
        results += gradients_of(score_candidates, backend, rows)
        results += gradients_of(residual_layer_norm, backend, [*rows[:2], *rows[4:]])
        results += gradients_of(gate_layer_norm, backend, [rows[2], rows[3], rows[2] + 1, *rows[4:]])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


def gradients_of(operator, backend: str, inputs: list[Tensor | None], **options) -> list[Tensor]:
    """Gradients of a weighted sum of the operator's output, on the CPU."""
    device = device_of(backend)
    leaves = [None if t is None else t.to(device).detach().requires_grad_() for t in inputs]
    out = operator(*leaves, backend=backend, **options)
    weight = torch.arange(out.numel(), device=device, dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [gradient.cpu() for gradient in torch.autograd.grad((out * weight).sum(), wanted)]


def formula(operator):
    """Write an operator for autograd in float64, with nothing of the project."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def score(c, c_residual, s, s_residual, weight, bias, backend):
        e, h = norm(c + c_residual, weight, bias).mean(dim=-2), norm(s + s_residual, weight, bias)
        return (e * h).sum(dim=-1)

    def gate(logits, u, h, weight, bias, backend):
        z = logits.sigmoid()
        return norm(z * u if h is None else z * u + (1 - z) * h, weight, bias)

    def residual(x, r, weight, bias, backend):
        return norm(x + r, weight, bias)

    return {score_candidates: score, gate_layer_norm: gate, residual_layer_norm: residual}[operator]


GRADIENT_CASES = {
    "residual": (residual_layer_norm, lambda: [randn(2, 9, 3, 20), randn(9, 3, 20, seed=1), *parameters(20)]),
    "residual, stacked": (
        residual_layer_norm,
        lambda: [randn(5, 4, 48)[:, :3], randn(5, 4, 48, seed=1)[:, 1:], *parameters(48)],
    ),
    "gate": (gate_layer_norm, lambda: [*(randn(7, 20, seed=i) for i in range(3)), *parameters(20)]),
    "gate, first layer": (gate_layer_norm, lambda: [randn(7, 20), randn(7, 20, seed=1), None, *parameters(20)]),
    "scores": (score_candidates, scoring_rows),
    "scores, pool": (
        score_candidates,
        lambda: [randn(2, 9, 1, 20), randn(9, 1, 20, seed=1), randn(2, 9, 20), randn(9, 20), *parameters(20)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_equal_those_of_the_formula_in_float64(backend, case, dtype):
    operator, make = GRADIENT_CASES[case]
    inputs = [None if tensor is None else tensor.to(dtype) for tensor in make()]
    exact = gradients_of(formula(operator), backend, [None if t is None else t.double() for t in inputs])
    plain = gradients_of(formula(operator), backend, inputs)
    for got, usual, want in zip(gradients_of(operator, backend, inputs), plain, exact, strict=True):
        assert got.dtype == dtype
        # a gradient's own rounding, relative to its largest element
        rounding = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * max(1.0, want.abs().max().item())
        assert error(got, want) <= 2 * error(usual, want) + rounding


def test_weight_gradients_are_summed_over_more_rows_than_one_program_takes(backend, monkeypatch):
    if backend == "triton":
        from mixkernels.triton_backend import rows

        monkeypatch.setattr(rows, "_MOST_SUMMING_PROGRAMS", 3)
        assert rows.runs(150, 32) == (3, 2)
    inputs = [randn(150, 16), randn(150, 16, seed=1), *parameters(16)]
    exact = gradients_of(formula(residual_layer_norm), backend, [t.double() for t in inputs])
    twice = [gradients_of(residual_layer_norm, backend, inputs) for _ in range(2)]
    for got, again, want in zip(*twice, exact, strict=True):
        assert torch.equal(got, again)
        assert error(got, want) < 2e-5


def test_a_gradient_without_strides_and_additive_scores_differentiate(backend):
    device = device_of(backend)
    leaves = [tensor.to(device).requires_grad_() for tensor in scoring_rows(n=5)]
    additive = randn(5).to(device).requires_grad_()
    score_candidates(*leaves, additive=additive, backend=backend).sum().backward()
    torch.testing.assert_close(additive.grad.cpu(), torch.full((5,), 2.0))
    x = randn(6, 20).to(device).requires_grad_()
    weight, bias = (tensor.to(device).requires_grad_() for tensor in parameters(20))
    residual_layer_norm(x, x, weight, bias, backend=backend).sum().backward()
    torch.testing.assert_close(bias.grad.cpu(), torch.full((20,), 6.0))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", ["residual", "gate", "gate, first layer", "scores"])
def test_gradcheck(backend, case):
    operator, _ = GRADIENT_CASES[case]
    shapes = {
        "residual": [(2, 5), (5,), (5,), (5,)],
        "gate": [(2, 5)] * 3 + [(5,)] * 2,
        "gate, first layer": [(2, 5)] * 2 + [None] + [(5,)] * 2,
        "scores": [(2, 3, 2, 5), (3, 2, 5), (2, 3, 5), (3, 5), (5,), (5,)],
    }[case]
    inputs = [
        None if shape is None else randn(*shape, seed=seed, dtype=torch.float64).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    assert torch.autograd.gradcheck(lambda *tensors: operator(*tensors, backend=backend), inputs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("k", "d"), [(1, 384), (3, 100), (2, 33), (2, 5000)])
def test_a_candidates_bits_do_not_depend_on_its_neighbours_on_the_torch_path(k, d, threads):
    count = 400 if d < 1000 else 40
    context, context_residual, state, state_residual, weight, bias = scoring_rows(1, count, k, d)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:

        def score(pick) -> Tensor:
            rows = (tensor[:, pick] for tensor in (context, context_residual, state, state_residual))
            return score_candidates(*rows, weight, bias, backend="torch")[0]

        crowd = score(slice(None))
        assert torch.equal(score(order), crowd[order])
        for start, stop in ((0, 1), (count - 1, count), (17, 20), (3, count - 5)):
            assert torch.equal(score(slice(start, stop)), crowd[start:stop])
        gated = gate_layer_norm(state[0], state_residual[0], context[0, :, 0], weight, bias, backend="torch")
        summed = residual_layer_norm(state[0], state_residual[0], weight, bias, backend="torch")
        for pick in ([0], [count - 1], order.tolist(), [5, 2, 7]):
            rows = (state[0, pick], state_residual[0, pick])
            again = gate_layer_norm(*rows, context[0, pick, 0], weight, bias, backend="torch")
            assert torch.equal(again, gated[pick])
            assert torch.equal(residual_layer_norm(*rows, weight, bias, backend="torch"), summed[pick])
    finally:
        torch.set_num_threads(before)


def test_permuting_candidates_permutes_scores(backend):
    rows = scoring_rows(n=70, k=2)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    scores = run(score_candidates, backend, *rows)
    permuted = run(score_candidates, backend, *(tensor[:, order] for tensor in rows[:4]), *rows[4:])
    torch.testing.assert_close(permuted, scores[:, order], rtol=0, atol=ABSOLUTE_SCORE)


def test_the_best_are_those_of_all_scores(backend):
    rows = scoring_rows(n=100, k=1, d=16)
    scores = run(score_candidates, backend, *rows)
    for top_k in (1, 10, 40, 1000):
        best = run(score_candidates, backend, *rows, top_k=top_k, first_id=50)
        expected = scores.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(best.scores, expected.values[:, :top_k])
        assert torch.equal(best.ids, expected.indices[:, :top_k] + 50)


FEW = st.sampled_from([0.0, -0.0, 1.0, 1.5, -1.0, -2.5, math.inf, -math.inf, 1e-40, 3e38])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scores=st.lists(FEW, min_size=1, max_size=90),
    top_k=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 90), max_size=3),
    first=st.sampled_from([0, 7, 2**31 - 3, 2**32 - 90]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_chunks_rank_as_one_sort_with_ties_to_the_lower_id(backend, scores, top_k, cuts, first):
    # with weight and bias zero the additive score is all there is
    d, scores = 4, torch.tensor(scores).tolist()
    zero = torch.zeros(d)
    edges = sorted({0, len(scores), *(cut for cut in cuts if cut < len(scores))})
    best = None
    for start, stop in itertools.pairwise(edges):
        rows = [randn(stop - start, 1, d), randn(stop - start, 1, d), randn(stop - start, d), randn(stop - start, d)]
        best = run(
            score_candidates,
            backend,
            *rows,
            zero,
            zero,
            additive=torch.tensor(scores[start:stop]),
            top_k=top_k,
            running=best,
            first_id=first + start,
        )
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:top_k]
    assert best.ids.tolist() == [first + index for index in expected]
    assert best.scores.tolist() == [scores[index] for index in expected]


def test_many_candidates_are_ranked_over_long_runs(backend, monkeypatch):
    count = 150
    if backend == "triton":
        from mixkernels.triton_backend import scoring

        monkeypatch.setattr(scoring, "_LONG_RUNS_FROM", 2 * count)
        assert count < 2 * scoring.run_length(2 * count), "the last run should not be full"
        assert scoring.run_length(2 * count) > scoring.run_length(2 * count - 1)
    rows = [torch.ones(2, count, 1, 2), torch.zeros(1, 2), torch.ones(2, count, 2), torch.zeros(2)]
    additive = (torch.arange(count) * 7919 % 50).float()
    best = run(score_candidates, backend, *rows, torch.zeros(2), torch.zeros(2), additive=additive, top_k=130)
    expected = additive.sort(descending=True, stable=True)
    assert torch.equal(best.ids, expected.indices[:130].expand(2, 130))
    assert torch.equal(best.scores, expected.values[:130].expand(2, 130))


def test_a_nan_score_comes_first_and_stays_nan(backend):
    rows = [tensor[0] for tensor in scoring_rows(n=40)[:4]]
    additive = torch.zeros(40)
    additive[[30, 12]] = torch.tensor([math.nan, -math.nan])
    additive[5] = math.inf
    best = run(score_candidates, backend, *rows, *parameters(48), additive=additive, top_k=4)
    assert best.scores[:2].isnan().all()
    assert best.ids[:3].tolist() == [12, 30, 5]
    assert best.scores[2] == math.inf
    assert best.scores[3].isfinite()
    merged = run(score_candidates, backend, *rows, *parameters(48), top_k=4, running=best, first_id=100)
    assert merged.ids[:3].tolist() == [12, 30, 5]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    pairs=st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**32 - 1)), min_size=2, max_size=2, unique=True
    )
)
def test_keys_order_as_scores_then_as_falling_ids_and_give_both_back(pairs):
    scores, ids = torch.tensor([score for score, _ in pairs]), torch.tensor([number for _, number in pairs])
    keys = pack_keys(scores, ids)
    (a, a_id), (b, b_id) = pairs
    assert (keys[0] > keys[1]).item() == ((a, -a_id) > (b, -b_id))
    back_scores, back_ids = unpack_keys(keys)
    assert torch.equal(back_scores, scores)
    assert torch.equal(back_ids, ids)
    assert best_of(keys, 5)[0].tolist() == sorted((a, b), reverse=True)


def test_autocast_casts_the_rows_to_one_dtype():
    rows = scoring_rows(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = residual_layer_norm(rows[0], rows[1].float(), *parameters(48), backend="torch")
        scores = score_candidates(rows[0].float(), *rows[1:4], *parameters(48), backend="torch")
    assert out.dtype == torch.bfloat16
    assert torch.equal(scores, score_candidates(*rows[:4], *parameters(48), backend="torch"))


BAD = [
    (lambda c, s, w: residual_layer_norm(c, s[..., :5], w, w), ShapeError, r"residual.*\(2, 11, 5\).*\(2, 11, 3, 48\)"),
    (lambda c, s, w: residual_layer_norm(c, c, w[:5], w), ShapeError, r"weight has shape \(5,\); expected \(48,\)"),
    (lambda c, s, w: residual_layer_norm(c[..., :0], c[..., :0], w[:0], w[:0]), ShapeError, "d at least 1"),
    (lambda c, s, w: residual_layer_norm(c, c.double(), w, w), DtypeError, "residual has dtype torch.float64.*float32"),
    (lambda c, s, w: residual_layer_norm(c.int(), c, w, w), DtypeError, "x has dtype torch.int32; expected one of"),
    (lambda c, s, w: residual_layer_norm(c, None, w, w), DtypeError, "residual is a NoneType; expected a torch.Tensor"),
    (lambda c, s, w: residual_layer_norm(c, c, w.half(), w), DtypeError, "weight has dtype torch.float16; expected"),
    (lambda c, s, w: residual_layer_norm(c, c.to("meta"), w, w), DeviceError, "residual is on meta but x is on cpu"),
    (lambda c, s, w: residual_layer_norm(c, c, w, w, backend="cuda"), BackendError, "no backend 'cuda'"),
    (lambda c, s, w: gate_layer_norm(s[:1], s, None, w, w), ShapeError, r"gate.*\(1, 11, 48\).*\(2, 11, 48\)"),
    (lambda c, s, w: gate_layer_norm(s, s, s[:, :3], w, w), ShapeError, r"state has shape \(2, 3, 48\)"),
    (lambda c, s, w: gate_layer_norm(None, s, s, w, w), DtypeError, "gate is a NoneType"),
    (lambda c, s, w: score_candidates(c, c, s[:, 1:], s, w, w), ShapeError, r"state has shape \(2, 10, 48\); expected"),
    (lambda c, s, w: score_candidates(s[0], s[0], s[0], s[0], w, w), ShapeError, "context has shape"),
    (lambda c, s, w: score_candidates(c, c, None, s, w, w), DtypeError, "state is a NoneType"),
    (lambda c, s, w: score_candidates(c, c, s, s, w, w, additive=s), ShapeError, r"additive.*expected \(2, 11\)"),
    (lambda c, s, w: score_candidates(c, c, s, s, w, w, additive=3), DtypeError, "additive is int; expected"),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, additive=s[..., 0].to("meta")),
        DeviceError,
        "additive is on meta",
    ),
    (lambda c, s, w: score_candidates(c, c, s, s, w, w, top_k=0), ShapeError, "top_k is 0; expected a positive"),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, top_k=1, first_id=2**32 - 5),
        ShapeError,
        r"in 0\.\.4294967295",
    ),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, running=TopK(s[..., 0], s[..., 0].long())),
        ShapeError,
        "running was given without top_k",
    ),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, top_k=1, running=TopK(s[0, :, 0], s[0, :, 0].long())),
        ShapeError,
        r"running scores have shape \(11,\); expected \(2, 'n'\)",
    ),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, top_k=1, running=TopK(s[..., 0], s[..., 0])),
        DtypeError,
        "running ids have dtype torch.float32; expected torch.int64",
    ),
    (
        lambda c, s, w: score_candidates(
            c, c, s, s, w, w, top_k=1, running=TopK(s[..., 0].to("meta"), s[..., 0].long())
        ),
        DeviceError,
        "running scores are on meta",
    ),
    (
        lambda c, s, w: score_candidates(c, c, s, s, w, w, top_k=1, running=TopK(s[..., 0], torch.full((2, 11), -1))),
        ShapeError,
        "running ids reach from -1 to -1",
    ),
    (
        lambda c, s, w: score_candidates(c, c, s.clone().requires_grad_(), s, w, w, top_k=1),
        BackendError,
        "top_k is for inference",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_what_is_wrong_is_told_with_what_was_found_and_expected(call, kind, message):
    context, _, state, _, weight, _ = scoring_rows()
    with pytest.raises(kind, match=message):
        call(context, state, weight)


def test_rows_wider_than_a_tile_are_refused_by_triton_with_the_reason():
    pytest.importorskip("triton", reason="triton is not installed")
    device = device_of("triton")
    x, w = torch.zeros(2, 4097, device=device), torch.zeros(4097, device=device)
    with pytest.raises(BackendError, match="hidden size 4097 is more than 4096"):
        residual_layer_norm(x, x, w, w, backend="triton")
    with pytest.raises(BackendError, match=r"float64 is not one of.*\"torch\": can run it"):
        residual_layer_norm(x[:, :4].double(), x[:, :4].double(), w[:4].double(), w[:4].double(), backend="triton")
    # what would have been chosen for the device is passed over
    assert select_backend("auto", x, x, w, w, operator="residual_layer_norm") == "torch"
    assert residual_layer_norm(x, x, w, w).shape == (2, 4097)


def test_the_operators_pass_pytorchs_own_checks(backend):
    ops, device = torch.ops.mixkernels, device_of(backend)
    context, context_residual, state, state_residual, weight, bias = (t.to(device) for t in scoring_rows(n=4, d=8))
    rows = (context, context_residual, state, state_residual, weight, bias)
    additive, ids = state[..., 0].clone(), torch.tensor([[90, 91]] * 2, device=device)
    norms = (weight, bias, EPS, backend)
    calls = [
        (ops.residual_layer_norm, (context, context_residual, *norms)),
        (ops.gate_layer_norm, (state, state_residual, None, *norms)),
        (ops.gate_layer_norm, (state, state_residual, state + 1, *norms)),
        (ops.score_candidates, (*rows, additive, EPS, backend)),
        (ops.score_top_k, (*rows, None, None, None, EPS, 3, 0, backend)),
        (ops.score_top_k, (*rows, additive, additive[:, :2].clone(), ids, EPS, 9, 0, backend)),
    ]
    if backend == "triton":
        calls += [
            (ops.residual_layer_norm_backward, (context.cos(), context, context_residual, weight, EPS)),
            (ops.gate_layer_norm_backward, (state.cos(), state, state_residual, None, weight, EPS)),
            (ops.gate_layer_norm_backward, (state.cos(), state, state_residual, state + 1, weight, EPS)),
            (ops.score_candidates_backward, (additive, *rows, EPS)),
        ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


def test_one_compilation_serves_every_number_of_candidates(backend):
    weight, bias = (tensor.to(device_of(backend)) for tensor in parameters(16))
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def layer(context, residual, state, state_residual, running):
        rows = residual_layer_norm(context, residual, weight, bias, backend=backend)
        h = gate_layer_norm(state, state, state_residual, weight, bias, backend=backend)
        inputs = (rows, residual, h, state_residual, weight, bias)
        return score_candidates(*inputs, backend=backend), score_candidates(
            *inputs, top_k=3, running=running, first_id=10, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for n in (2, 3, 40):
        inputs = [randn(2, n, 2, 16), randn(n, 2, 16), randn(2, n, 16), randn(n, 16)]
        inputs = [tensor.to(device_of(backend)) for tensor in inputs]
        for tensor, dim in zip(inputs, (1, 0, 1, 0), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        running = TopK(torch.zeros(2, 3), torch.arange(3).repeat(2, 1))
        running = TopK(*(tensor.to(device_of(backend)) for tensor in running))
        for got, want in zip(compiled(*inputs, running), layer(*inputs, running), strict=True):
            torch.testing.assert_close(tuple(got), tuple(want))
    assert graphs == 1


def test_gradients_compile_too(backend):
    device = device_of(backend)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: score_candidates(*inputs, backend=backend), backend="aot_eager", fullgraph=True
    )
    outcomes = []
    for call in (compiled, lambda *inputs: score_candidates(*inputs, backend=backend)):
        leaves = [tensor.to(device).requires_grad_() for tensor in scoring_rows(n=4, d=8)]
        call(*leaves).cos().sum().backward()
        outcomes.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*outcomes)


def test_the_flop_counter_sees_the_dot_products():
    from torch.utils.flop_counter import FlopCounterMode

    rows = scoring_rows(2, 11, 3, 48)
    with FlopCounterMode(display=False) as counter:
        score_candidates(*rows, backend="torch")
        score_candidates(*rows, top_k=2, backend="torch")
    assert counter.get_total_flops() == 2 * (2 * 2 * 11 * 48)


def test_without_triton_the_layer_runs_on_torch():
    code = """
import sys
sys.modules["triton"] = None
import torch, mixkernels
x = torch.randn(3, 2, 8)
w = torch.ones(8)
out = mixkernels.residual_layer_norm(x, x, w, w)
print(mixkernels.score_candidates(out, x, out[:, 0], x[:, 0], w, w, top_k=2).ids.shape)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[2]" in done.stdout
