"""Gradients of `candidate_attention`: right, in bounded memory, and the same in every run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.measuring.timing import peak_bytes
from mixkernels import candidate_attention
from tests.kernels.attention_cases import BACKENDS, FORMS, LOW, Case, far_apart

ABSOLUTE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def plain_gradients(case: Case) -> dict[str, Tensor]:
    """Autograd of plain PyTorch in the case's own precision: the yardstick of the error budget."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
    q, k, v, s, key, value = (leaves[name] for name in list(leaves)[:6])
    m, scale = key.shape[1], 1 / math.sqrt(key.shape[-1])
    shared = torch.einsum("nkhd,bmhd->bnhkm", q, key) * scale
    own = (torch.einsum("nkhd,nlhd->nhkl", q, k) * scale).expand(len(key), -1, -1, -1, -1)
    probs = torch.cat([shared, own], dim=-1).softmax(dim=-1)
    context = torch.einsum("bnhkm,bmhd->bnkhd", probs[..., :m], value)
    context = context + torch.einsum("bnhkl,nlhd->bnkhd", probs[..., m:], v)
    state = (torch.einsum("nhd,bmhd->bnhm", s, key) * scale).softmax(dim=-1)
    state = torch.einsum("bnhm,bmhd->bnhd", state, value)
    total = 0.0
    for number, output in enumerate((context, state)):
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(number))
        total = total + (output.float() * weight).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("own", ["own keys", "own logits"])
def test_they_equal_autograd_of_the_formula(backend, form, k, own, pytestconfig):
    case = Case.random(n=23, k=k, m=9, b=3, form=form, lengths=[9, 0, 4], own_logits=own == "own logits")
    exact = case.double().gradients("reference")
    for name, gradient in case.gradients(backend, pytestconfig).items():
        error = (gradient - exact[name]).abs().max().item()
        assert error < 1e-5, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_their_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype, k, pytestconfig):
    # one head: interpreted, another one takes as long again
    case = Case.random(n=9, k=k, m=20, b=2, h=1, dtype=dtype)
    exact, plain = case.double().gradients("reference", lse=False), plain_gradients(case)
    for name, gradient in case.gradients(backend, pytestconfig, lse=False).items():
        assert gradient.dtype == dtype
        error, allowed = ((g.double() - exact[name]).abs().max().item() for g in (gradient, plain[name]))
        assert error <= 2 * allowed + ABSOLUTE[dtype], f"{name}: error {error:.1e}, plain PyTorch {allowed:.1e}"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 4),
    m=st.integers(1, 40),
    b=st.integers(1, 3),
    form=st.sampled_from(FORMS),
    state=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_shape_and_any_lengths(backend, n, k, m, b, form, state, data):
    lengths = data.draw(st.none() | st.lists(st.integers(0, m), min_size=b, max_size=b))
    case = Case.random(n=n, k=k, m=m, b=b, form=form, state=state, lengths=lengths, seed=n + 10 * m)
    exact = case.double().gradients("reference")
    for name, gradient in case.gradients(backend).items():
        assert torch.isfinite(gradient).all(), name
        assert (gradient - exact[name]).abs().max() < 2e-5, name


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(backend, form):
    case = Case.random(n=2, k=2, m=3, b=2, h=1, d=4, form=form, lengths=[3, 1], dtype=torch.float64)
    names = list(case.tensors)

    def outputs(*tensors: Tensor):
        result = Case(dict(zip(names, tensors, strict=True)), case.lengths, case.ids, case.offsets).call(backend)
        return result.context, result.state

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in case.tensors.values()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_strides_of_zero(backend, pytestconfig):
    case = Case.random(n=4, k=2)
    leaves = case.changed(**{name: t.clone().requires_grad_() for name, t in case.tensors.items()})
    leaves.call(backend, pytestconfig, return_lse=False).context.sum().backward()
    exact = case.double().changed(**{name: t.double().requires_grad_() for name, t in case.tensors.items()})
    exact.call("reference", return_lse=False).context.sum().backward()
    for name in case.tensors:
        gradient = leaves[name].grad
        gradient = torch.zeros_like(case[name]) if gradient is None else gradient
        want = torch.zeros_like(case[name]) if exact[name].grad is None else exact[name].grad
        torch.testing.assert_close(gradient, want.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("own", ["own keys", "own logits"])
def test_offsets_of_context_embeddings_are_64_bits_wide(backend, own, pytestconfig):
    case = Case.random(n=5, k=3, h=1, m=3, dtype=torch.float16, own_logits=own == "own logits")
    names = [name for name in case.tensors if name.startswith(("context", "own"))]
    wide = case.changed(**{name: far_apart(case[name], 2**30, dim=1) for name in names})
    want = case.gradients(backend, pytestconfig)
    for name, gradient in wide.gradients(backend, pytestconfig).items():
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_runs_give_the_same_bits(backend, pytestconfig):
    # several tiles and queries, so that both sums have parts; repeated ids
    for form in ("pool", "gathered"):
        case = Case.random(n=70, k=1, m=5, b=2, h=1, form=form)
        first, second = (case.gradients(backend, pytestconfig) for _ in range(2))
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", ["pool", "ragged"])
def test_every_gradient_element_is_written(backend, form, pytestconfig):
    case = Case.random(n=50, k=3, m=5, b=2, form=form, lengths=[0, 5])
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        gradients = case.gradients(backend, pytestconfig)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in gradients.items():
        assert not gradient.isnan().any(), name


def test_atomic_sums_are_an_option(monkeypatch, pytestconfig):
    from mixkernels.attention import triton_backward as attention_backward

    kernel, atomic = attention_backward.candidate_attention_bwd_shared_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            launch = kernel[grid]
            return lambda *args, **options: (atomic.append(options["ATOMIC"]), launch(*args, **options))

    monkeypatch.setattr(attention_backward, "candidate_attention_bwd_shared_kernel", Recorded())
    case = Case.random(n=70, k=1, m=5, b=2, h=1)
    want = case.gradients("triton", pytestconfig)
    monkeypatch.setenv("MIXKERNELS_DETERMINISTIC", "0")
    got = case.gradients("triton", pytestconfig)
    assert atomic == [False, True]
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5)


