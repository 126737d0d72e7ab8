"""The rest of the interaction layer in Triton: what `mixkernels.layer_ops` calls."""

from mixkernels.triton_backend.layer_norm import (
    gate_layer_norm,
    gate_layer_norm_backward,
    residual_layer_norm,
    residual_layer_norm_backward,
)
from mixkernels.triton_backend.scoring import score_candidates, score_candidates_backward, score_top_k

__all__ = [
    "gate_layer_norm",
    "gate_layer_norm_backward",
    "residual_layer_norm",
    "residual_layer_norm_backward",
    "score_candidates",
    "score_candidates_backward",
    "score_top_k",
]
