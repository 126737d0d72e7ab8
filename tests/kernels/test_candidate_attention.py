"""The contract of `candidate_attention`, one property a test, every backend; Triton is interpreted without a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mixkernels
from mixkernels import candidate_attention
from mixkernels.attention.checks import Call
from mixkernels.attention.torch_forward import _attend_own
from mixkernels.devices import multiplies_natively
from tests.kernels.attention_cases import BACKENDS, FORMS, LOW, Case, far_apart

# what float32 rounding of the log-sum-exp alone costs, and of one output element
ABSOLUTE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-13}
# of a log-sum-exp near 10: a few units in the last place of float32; PyTorch's CPU flash kernel, where the processor
# multiplies bfloat16 or float16 itself, rounds the exponentials of such inputs to some 4e-5
LSE = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def plain_error(case: Case, exact: Tensor) -> float:
    """Error that plain PyTorch makes in the case's precision, float32 softmax: the yardstick of an error budget."""
    out = case.run("reference", return_lse=False).context.double()
    return (out - exact).abs().max().item()


def assert_within_budget(result: mixkernels.CandidateAttention, case: Case, *, rounded_queries: bool = False) -> None:
    exact = case.oracle()
    dtype = case.dtype
    budget = 2 * plain_error(case, exact[0]) + ABSOLUTE[dtype]
    for name, got, want in zip(result._fields, result, exact, strict=True):
        assert (got is None) == (want is None), name
        if got is None or got.numel() == 0:
            continue
        assert not got.isnan().any(), name
        is_lse = name.endswith("lse")
        assert got.dtype == (torch.float32 if is_lse else dtype), name
        assert got.shape == want.shape, name
        assert torch.equal(got.isinf(), want.isinf()), name
        error = (got.double() - want).masked_fill(want.isinf(), 0.0).abs().max().item()
        allowed = LSE[dtype] if is_lse and not rounded_queries else budget
        assert error <= allowed, f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("form", ["pool", "ragged gather"])
def test_it_equals_the_formula_written_with_loops(backend, dtype, k, form, pytestconfig):
    case = Case.random(n=23, k=k, m=9, b=2, form=form, lengths=[9, 4], dtype=dtype)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", ["own keys", "own logits"])
@pytest.mark.parametrize("int8", [False, True], ids=["floating", "int8"])
@pytest.mark.parametrize("k", [1, 3])
def test_every_form_of_candidates(backend, form, own, int8, k, pytestconfig):
    case = Case.random(n=9, k=k, b=3, form=form, lengths=[7, 0, 3], own_logits=own == "own logits", int8=int8)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", LOW)
def test_int8_candidates_meet_low_precision_keys(backend, dtype, pytestconfig):
    case = Case.random(n=9, k=2, b=2, int8=True, dtype=dtype)
    # where a processor multiplies low precision itself, the torch path dequantises queries into it
    rounded = backend == "torch" and multiplies_natively(case["key"].dtype, case["key"].device)
    assert_within_budget(case.run(backend, pytestconfig), case, rounded_queries=rounded)


@pytest.mark.parametrize("form", ["pool", "per query", "gathered"])
@pytest.mark.parametrize("lengths", [None, [5, 0]])
def test_many_tiles_stream_past_a_short_query(form, lengths, pytestconfig):
    # several tiles a program, the last one not full
    case = Case.random(n=150, k=1, m=7, b=2, h=1, form=form, lengths=lengths, dtype=torch.bfloat16)
    assert_within_budget(case.run("triton", pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "k"), [(70, 3), (19, 16)])
