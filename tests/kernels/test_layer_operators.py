"""The contract of the operators of the rest of the layer, one property a test, every backend."""

import pytest
import torch
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
from tests.kernels.attention_cases import device_of, far_apart
from tests.kernels.layer_cases import DTYPES, EPS, error, gradients_of, parameters, randn, run, scoring_rows
from tests.kernels.layer_oracle import gate_norm_by_loops, residual_norm_by_loops, scores_by_loops

# one unit in the last place of an output near 4; of a score, a sum of d products near 1, that of its partial sums
ABSOLUTE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ABSOLUTE_SCORE = 2e-5


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


def test_offsets_of_context_embeddings_are_64_bits_wide(backend):
    # (k, N, d) transposed: the distance of a candidate's own rows grows with N
    rows = scoring_rows(1, 5, 3, 20, dtype=torch.float16)
    wide = [*(far_apart(tensor, 2**30, dim=2) for tensor in rows[:2]), *rows[2:]]
    assert torch.equal(run(score_candidates, backend, *wide), run(score_candidates, backend, *rows))
    gradients = zip(*(gradients_of(score_candidates, backend, inputs) for inputs in (wide, rows)), strict=True)
    for got, want in gradients:
        assert torch.equal(got, want)


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("k", "d"), [(1, 384), (3, 100), (2, 33), (2, 5000)])
def test_a_candidates_bits_do_not_depend_on_its_neighbours_on_the_torch_path(k, d, threads):
    count = {384: 4000, 5000: 40}.get(d, 400)
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


def test_the_flop_counter_sees_the_dot_products():
    from torch.utils.flop_counter import FlopCounterMode

    rows = scoring_rows(2, 11, 3, 48)
    with FlopCounterMode(display=False) as counter:
        score_candidates(*rows, backend="torch")
        score_candidates(*rows, top_k=2, backend="torch")
    assert counter.get_total_flops() == 2 * (2 * 2 * 11 * 48)
