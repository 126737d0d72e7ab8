"""The contract of `candidate_attention`, one property a test, every backend; Triton is interpreted without a GPU."""

from dataclasses import dataclass, replace

import pytest
import torch
from attention_oracle import attention_by_loops
from conftest import count_kernel_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mixkernels
from mixkernels import candidate_attention

BACKENDS = ["reference", "torch", "triton"]
LOW = [torch.float16, torch.bfloat16]
# what float32 rounding of the log-sum-exp alone costs, and of one output element
ABSOLUTE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-13}
# of a log-sum-exp near 10: a few units in the last place of float32; PyTorch's CPU flash kernel, where the processor
# multiplies bfloat16 or float16 itself, rounds the exponentials of such inputs to some 4e-5
LSE = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Inputs of one call."""

    context: list[Tensor]
    state: Tensor | None
    key: Tensor
    value: Tensor
    lengths: list[int] | None = None
    scale: float | None = None

    @classmethod
    def random(cls, n=5, k=1, m=7, b=1, h=2, d=16, *, pool=True, state=True, lengths=None, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        lead = (n,) if pool else (b, n)
        context = [randn(*lead, k, h, d) for _ in range(3)]
        return cls(context, randn(*lead, h, d) if state else None, randn(b, m, h, d), randn(b, m, h, d), lengths)

    def pick(self, index: Tensor) -> "Case":
        pool = self.context[0].dim() == 4
        take = (lambda t: t[index]) if pool else (lambda t: t[:, index])
        return replace(
            self, context=[take(t) for t in self.context], state=None if self.state is None else take(self.state)
        )

    def run(self, backend: str, config: pytest.Config | None = None, **options) -> mixkernels.CandidateAttention:
        if backend == "triton" and config is not None:
            count_kernel_run(config)
        device = device_of(backend)
        lengths = None if self.lengths is None else torch.tensor(self.lengths, device=device)
        result = candidate_attention(
            *(t.to(device) for t in self.context),
            None if self.state is None else self.state.to(device),
            self.key.to(device),
            self.value.to(device),
            key_lengths=lengths,
            scale=self.scale,
            return_lse=options.pop("return_lse", True),
            backend=backend,
            **options,
        )
        return mixkernels.CandidateAttention(*(None if t is None else t.cpu() for t in result))

    def oracle(self):
        return attention_by_loops(*self.context, self.state, self.key, self.value, self.lengths, self.scale)


def plain_error(case: Case, exact: Tensor) -> float:
    """Error that plain PyTorch makes in the case's precision, float32 softmax: the yardstick of an error budget."""
    out = case.run("reference", return_lse=False).context.double()
    return (out - exact).abs().max().item()


def assert_within_budget(result: mixkernels.CandidateAttention, case: Case) -> None:
    exact = case.oracle()
    dtype = case.key.dtype
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
        assert error <= (LSE[dtype] if is_lse else budget), f"{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "per-query"])
def test_it_equals_the_formula_written_with_loops(backend, dtype, k, pool, pytestconfig):
    case = Case.random(n=23, k=k, m=9, b=2, pool=pool, lengths=[9, 4], dtype=dtype)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [3, 16])
def test_candidates_never_straddle_two_tiles(backend, k, pytestconfig):
    # 64- and 128-row tiles hold a number of candidates that 70 is no multiple of
    case = Case.random(n=70, k=k, m=5, h=1, seed=1)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_every_head_dimension_and_more_keys_than_a_block(backend, d, pytestconfig):
    case = Case.random(n=3, k=2, m=70, d=d, h=1)
    assert_within_budget(case.run(backend, pytestconfig), case)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "per-query"])
def test_float64_is_computed_in_float64(backend, k, pool):
    case = Case.random(n=4, k=k, b=2, pool=pool, lengths=[7, 3], dtype=torch.float64)
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
    pool=st.booleans(),
    state=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_any_lengths(backend, n, k, m, b, pool, state, data):
    lengths = data.draw(st.none() | st.lists(st.integers(0, m), min_size=b, max_size=b))
    case = Case.random(n=n, k=k, m=m, b=b, pool=pool, state=state, lengths=lengths, seed=n + 10 * m)
    if n == 0:
        result = case.run(backend)
        assert result.context.shape == (b, 0, k, 2, 16)
        assert result.context_lse.shape == (b, 0, k, 2)
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
    q, key, value = (t.double() for t in case.context)
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
    case.key[0, 3:], case.value[0, 3:] = 1e4, -1e4
    dirty = case.run(backend, pytestconfig)
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_free(backend, pytestconfig):
    n, k, m, h, d = 5, 2, 6, 2, 16
    plain = Case.random(n=n, k=k, m=m, h=h, d=d)
    packed = torch.stack(plain.context, dim=-2)
    # views: slices of a packed QKV, transposed heads, a last dimension that is not dense
    views = replace(
        plain,
        context=[packed[..., i, :] for i in range(3)],
        state=plain.state.transpose(0, 1).contiguous().transpose(0, 1),
        key=plain.key.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        value=plain.value.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    assert not views.context[0].is_contiguous()
    assert views.value.stride(-1) != 1
    for got, want in zip(views.run(backend, pytestconfig), plain.run(backend, pytestconfig), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_logits_neither_overflow_nor_underflow(backend, pytestconfig):
    case = Case.random(n=8, k=2, m=6, lengths=[4])
    case.scale = 200.0
    result = case.run(backend, pytestconfig)
    exact = case.oracle()
    assert not any(t.isnan().any() for t in result)
    # logits of some thousands keep about four digits after the point in float32
    assert (result.context_lse.double() - exact[2]).abs().max() < 1e-2
    assert (result.context.double() - exact[0]).abs().max() < 2e-2


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


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "per-query"])
def test_gradients_of_the_torch_path_equal_those_of_the_reference(k, pool):
    case = Case.random(n=4, k=k, b=2, pool=pool, lengths=[5, 0], dtype=torch.float64)
    gradients = []
    for backend in ("reference", "torch"):
        inputs = [t.clone().requires_grad_() for t in (*case.context, case.state, case.key, case.value)]
        out = candidate_attention(*inputs, key_lengths=torch.tensor(case.lengths), return_lse=True, backend=backend)
        weight = torch.arange(out.context.numel(), dtype=torch.float64).view_as(out.context).sin()
        finite = out.context_lse.double().sum() + (out.context * weight).sum() + (out.state**2).sum()
        gradients.append(torch.autograd.grad(finite, inputs))
    for reference, torch_path in zip(*gradients, strict=True):
        torch.testing.assert_close(torch_path, reference, rtol=0, atol=2e-6)
        assert torch_path.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    case = Case.random(n=2, k=2, m=3, b=2, h=1, d=4, lengths=[3, 1], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (*case.context, case.state, case.key, case.value)]

    def outputs(*tensors: Tensor):
        out = candidate_attention(*tensors, key_lengths=torch.tensor(case.lengths), backend=backend)
        return out.context, out.state

    assert torch.autograd.gradcheck(outputs, inputs)


def test_autocast_casts_the_inputs_to_one_dtype():
    case = Case.random(n=3, k=2)
    case.context = [t.bfloat16() for t in case.context]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.run("torch")
    assert result.context.dtype == torch.bfloat16
    assert result.context_lse.dtype == torch.float32