def test_candidates_never_straddle_two_tiles(backend, n, k, pytestconfig):
    # 64- and 128-row tiles hold a number of candidates that n is more than and no multiple of
    case = Case.random(n=n, k=k, m=5, h=1, seed=1)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_every_head_dimension_and_more_keys_than_a_block(backend, d, pytestconfig):
    case = Case.random(n=3, k=2, m=70, d=d, h=1)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_float64_is_computed_in_float64(backend, k, form):
    case = Case.random(n=4, k=k, b=2, form=form, lengths=[7, 3], dtype=torch.float64)
    result = case.run(backend)
    exact = case.oracle()
    assert (result.context - exact[0]).abs().max() < 1e-13
    assert (result.state - exact[1]).abs().max() < 1e-13


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 9),
    k=st.integers(1, 4),
    m=st.integers(1, 11),
    b=st.integers(1, 3),
    form=st.sampled_from(FORMS),
    state=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_any_lengths(backend, n, k, m, b, form, state, data):
    lengths = data.draw(st.none() | st.lists(st.integers(0, m), min_size=b, max_size=b))
    case = Case.random(n=n, k=k, m=m, b=b, form=form, state=state, lengths=lengths, seed=n + 10 * m)
    if n == 0:
        result = case.run(backend)
        assert result.context.shape[-3:] == (k, 2, 16)
        assert result.context.numel() == result.context_lse.numel() == 0
    else:
        assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_candidates_permutes_results(backend, pytestconfig):
    case = Case.random(n=40, k=3, m=6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    result, permuted = case.run(backend, pytestconfig), case.pick(order).run(backend, pytestconfig)
    torch.testing.assert_close(permuted.context, result.context[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted.state, result.state[:, order], rtol=0, atol=1e-6)


@pytest.mark.gpu  # interpreted, a tile's product is numpy's, whose bits depend on the row's place in the tile
def test_the_kernel_keeps_a_candidates_bits_whatever_stands_beside_it(pytestconfig):
    case = Case.random(n=40, k=3, m=6)
    crowd = case.run("triton", pytestconfig)
    for index in (0, 17, 39):
        alone = case.pick(torch.tensor([index])).run("triton", pytestconfig)
        assert torch.equal(alone.context[:, 0], crowd.context[:, index])
        assert torch.equal(alone.state[:, 0], crowd.state[:, index])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_tokens_leaves_own_keys_only(backend, pytestconfig):
    case = Case.random(n=4, k=3, m=5, b=2, lengths=[0, 5])
    result = case.run(backend, pytestconfig)
    q, key, value = (case[f"context_{name}"].double() for name in ("query", "key", "value"))
    own = torch.einsum("nkhd,nlhd->nhkl", q, key) / 4.0
    expected = torch.einsum("nhkl,nlhd->nkhd", own.softmax(-1), value)
    torch.testing.assert_close(result.context[0].double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.context_lse[0].double(), own.logsumexp(-1).transpose(1, 2), rtol=0, atol=2e-6)
    assert (result.state[0] == 0).all()
    assert (result.state_lse[0] == -torch.inf).all()
    assert (result.state[1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_beyond_the_length_are_never_read(backend, pytestconfig):
    case = Case.random(n=6, k=2, m=8, b=2, lengths=[3, 8])
    clean = case.run(backend, pytestconfig)
    case["key"][0, 3:], case["value"][0, 3:] = 1e4, -1e4
    dirty = case.run(backend, pytestconfig)
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend, pytestconfig):
    n, k, m, h, d = 5, 2, 6, 2, 16
    plain = Case.random(n=n, k=k, m=m, h=h, d=d)
    names = ("context_query", "context_key", "context_value")
    packed = torch.stack([plain[name] for name in names], dim=-2)
    # views: slices of a packed QKV, transposed heads, a last dimension that is not dense
    views = plain.changed(
        **{name: packed[..., i, :] for i, name in enumerate(names)},
        state_query=plain["state_query"].transpose(0, 1).contiguous().transpose(0, 1),
        key=plain["key"].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        value=plain["value"].transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    assert not views["context_query"].is_contiguous()
    assert views["value"].stride(-1) != 1
    for got, want in zip(views.run(backend, pytestconfig), plain.run(backend, pytestconfig), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_logits_neither_overflow_nor_underflow(backend, pytestconfig):
    case = Case.random(n=8, k=2, m=6, lengths=[4])
    case.options["scale"] = 200.0
    result = case.run(backend, pytestconfig)
    exact = case.oracle()
    assert not any(t.isnan().any() for t in result)
    # logits of some thousands keep about four digits after the point in float32
    assert (result.context_lse.double() - exact[2]).abs().max() < 1e-2
    assert (result.context.double() - exact[0]).abs().max() < 2e-2


@pytest.mark.parametrize("m", [100, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keys", ["huge last", "equal", "tiny"])
@pytest.mark.parametrize("lse", [False, True])
def test_adversarial_logits_lose_nothing(m, dtype, keys, lse, pytestconfig):
    # a maximum that comes last, no maximum, logits far below those of padding; one query is all, one half, one none
    case = Case.random(n=9, m=m, b=3, h=1, lengths=[m, m // 2, 0], dtype=dtype)
    if keys == "huge last":
        case["key"][0, -1] *= 60
        case["key"][1, m // 2 - 1] *= 60
    elif keys == "equal":
        case["key"][:] = case["key"][:, :1]
    else:
        # every logit of every row is some -1000
        case["key"][:] = -60.0
        for name in ("context_query", "context_key", "state_query"):
            case[name][:] = case[name].abs() + 1
        case["context_key"].neg_()
    exact, result = case.oracle(), case.run("triton", pytestconfig, return_lse=lse)
    plain = case.run("reference", return_lse=lse)
    for got, other, want in zip(result, plain, exact, strict=True):
        if got is not None:
            assert torch.equal(got.isinf(), want.isinf())
            errors = [(t.double() - want).masked_fill(want.isinf(), 0.0).abs().max() for t in (got, other)]
            # log-sum-exps are large here
            size = want.masked_fill(want.isinf(), 0.0).abs().max()
            assert errors[0] <= 2 * errors[1] + ABSOLUTE[dtype] + 1e-6 * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
def test_a_negative_scale(backend, dtype, k, pytestconfig):
    case = Case.random(n=9, k=k, m=20, b=2, h=1, lengths=[20, 11], dtype=dtype)
    case.options["scale"] = -0.3
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_element_is_written(backend, pytestconfig):
    case = Case.random(n=50, k=3, m=5, lengths=[0])
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        result = case.run(backend, pytestconfig)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exps_come_only_when_asked_for(backend, pytestconfig):
    result = Case.random().run(backend, pytestconfig, return_lse=False)
    assert result.context_lse is None
    assert result.state_lse is None
    assert result.state is not None


def test_autocast_casts_the_inputs_to_one_dtype():
    case = Case.random(n=3, k=2)
    case = case.changed(**{name: case[name].bfloat16() for name in ("context_query", "context_key", "context_value")})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.run("torch")
    assert result.context.dtype == torch.bfloat16
    assert result.context_lse.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_own_logits_replace_own_keys(backend, pytestconfig):
    case = Case.random(n=6, k=3)
    logits = torch.einsum("nkhd,nlhd->nklh", case["context_query"], case["context_key"]) / 4.0
    stored = case.changed(context_key=None, own_logits=logits)
    for got, want in zip(stored.run(backend, pytestconfig), case.run(backend, pytestconfig), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gathered_candidate_equals_itself_in_the_pool(backend, pytestconfig):
    case = Case.random(n=6, k=2, b=2)
    pool = case.run(backend, pytestconfig)
    ids = [[5, 0, 0, 3], [1, 1, 4, 2]]
    case.ids = ids
    gathered = case.run(backend, pytestconfig)
    for got, want in zip(gathered, pool, strict=True):
        picked = torch.stack([want[b, rows] for b, rows in enumerate(ids)])
        torch.testing.assert_close(got, picked, rtol=0, atol=1e-6)


def test_slabs_of_the_torch_path_change_nothing(monkeypatch):
    from mixkernels.attention import torch_forward as attention

    for form in FORMS:
        case = Case.random(n=11, k=2, b=2, form=form, lengths=[7, 2])
        whole = case.run("torch")
        with monkeypatch.context() as patch:
            patch.setitem(attention._SLAB_ELEMENTS, "cpu", 500)
            slabbed = case.run("torch")
        for got, want in zip(slabbed, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def assert_equal_results(got: mixkernels.CandidateAttention, want: mixkernels.CandidateAttention) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits_reach_the_right_candidates(backend, pytestconfig):
    case = Case.random(n=40, k=1, h=1, m=3, dtype=torch.float16)
    distance = 2**26
    assert distance * 39 > 2**31
    wide = case.changed(**{name: far_apart(case[name], distance) for name in ("context_query", "context_value")})
    assert_equal_results(wide.run(backend, pytestconfig), case.run(backend, pytestconfig))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", ["own keys", "own logits"])
def test_offsets_of_context_embeddings_are_64_bits_wide_too(backend, own, pytestconfig):
    # (k, N, H, D) transposed: the distance of a candidate's own rows grows with N
    case = Case.random(n=5, k=3, h=1, m=3, dtype=torch.float16, own_logits=own == "own logits")
    names = [name for name in ("context_query", "context_key", "context_value", "own_logits") if case[name] is not None]
    wide = case.changed(**{name: far_apart(case[name], 2**30, dim=1) for name in names})
    want = case.run(backend, pytestconfig)
    assert_equal_results(wide.run(backend, pytestconfig), want)
    if own == "own logits":
        # above the rows of own logits are that far apart, here a row's own keys
        wide = case.changed(own_logits=far_apart(case["own_logits"], 2**30, dim=2))
        assert_equal_results(wide.run(backend, pytestconfig), want)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_more_candidates_than_a_grid_axis_holds(backend, pytestconfig):
    # interpreted there is no such limit, and a program takes milliseconds
    n = 65_536 + 70
    case = Case.random(n=n, h=1, m=1, state=False)
    result = case.run(backend, pytestconfig)
    last = case.pick(torch.arange(n - 3, n)).oracle()
    torch.testing.assert_close(result.context[0, -3:].double(), last[0][0], rtol=0, atol=2e-6)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 // (12 * 64) + 100
    shape = (n, 1, 12, 64)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    tokens = [torch.randn(1, 16, 12, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    whole = candidate_attention(query, key, value, None, *tokens, backend="triton")
    end = slice(n - 50, n)
    part = candidate_attention(query[end], key[end], value[end], None, *tokens, backend="triton")
    assert torch.equal(whole.context[:, end], part.context)


@pytest.mark.parametrize("k", range(1, 17))
def test_own_attention_on_a_cpu_has_the_same_bits_wherever_a_candidate_stands(k):
    # attention to the query's tokens is PyTorch's own kernel, whose bits are not promised (docs/determinism.md)
    case = Case.random(n=67, k=k, h=3, d=32)
    rows = [case[name] for name in ("context_query", "context_key", "context_value")]

    def attend(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        call = Call(*(part[index].unsqueeze(0) for part in rows), *[None] * (len(Call._fields) - 3))
        out, lse = _attend_own(call, 0.3, on_cpu=True)
        return out[0], lse[0]

    crowd = attend(torch.arange(67))
    order = torch.randperm(67, generator=torch.Generator().manual_seed(1))
    for index in (order, torch.arange(40), torch.full((9,), 5), torch.tensor([66])):
        for got, want in zip(attend(index), crowd, strict=True):
            assert torch.equal(got, want[index])
