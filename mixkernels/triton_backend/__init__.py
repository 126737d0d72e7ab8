"""Fused Triton kernels, a file per operator family. Triton is imported when a kernel is first called, never before."""
