"""List the shipped launch configurations of the attention kernels, as calls make them."""

from itertools import product
from typing import Any

from mixkernels.attention.triton_arguments import STRIDE_NAMES
from mixkernels.attention.triton_launch import RESIDENT, Kind, forward_options, resident_keys, rule
from mixkernels.triton_common.support import HEAD_DIMS
from mixkernels.triton_common.variant import KernelVariant

_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_FORMS = {
    "pool": {},
    "gathered": {"HAS_IDS": True},
    "ragged": {"RAGGED": True},
    "ragged gather": {"RAGGED": True, "HAS_IDS": True},
    "own logits": {"HAS_OWN_LOGITS": True},
    "int8": {"QUANTISED": True},
    "no state": {"HAS_STATE": False},
    "resident": {"RESIDENT": True},
}
_HEADS = 12
_TENSOR_STRIDES = tuple(name for name in STRIDE_NAMES if not name.startswith("ol_"))


def attention_variants(kernel: Any, name: str, defaults: dict[str, Any]) -> list[KernelVariant]:
    """Variants of an attention kernel: every D and dtype for k of 1, 3, 10 and 16, and every form at k = 1, D = 64.

    Args:
        kernel: the kernel.
        name: its name in `Kind`.
        defaults: its constexpr arguments besides those that all attention kernels have.
    """
    shapes = [(k, dim, dtype, "pool") for k, dim, dtype in product((1, 3, 10, 16), HEAD_DIMS, _ITEMSIZES)]
    known = set(kernel.arg_names)
    if name == "backward_candidates":
        # not supported: see triton_common.support.not_supported_reasons
        shapes.remove((16, 128, "fp32", "pool"))
    forms = [form for form, changes in _FORMS.items() if changes and changes.keys() <= known]
    shapes += [(1, 64, "bf16", form) for form in forms]
    if "resident" in forms:
        shapes += [(1, dim, "bf16", "resident") for dim in HEAD_DIMS if dim != 64 and resident_keys(1, dim)]
    return [_attention_variant(kernel, name, defaults, *shape) for shape in shapes]


def _attention_variant(
    kernel: Any, name: str, defaults: dict[str, Any], k: int, dim: int, dtype: str, form: str
) -> KernelVariant:
    constants = {"H": _HEADS, "K": k, "D": dim, "HAS_STATE": True, "HAS_LENGTHS": True, "HAS_IDS": False}
    constants |= {"RAGGED": False, "HAS_OWN_LOGITS": False, "INTERPRET": False, **defaults, **_FORMS[form]}
    constants["POOL"] = not (constants["HAS_IDS"] or constants["RAGGED"])
    kind = Kind(RESIDENT if form == "resident" else name, k, k + constants["HAS_STATE"], dim, _ITEMSIZES[dtype])
    config = rule(kind)
    constants |= forward_options(kind, config, resident_keys(k, dim)) if name == "forward" else config.options()
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {
        argument: _type_of(argument, dtype, quantised=form == "int8")
        for argument in kernel.arg_names
        if argument not in constants
    }
    label = f"k={k} D={dim} {dtype} {form}"
    # pointers from PyTorch's allocator, and strides that are multiples of D
    divisible = [name for name in signature if name.endswith("_ptr") or name in _TENSOR_STRIDES]
    # see triton_launch.keeps_short_queries
    arch = "sm_90" if form == "resident" else None
    return KernelVariant(
        kernel, label, signature, constants, config.num_warps, config.num_stages, tuple(divisible), arch
    )


def _type_of(argument: str, dtype: str, *, quantised: bool) -> str:
    if not argument.endswith("_ptr"):
        return "fp32" if argument == "scale" else "i32"
    if argument in ("key_lengths_ptr", "ids_ptr", "offsets_ptr"):
        return "*i64"
    if quantised and argument in ("context_query_ptr", "context_key_ptr", "context_value_ptr"):
        return "*i8"
    wide = ("lse_ptr", "scale_ptr", "logits_ptr", "delta_ptr", "partial_ptr")
    return "*fp32" if argument.endswith(wide) else f"*{dtype}"
