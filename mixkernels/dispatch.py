"""Choose the backend that runs a call, for every operator, and say why other backends cannot."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from mixkernels.errors import BackendError

BACKENDS = ("triton", "torch", "reference")
"""Backend names in the order in which ``backend="auto"`` considers them; it never chooses the reference."""

_MODULES = {
    "attention": {
        "triton": ("triton_forward", "triton_backward"),
        "torch": ("torch_forward", "torch_backward"),
        "reference": ("reference",),
    },
    "layer": {
        "triton": ("triton_layer_norm", "triton_scoring"),
        "torch": ("torch_operators",),
        "reference": ("reference",),
    },
}
"""Operator family (a folder of this package) -> backend -> the modules that hold its functions."""


def checks_on_gpu() -> bool:
    """Whether to range-check lengths, offsets and ids on a GPU too (MIXKERNELS_CHECKS=1); a check waits for the GPU."""
    return os.environ.get("MIXKERNELS_CHECKS", "0") == "1"


@cache
def implementation(family: str, backend: str, function: str) -> Callable[..., Any]:
    """Return one function of a backend; imports the backend's modules until one has it.

    Raises:
        BackendError: the backend has no such function.
    """
    for module in _MODULES[family][backend]:
        found = getattr(importlib.import_module(f".{family}.{module}", __package__), function, None)
        if found is not None:
            return found
    raise BackendError(f'backend "{backend}" has no {function}')


def not_supported_reasons(backend: str, *tensors: Tensor, operator: str = "candidate_attention") -> list[str]:
    """Reasons why `backend` cannot run an operator on these inputs; empty if it can.

    Args:
        backend: one of `BACKENDS`.
        tensors: the inputs of the call in the operator's order; with none, only this machine is checked.
        operator: the operator's public name.

    Raises:
        BackendError: there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; backends are {', '.join(BACKENDS)} and auto")
    if backend != "triton":
        return []
    from mixkernels.triton_common.support import not_supported_reasons as triton_reasons

    return triton_reasons(tensors, operator)


def select_backend(backend: str | None, *tensors: Tensor, operator: str = "candidate_attention") -> str:
    """Return the name of the backend that would run a call; every operator chooses by this rule.

    With None or "auto" the environment variable MIXKERNELS_BACKEND decides; if it is not set, the inputs decide.

    Raises:
        BackendError: the chosen backend cannot run this call; the message lists every backend with every reason.
    """
    if backend is None or backend == "auto":
        backend = os.environ.get("MIXKERNELS_BACKEND", "auto")
    if backend == "auto":
        on_gpu = bool(tensors) and tensors[0].device.type == "cuda"
        return "triton" if on_gpu and not not_supported_reasons("triton", *tensors, operator=operator) else "torch"
    reasons = not_supported_reasons(backend, *tensors, operator=operator)
    if not reasons:
        return backend
    all_reasons = {name: not_supported_reasons(name, *tensors, operator=operator) for name in BACKENDS}
    report = "; ".join(f'"{name}": {", ".join(why) or "can run it"}' for name, why in all_reasons.items())
    raise BackendError(f'backend "{backend}" cannot run this call: {", ".join(reasons)}. All backends: {report}')
