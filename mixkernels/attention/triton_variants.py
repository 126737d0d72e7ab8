"""List the shipped launch configurations of the attention kernels, as calls make them."""

from collections.abc import Iterator
from functools import partial
from itertools import compress, product
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
    "int8 per query": {"QUANTISED": True, "PER_QUERY": True},
    "no state": {"HAS_STATE": False},
    "no lengths": {"HAS_LENGTHS": False},
    "lse": {"HAS_LSE": True},
    "lse gradient": {"HAS_LSE_GRAD": True},
    "atomic": {"ATOMIC": True},
}
_HEADS = 12
_BLOCKS_OF_KEYS = (16, 32, 64, 128)
"""Numbers of keys for which a resident query is compiled: see `triton_launch.forward_options`."""
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
    shapes += [(1, 64, "bf16", form) for form, changes in _FORMS.items() if changes and changes.keys() <= known]
    return [
        _attention_variant(kernel, Kind(name, k, k + 1, dim, _ITEMSIZES[dtype]), dtype, form, defaults | _FORMS[form])
        for k, dim, dtype, form in shapes
    ]


def resident_variants(kernel: Any, defaults: dict[str, Any]) -> list[KernelVariant]:
    """Variants of the forward kernel that keeps a query on the chip: every form at every D, in bfloat16.

    These have the longest queries, which need most registers. Shorter ones and float16 come in the plain form.
    """
    shapes: list[tuple[int, str, int, tuple[str, ...]]] = []
    for dim in filter(partial(resident_keys, 1), HEAD_DIMS):
        longest = resident_keys(1, dim)
        shapes += [(dim, dtype, num_keys, ()) for dtype, num_keys in product(("bf16", "fp16"), _BLOCKS_OF_KEYS)]
        shapes += [(dim, "bf16", longest, forms) for forms in _resident_forms() if forms]
    variants = []
    for dim, dtype, num_keys, forms in shapes:
        changes = {key: value for form in forms for key, value in _FORMS[form].items()}
        label = ", ".join(["resident", *forms, f"m={num_keys}"])
        kind = Kind(RESIDENT, 1, 2, dim, _ITEMSIZES[dtype])
        variants.append(_attention_variant(kernel, kind, dtype, label, defaults | changes, num_keys))
    return variants


def _resident_forms() -> Iterator[tuple[str, ...]]:
    """Every combination of `_FORMS` that a call for a resident query may have."""
    optional = ("gathered", "own logits", "no state", "no lengths", "lse")
    for chosen in product((False, True), repeat=len(optional)):
        forms = tuple(compress(optional, chosen))
        yield forms
        yield (*forms, "int8")
        # ids number the candidates of a pool
        if "gathered" not in forms:
            yield (*forms, "int8 per query")


def _attention_variant(
    kernel: Any, kind: Kind, dtype: str, form: str, changes: dict[str, Any], num_keys: int = 128
) -> KernelVariant:
    constants = {"H": _HEADS, "K": kind.num_context, "D": kind.head_dim, "HAS_STATE": True, "HAS_LENGTHS": True}
    constants |= {"HAS_IDS": False, "RAGGED": False, "HAS_OWN_LOGITS": False, "INTERPRET": False, **changes}
    constants["POOL"] = not (constants["HAS_IDS"] or constants["RAGGED"])
    kind = kind._replace(slots=kind.num_context + constants["HAS_STATE"])
    config = rule(kind)
    is_forward = kind.kernel in ("forward", RESIDENT)
    constants |= forward_options(kind, config, num_keys) if is_forward else config.options()
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {
        argument: _type_of(argument, dtype, constants) for argument in kernel.arg_names if argument not in constants
    }
    label = f"k={kind.num_context} D={kind.head_dim} {dtype} {form}"
    # pointers from PyTorch's allocator, and strides that are multiples of D
    divisible = [name for name in signature if name.endswith("_ptr") or name in _TENSOR_STRIDES]
    # see triton_launch.keeps_short_queries
    arch = "sm_90" if kind.kernel == RESIDENT else None
    return KernelVariant(
        kernel, label, signature, constants, config.num_warps, config.num_stages, tuple(divisible), arch
    )


def _type_of(argument: str, dtype: str, constants: dict[str, Any]) -> str:
    if not argument.endswith("_ptr"):
        return "fp32" if argument == "scale" else "i32"
    if argument in ("key_lengths_ptr", "ids_ptr", "offsets_ptr"):
        return "*i64"
    if constants.get("QUANTISED") and argument in ("context_query_ptr", "context_key_ptr", "context_value_ptr"):
        return "*i8"
    if constants.get("ATOMIC") and argument in ("dk_ptr", "dv_ptr"):
        return "*fp32"
    wide = ("lse_ptr", "scale_ptr", "logits_ptr", "delta_ptr", "partial_ptr")
    return "*fp32" if argument.endswith(wide) else f"*{dtype}"
