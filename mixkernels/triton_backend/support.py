"""What the Triton kernels can run, and why not: asked by `mixkernels.ops` before a kernel module is imported."""

import importlib.util
import os

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
MAX_CONTEXT = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def not_supported_reasons(tensors: tuple[Tensor, ...]) -> list[str]:
    """Reasons against running `candidate_attention` on these inputs (context_query first); empty when it can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed (pip install triton, Linux only)")
    if not tensors and not torch.cuda.is_available() and not interpreting():
        reasons.append("no GPU is visible (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
    if not tensors:
        return reasons
    device = tensors[0].device.type
    if device == "cpu" and not interpreting():
        reasons.append("tensors are on cpu (set TRITON_INTERPRET=1 to run kernels in the interpreter)")
    elif device not in ("cpu", "cuda"):
        reasons.append(f"tensors are on {device}; expected cuda")
    if tensors[0].dtype not in DTYPES:
        reasons.append(f"dtype {tensors[0].dtype} is not one of {', '.join(map(str, DTYPES))}")
    head_dim = tensors[0].shape[-1]
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head dimension {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    num_context = tensors[0].shape[-3]
    if num_context > MAX_CONTEXT:
        reasons.append(f"{num_context} context embeddings a candidate are more than {MAX_CONTEXT}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reasons.append("an input requires a gradient, and this kernel has no backward yet (use torch.no_grad())")
    return reasons
