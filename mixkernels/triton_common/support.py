"""What the Triton kernels can run, and why not; `mixkernels.dispatch` asks before it imports a kernel module."""

import importlib.util
import os

import torch
from torch import Tensor

from mixkernels.tensors import needs_grad

HEAD_DIMS = (16, 32, 64, 128)
MAX_CONTEXT = 16
MAX_WIDTH = 4096
"""Largest hidden size of the operators other than attention: their kernels hold a row in one tile."""
_INSTALLED = importlib.util.find_spec("triton") is not None
"""Looked up at import: a function that torch.compile traces must not look for files."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def not_supported_reasons(tensors: tuple[Tensor, ...], operator: str) -> list[str]:
    """Reasons why Triton cannot run an operator on these inputs; empty if it can. Sizes are those of the first tensor.

    Args:
        tensors: the inputs of the call, context_query first for `candidate_attention`; with none, only this machine
            is checked.
        operator: "candidate_attention"; any other name stands for the other operators of the layer.
    """
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed (pip install triton, Linux only)")
    if not tensors:
        if not torch.cuda.is_available() and not interpreting():
            reasons.append("no GPU is visible (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
        return reasons
    device = tensors[0].device.type
    if device == "cpu" and not interpreting():
        reasons.append("tensors are on cpu (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
    elif device not in ("cpu", "cuda"):
        reasons.append(f"tensors are on {device}; expected cuda")
    return reasons + (_attention_reasons(tensors) if operator == "candidate_attention" else _row_reasons(tensors))


def _dtype_reasons(tensors: tuple[Tensor, ...]) -> list[str]:
    wrong = [tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dtype not in DTYPES]
    return [f"dtype {wrong[0]} is not one of {', '.join(map(str, DTYPES))}"] if wrong else []


def _row_reasons(tensors: tuple[Tensor, ...]) -> list[str]:
    width = tensors[0].shape[-1]
    too_wide = [f"hidden size {width} is more than {MAX_WIDTH}"] if width > MAX_WIDTH else []
    return _dtype_reasons(tensors) + too_wide


def _attention_reasons(tensors: tuple[Tensor, ...]) -> list[str]:
    reasons = _dtype_reasons(tensors)
    num_context, _, head_dim = tensors[0].shape[-3:]
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head dimension {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if num_context > MAX_CONTEXT:
        reasons.append(f"{num_context} context embeddings per candidate are more than {MAX_CONTEXT}")
    wanted = needs_grad(*tensors)
    if wanted and head_dim == 128 and tensors[0].dtype == torch.float32 and num_context == MAX_CONTEXT:
        # 17 rows per candidate need tiles of 32 rows, which spill: see triton_launch.rule
        reasons.append("float32 gradients at head dimension 128 take at most 15 context embeddings (use bfloat16)")
    if wanted and tensors[0].dtype == torch.int8:
        reasons.append("int8 candidates have no gradients here (dequantise them, or use no_grad)")
    return reasons
