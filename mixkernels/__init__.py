"""Fused attention of many candidates to one query: tensors in, tensors out.

Public names are imported on first use, so importing this package needs neither Triton nor a GPU and is quick.
Backends: ``reference`` (the formula), ``torch`` (fast without Triton, CPU first), ``triton`` (the fused kernel).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixkernels.attention.operator import CandidateAttention, candidate_attention
    from mixkernels.dispatch import BACKENDS, not_supported_reasons, select_backend
    from mixkernels.errors import BackendError, DeviceError, DtypeError, MixKernelsError, ShapeError
    from mixkernels.explanation import Explanation, explain
    from mixkernels.layer.operators import TopK, gate_layer_norm, residual_layer_norm, score_candidates

_HOMES = {
    "BACKENDS": "dispatch",
    "CandidateAttention": "attention.operator",
    "candidate_attention": "attention.operator",
    "Explanation": "explanation",
    "explain": "explanation",
    "TopK": "layer.operators",
    "gate_layer_norm": "layer.operators",
    "residual_layer_norm": "layer.operators",
    "score_candidates": "layer.operators",
    "not_supported_reasons": "dispatch",
    "select_backend": "dispatch",
    "BackendError": "errors",
    "DeviceError": "errors",
    "DtypeError": "errors",
    "MixKernelsError": "errors",
    "ShapeError": "errors",
}

__all__ = [
    "BACKENDS",
    "BackendError",
    "CandidateAttention",
    "DeviceError",
    "DtypeError",
    "Explanation",
    "MixKernelsError",
    "ShapeError",
    "TopK",
    "candidate_attention",
    "explain",
    "gate_layer_norm",
    "not_supported_reasons",
    "residual_layer_norm",
    "score_candidates",
    "select_backend",
]


def __getattr__(name: str) -> object:
    """Import the module that holds a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
