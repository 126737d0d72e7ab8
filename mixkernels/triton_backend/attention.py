"""`mixkernels.candidate_attention` in Triton: what `mixkernels.ops` calls."""

from mixkernels.triton_backend.attention_forward import candidate_attention

__all__ = ["candidate_attention"]
