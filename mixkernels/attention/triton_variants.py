"""List the shipped launch configurations of the attention kernels, as calls make them."""

from collections.abc import Iterator
from itertools import compress, product
from typing import Any

from mixkernels.attention.triton_arguments import STRIDE_NAMES
from mixkernels.attention.triton_launch import (
    CANDIDATES,
    FORWARD,
    FUSED,
    FUSED_DIM,
    SHORT,
    SHORT_KEYS,
    Kind,
    LaunchConfig,
    Table,
    backward_options,
    forward_options,
    rule,
    slots_of,
    tables,
)
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
    "pointers": {},
    "lse": {"HAS_LSE": True},
    "lse gradient": {"HAS_LSE_GRAD": True},
    "alternating rows": {},
    "atomic": {"ATOMIC": True},
}
_HEADS = 12
_NUMBERS_OF_CONTEXTS = (1, 2, 3, 10, 16)
_HEAVY_FORMS = (
    ("gathered", "lse"),
    ("gathered", "int8"),
    ("gathered", "lse", "int8"),
    ("lse", "own logits", "no state"),
)
"""The forms that take most registers."""
_SHORTER_KEYS = (16, 32, 64)
"""Numbers of keys for which the kernel for short queries is compiled, besides the largest."""
_TENSOR_STRIDES = tuple(name for name in STRIDE_NAMES if not name.startswith("ol_"))


def backward_variants(kernel: Any, name: str, defaults: dict[str, Any]) -> list[KernelVariant]:
    """Variants of a backward kernel: every D and dtype for k of 1, 3, 10 and 16, and every form at k = 1, D = 64.

    Args:
        kernel: the kernel.
        name: its name in `Kind`.
        defaults: its constexpr arguments besides those that all attention kernels have.
    """
    shapes = [(k, dim, dtype, "pool") for k, dim, dtype in product((1, 3, 10, 16), HEAD_DIMS, _ITEMSIZES)]
    known = set(kernel.arg_names)
    if name == CANDIDATES:
        # not supported: see triton_common.support.not_supported_reasons
        shapes.remove((16, 128, "fp32", "pool"))
    shapes += [(1, 64, "bf16", form) for form, changes in _FORMS.items() if changes and changes.keys() <= known]
    return [
        _attention_variant(kernel, Kind(name, k, k + 1, dim, _ITEMSIZES[dtype]), dtype, form, defaults | _FORMS[form])
        for k, dim, dtype, form in shapes
    ] + [
        _attention_variant(kernel, kind, "bf16", table.gpus[0], defaults, config=config)._replace(arch=table.arch)
        for table in tables()
        for kind, config in table.configurations.items()
        if kind.kernel == name
    ]


