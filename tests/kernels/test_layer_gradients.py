"""Gradients of the operators of the rest of the layer, on every backend."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixkernels import gate_layer_norm, residual_layer_norm, score_candidates
from tests.kernels.attention_cases import device_of
from tests.kernels.layer_cases import EPS, error, gradients_of, parameters, randn, scoring_rows


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
        from mixkernels.layer import triton_rows as rows

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
