"""Inputs of the operators of the rest of the layer, and how the tests run them on every backend."""

import torch
from torch import Tensor

from mixkernels import TopK
from tests.kernels.attention_cases import device_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-12


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


def gradients_of(operator, backend: str, inputs: list[Tensor | None], **options) -> list[Tensor]:
    """Gradients of a weighted sum of the operator's output, on the CPU."""
    device = device_of(backend)
    leaves = [None if t is None else t.to(device).detach().requires_grad_() for t in inputs]
    out = operator(*leaves, backend=backend, **options)
    weight = torch.arange(out.numel(), device=device, dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [gradient.cpu() for gradient in torch.autograd.grad((out * weight).sum(), wanted)]
