"""Fused Triton kernels, a file per operator family. Their modules import triton; nothing else of mixkernels does."""
