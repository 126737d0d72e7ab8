"""Launch configurations of the attention kernels: by rule, and a shipped table per GPU where it was measured.

A configuration depends only on kernel, rows per candidate, D and dtype, so a new size never recompiles a kernel.
Nothing is tuned at import. With MIXKERNELS_TUNING=1 a kernel times the configurations of `alternatives` at its first
call of a `Kind` on a GPU and keeps the fastest for the rest of the process. That first call cannot be recorded as a
CUDA graph.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from mixkernels.errors import BackendError


class LaunchConfig(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """Shared keys of a tile."""
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Return the arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


RESIDENT = "forward_resident"
"""The forward kernel in the form that keeps a short query's keys on the chip and takes many tiles per program."""


class Kind(NamedTuple):
    """What a configuration depends on."""

    kernel: str
    """"forward", `RESIDENT`, "backward_candidates" or "backward_shared"."""
    num_context: int
    """k."""
    slots: int
    """Rows per candidate: k + 1, or k without a state."""
    head_dim: int
    itemsize: int
    """Bytes of an element of the products."""


@cache
def keeps_short_queries(device: torch.device) -> bool:
    """Whether short queries stay on the chip on a device: on Hopper, where it measured faster, and in the interpreter.

    On other GPUs tiles large enough to gain would spill registers, or it has not been measured.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def resident_keys(num_context: int, head_dim: int) -> int:
    """Return the most tokens of a query that a program keeps on the chip, 0 for none.

    With more own keys per candidate or wider heads, the tiles being loaded need the registers and shared memory.
    """
    return 128 if num_context == 1 and head_dim <= 64 else 0


@cache
def forward_options(kind: Kind, config: LaunchConfig, num_keys: int) -> dict[str, Any]:
    """Return the arguments of a forward launch that its configuration decides, for queries of `num_keys`."""
    from triton import next_power_of_2

    # state rows are a separate tile; no product takes fewer than 16 rows or columns
    options = config.options() | {"BLOCK_S": max(16, next_power_of_2(config.block_m // kind.num_context))}
    if kind.kernel == RESIDENT:
        return options | {"RESIDENT": True, "STAGES": config.num_stages, "BLOCK_N": max(16, next_power_of_2(num_keys))}
    return options | {"RESIDENT": False, "STAGES": 1}


_HOPPER = {
    Kind("forward", 1, 2, 64, 2): LaunchConfig(64, 64, num_warps=4, num_stages=2),
}
TABLE: dict[str, dict[Kind, LaunchConfig]] = {
    "NVIDIA H200": _HOPPER,
    # the same multiprocessor as an H200, where it was measured
    "NVIDIA H100 80GB HBM3": _HOPPER,
}
"""Measured exceptions to `rule`, by name of the GPU: benchmarks/results/nvidia-h200/gpu_tuning.json."""


def launch_config(kind: Kind, device: torch.device, launch: Callable[[LaunchConfig], None]) -> LaunchConfig:
    """Return the configuration to launch with.

    Args:
        kind: what is launched.
        device: where; a GPU may have entries in `TABLE`.
        launch: launches with a configuration; called only with MIXKERNELS_TUNING=1 on a GPU.

    Raises:
        BackendError: MIXKERNELS_TUNING=1 would time kernels while a CUDA graph is recorded.
    """
    if device.type != "cuda":
        return rule(kind)
    name = _name_of(device)
    if os.environ.get("MIXKERNELS_TUNING", "0") == "1":
        if (name, kind) not in _TUNED:
            if torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"MIXKERNELS_TUNING=1 cannot time kernels while a CUDA graph is recorded ({kind.kernel}, "
                    f"k={kind.num_context}, D={kind.head_dim}): run the same call once before recording"
                )
            _TUNED[name, kind] = min(alternatives(kind), key=lambda config: _milliseconds(launch, config))
        return _TUNED[name, kind]
    return TABLE.get(name, {}).get(kind) or rule(kind)


@cache
def _name_of(device: torch.device) -> str:
    # needed at every launch, and slow in PyTorch
    return torch.cuda.get_device_name(device)


def _milliseconds(launch: Callable[[LaunchConfig], None], config: LaunchConfig) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: launch(config), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


_TUNED: dict[tuple[str, Kind], LaunchConfig] = {}


@cache
def rule(kind: Kind) -> LaunchConfig:
    """Return the configuration for any GPU.

    The largest tiles whose registers do not spill, as `python -m mixkernels.resources` counts them for sm_80, sm_90
    and sm_100: 64 rows fill a product of Hopper's tensor cores, and at most a fifth of them is wasted. Float32 products
    use no matrix units and many registers, so their tiles are small.
    """
    dim, low = kind.head_dim, kind.itemsize < 4
    if kind.kernel == RESIDENT:
        return LaunchConfig(64, 128, num_warps=4, num_stages=3)
    if kind.kernel == "forward":
        # a tile of state rows comes on top of that of the contexts; with k = 1 it is as tall
        if not low:
            if dim <= 32:
                return LaunchConfig(32, 32, num_warps=4, num_stages=2)
            if dim == 64:
                return LaunchConfig(32, 16 if kind.num_context == 1 else 32, num_warps=8, num_stages=2)
            return LaunchConfig(16, 16, num_warps=8, num_stages=1)
        if dim == 128:
            return LaunchConfig(64, 16, 8, 2) if kind.slots <= 8 else LaunchConfig(16, 32, 8, 2)
        if kind.slots > 12:
            return LaunchConfig(32, 32, num_warps=8, num_stages=2)
        keys = 32 if dim == 64 and (kind.num_context == 1 or kind.slots > 8) else 64
        return LaunchConfig(64, keys, num_warps=4 if kind.slots <= 8 else 8, num_stages=2)
    if kind.kernel == "backward_candidates":
        if not low:
            return LaunchConfig(32, 32, 8, 1) if dim <= 64 else LaunchConfig(16, 16, 8, 1)
        if dim <= 32:
            return LaunchConfig(64, 64, num_warps=4, num_stages=1)
        if dim == 64:
            # several own keys are one more product of the whole tile
            return LaunchConfig(64, 32, 8, 1) if kind.num_context == 1 else LaunchConfig(32, 64, 4, 1)
        return LaunchConfig(32, 64, num_warps=8, num_stages=1)
    if not low:
        return LaunchConfig(32, 32, num_warps=8, num_stages=1)
    return LaunchConfig(64, 64 if dim <= 64 else 32, num_warps=4 if dim <= 32 else 8, num_stages=1)


def alternatives(kind: Kind) -> list[LaunchConfig]:
    """Return what tuning tries: the rule, and its neighbours in keys per tile, warps and stages."""
    first = rule(kind)
    # a resident query is one block, whatever its length
    blocks = (first.block_n,) if kind.kernel == RESIDENT else (32, 64, 128)
    tried = [
        LaunchConfig(first.block_m, block_n, num_warps, num_stages)
        for block_n in blocks
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
    ]
    return [first, *(config for config in tried if config != first)]