def fused_variants(kernel: Any) -> list[KernelVariant]:
    """Variants of the fused backward kernel: every form, D, dtype and block of keys that it is launched with."""
    forms = [(*own, *lengths) for own in ((), ("own logits",)) for lengths in ((), ("no lengths",))]
    dtypes = [dtype for dtype, itemsize in _ITEMSIZES.items() if itemsize == 2]
    dims = [dim for dim in HEAD_DIMS if dim <= FUSED_DIM]
    return [
        _attention_variant(
            kernel,
            Kind(FUSED, 1, 1, dim, 2, few_keys=num_keys < SHORT_KEYS),
            dtype,
            ", ".join(form or ("pool",)) + f", m={num_keys}",
            {"ATOMIC": False} | {key: value for part in form for key, value in _FORMS[part].items()},
            num_keys,
        )
        for dim, dtype, num_keys, form in product(dims, dtypes, (SHORT_KEYS // 2, SHORT_KEYS), [*forms, ("atomic",)])
    ]


def forward_variants(kernel: Any, name: str) -> list[KernelVariant]:
    """Variants of a forward kernel: every D and dtype for several k, and every combination of forms in bfloat16.

    Combinations come with k = 1 and D = 64 or 32; the forms that take most registers with every k and D. The kernel
    for short queries has the longest ones there; shorter ones and float16 come in the plain form.
    """
    short = name == SHORT
    dtypes = [dtype for dtype in _ITEMSIZES if not short or dtype != "fp32"]
    shapes: list[tuple[int, int, str, int, tuple[str, ...]]] = []
    for k, dim in product(_NUMBERS_OF_CONTEXTS, HEAD_DIMS):
        shapes += [(k, dim, dtype, SHORT_KEYS, ()) for dtype in dtypes]
        shapes += [(k, dim, "bf16", SHORT_KEYS, forms) for forms in _HEAVY_FORMS]
        if k == 1 and dim == 64:
            shapes += [
                (k, dim, "bf16", SHORT_KEYS, forms) for forms in (("alternating rows",), ("alternating rows", "lse"))
            ]
        if k == 1 and dim in (32, 64):
            shapes += [(k, dim, "bf16", SHORT_KEYS, forms) for forms in _forward_forms(pointers=short) if forms]
            if short:
                shapes += [(k, dim, dtype, keys, ()) for dtype, keys in product(dtypes, _SHORTER_KEYS)]
    variants = []
    for k, dim, dtype, num_keys, forms in dict.fromkeys(shapes):
        changes = {key: value for form in forms for key, value in _FORMS[form].items()}
        label = ", ".join(forms or ("pool",)) + (f", m={num_keys}" if short else "")
        kind = Kind(
            name,
            k,
            slots_of(name, k, has_state=changes.get("HAS_STATE", True)),
            dim,
            _ITEMSIZES[dtype],
            quantised="int8" in forms or "int8 per query" in forms,
            lse="lse" in forms,
            descriptors=short and k <= 2 and "pointers" not in forms and not changes.get("HAS_IDS", False),
        )
        defaults = {"QUANTISED": False, "PER_QUERY": False, "HAS_LSE": False}
        variants.append(_attention_variant(kernel, kind, dtype, label, defaults | changes, num_keys))
    return [*variants, *(variant for table in tables() for variant in _variants_of_table(kernel, name, table))]


def _variants_of_table(kernel: Any, name: str, table: Table) -> Iterator[KernelVariant]:
    """Every configuration of a launch table, in bfloat16."""
    for kind, config in table.configurations.items():
        if kind.kernel == name:
            changes = {"QUANTISED": kind.quantised, "PER_QUERY": False, "HAS_LSE": kind.lse}
            # a free slot of several contexts may have a state row
            changes["HAS_STATE"] = kind.slots > kind.num_context
            label = f"{table.gpus[0]}{', int8' * kind.quantised}{', lse' * kind.lse}{', no state' * (kind.slots == 1)}"
            variant = _attention_variant(kernel, kind, "bf16", label, changes, config=config)
            yield variant._replace(arch=table.arch)


def _forward_forms(*, pointers: bool) -> Iterator[tuple[str, ...]]:
    """Every combination of `_FORMS` that a forward call may have; `pointers`: also those with unusual strides."""
    candidates = (
        ("gathered",),
        ("ragged",),
        ("ragged gather",),
        (),
        *((("pointers",), ("ragged", "pointers")) * pointers),
    )
    optional = ("own logits", "no state", "no lengths", "lse")
    for form, chosen in product(candidates, product((False, True), repeat=len(optional))):
        forms = (*form, *compress(optional, chosen))
        yield forms
        yield (*forms, "int8")
        # ids and offsets come with the candidates of a pool
        if form in ((), ("pointers",)):
            yield (*forms, "int8 per query")


def _attention_variant(
    kernel: Any,
    kind: Kind,
    dtype: str,
    form: str,
    changes: dict[str, Any],
    num_keys: int = SHORT_KEYS,
    config: LaunchConfig | None = None,
) -> KernelVariant:
    constants = {"H": _HEADS, "K": kind.num_context, "D": kind.head_dim, "HAS_STATE": True, "HAS_LENGTHS": True}
    constants |= {"HAS_IDS": False, "RAGGED": False, "HAS_OWN_LOGITS": False, "INTERPRET": False, **changes}
    row = _HEADS * kind.head_dim
    constants |= {"CO_N": kind.num_context * row, "CO_C": row, "SO_N": row}
    if "alternating rows" in form:
        # outputs of a candidate's contexts and its state in one tensor
        constants |= dict.fromkeys(("CO_N", "SO_N"), (kind.num_context + 1) * row)
    constants["POOL"] = not (constants["HAS_IDS"] or constants["RAGGED"])
    has_state = bool(constants["HAS_STATE"])
    if kind.kernel not in FORWARD:
        kind = kind._replace(slots=slots_of(kind.kernel, kind.num_context, has_state=has_state))
    config = config or rule(kind)
    if kind.kernel in FORWARD:
        constants |= forward_options(kind, config, num_keys)
    else:
        constants |= backward_options(kind, config, num_keys)
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {
        argument: _type_of(argument, dtype, constants) for argument in kernel.arg_names if argument not in constants
    }
    label = f"k={kind.num_context} D={kind.head_dim} {dtype} {form}"
    # pointers from PyTorch's allocator, and strides that are multiples of D
    divisible = [name for name in signature if name.endswith("_ptr") or name in _TENSOR_STRIDES]
    # see triton_launch.keeps_short_queries
    arch = "sm_90" if kind.kernel in (SHORT, FUSED) else None
    rows = config.block_m // kind.slots * (kind.num_context + has_state)
    return KernelVariant(
        kernel,
        label,
        signature,
        constants,
        config.num_warps,
        config.num_stages,
        tuple(divisible),
        arch,
        logits=rows * constants["BLOCK_N"],
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
    wide = ("lse_ptr", "scale_ptr", "logits_ptr", "shift_ptr", "delta_ptr")
    return "*fp32" if argument.endswith(wide) else f"*{dtype}"