def test_int8_candidates_train_their_scales_on_torch_and_not_on_triton():
    case = Case.random(n=4, int8=True)
    case.scales = tuple(scale.requires_grad_() for scale in case.scales)
    case.call("torch").context.sum().backward()
    assert all(scale.grad.abs().sum() > 0 for scale in case.scales)


def test_a_pool_is_expanded_in_neither_direction():
    # B = N = 64, m = 64, k = 1: the promise of docs/design.md, at a third of the heads
    case = Case.random(n=64, b=64, m=64, h=4, d=64)
    leaves = {name: t.requires_grad_() for name, t in case.tensors.items()}

    def step() -> None:
        result = candidate_attention(*leaves.values(), backend="torch")
        torch.autograd.backward((result.context, result.state), grads)

    grads = (torch.randn(64, 64, 1, 4, 64), torch.randn(64, 64, 4, 64))
    peak = peak_bytes(step)
    # what the call was given stands beside what it allocated
    inputs = sum(t.nbytes for t in leaves.values())
    outputs = gradients_of_outputs = sum(t.nbytes for t in grads)
    assert peak + inputs + gradients_of_outputs <= 2 * (inputs + outputs + inputs + gradients_of_outputs)


@pytest.mark.gpu
def test_a_pool_is_expanded_in_neither_direction_on_a_gpu():
    case = Case.random(n=64, b=64, m=64, h=12, d=64, dtype=torch.bfloat16)
    leaves = [t.cuda().requires_grad_() for t in case.tensors.values()]
    grads = (torch.randn(64, 64, 1, 12, 64).cuda().bfloat16(), torch.randn(64, 64, 12, 64).cuda().bfloat16())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = candidate_attention(*leaves, backend="triton")
    torch.autograd.backward((result.context, result.state), grads)
    needed = sum(t.nbytes for t in (*leaves, *leaves, *grads, *grads))
    given = sum(t.nbytes for t in (*leaves, *grads))
    assert torch.cuda.max_memory_allocated() - before + given <= 1.2 * needed


def test_a_second_derivative_is_refused():
    case = Case.random()
    leaves = {name: t.requires_grad_() for name, t in case.tensors.items()}
    out = candidate_attention(*leaves.values(), backend="torch").context.square().sum()
    (gradient,) = torch.autograd.grad(out, leaves["key"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
