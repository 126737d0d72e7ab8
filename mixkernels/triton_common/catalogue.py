"""List every shipped kernel in every launch configuration; `mixkernels.resources` and tests compile them."""

import importlib

from mixkernels.triton_common.variant import KernelVariant

MODULES = (
    "attention.triton_forward",
    "attention.triton_backward",
    "layer.triton_layer_norm",
    "layer.triton_scoring",
)
"""Modules of `mixkernels` that have ``variants() -> list[KernelVariant]``."""


def variants_of(module: str) -> list[KernelVariant]:
    """Return the variants of one of `MODULES`; imports it, and triton with it."""
    return importlib.import_module(f"..{module}", __package__).variants()


def all_variants() -> list[KernelVariant]:
    """Every variant of every module, in the order of `MODULES`."""
    return [variant for module in MODULES for variant in variants_of(module)]
