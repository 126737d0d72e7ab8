"""Candidate attention in Triton, as `mixkernels.ops` calls it."""

from mixkernels.triton_backend.attention_backward import candidate_attention_backward
from mixkernels.triton_backend.attention_forward import candidate_attention

__all__ = ["candidate_attention", "candidate_attention_backward"]
