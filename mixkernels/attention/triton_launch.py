"""Launch configurations of the attention kernels: by rule, and exceptions per GPU, files of `launch_tables`.

A configuration depends only on kernel, form, rows per candidate, D and dtype, so a new size never recompiles a kernel.
Nothing is tuned at import. With MIXKERNELS_TUNING=1 a kernel times the configurations of `alternatives` at its first
call of a `Kind` on a GPU and keeps the fastest for the rest of the process. That first call cannot be recorded as a
CUDA graph.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
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


SHORT, STREAMED = "forward_short", "forward_streamed"
CANDIDATES, SHARED, FUSED = "backward_candidates", "backward_shared", "backward_fused"
KERNELS = (SHORT, STREAMED, CANDIDATES, SHARED, FUSED)
FORWARD = (SHORT, STREAMED)


class Kind(NamedTuple):
    """What a configuration depends on."""

    kernel: str
    """One of `KERNELS`."""
    num_context: int
    """k."""
    slots: int
    """Rows that a candidate takes in a tile; see `slots_of`."""
    head_dim: int
    itemsize: int
    """Bytes of an element of the products."""
    quantised: bool = False
    """int8 candidates."""
    lse: bool = False
    """Log-sum-exps are returned."""
    descriptors: bool = False
    """The memory engine copies whole tiles."""
    few_keys: bool = False
    """Of the fused backward kernel: half a block holds the query's keys."""


SHORT_KEYS = 128
"""Most tokens of a query that the kernels for short queries keep on the chip."""
FUSED_DIM = 64
"""Largest head dimension of the fused backward kernel; larger ones spill registers."""


@cache
def keeps_short_queries(device: torch.device) -> bool:
    """Whether short queries stay on the chip on a device: on Hopper, where it measured faster, and in the interpreter.

    On other GPUs tiles large enough to gain would spill registers, or it has not been measured.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def slots_of(kernel: str, num_context: int, *, has_state: bool) -> int:
    """Return how many rows of a tile a candidate takes, a power of two in the forward kernels.

    A state row takes a free slot of its candidate. With k = 1 the kernel for short queries, which waits for memory, has
    a tile of states instead, because half of every load of own keys would be empty.
    """
    if kernel == FUSED:
        # states have a tile of their own
        return num_context
    if kernel not in FORWARD:
        return num_context + has_state
    if kernel == STREAMED and num_context == 1:
        return 1 + has_state
    return 1 << (num_context - 1).bit_length()


@cache
def forward_options(kind: Kind, config: LaunchConfig, num_keys: int) -> dict[str, Any]:
    """Return the arguments of a forward launch that its configuration decides, for queries of `num_keys`."""
    # no product takes fewer than 16 rows or columns
    options = config.options() | {"SLOTS": kind.slots, "BLOCK_S": max(16, config.block_m // kind.slots)}
    if kind.kernel == SHORT:
        options["BLOCK_N"] = max(16, 1 << (num_keys - 1).bit_length())
        options |= {"STAGES": config.num_stages, "DESCRIPTORS": kind.descriptors}
    return options


def backward_options(kind: Kind, config: LaunchConfig, num_keys: int) -> dict[str, Any]:
    """Return the arguments of a backward launch that its configuration decides, for queries of `num_keys`."""
    options = config.options() | {"STAGES": config.num_stages}
    if kind.kernel == FUSED:
        options["BLOCK_N"] = SHORT_KEYS // 2 if kind.few_keys else SHORT_KEYS
    return options


def fused_kind(num_context: int, num_keys: int, head_dim: int, itemsize: int, *, has_state: bool) -> Kind | None:
    """Return the kind of the fused backward kernel for calls of a shape; None: two kernels compute them.

    With several context embeddings, float32 or D = 128 it would spill registers or take more instructions a logit than
    the two kernels together. Without a state a tile's rows are too few.
    """
    if num_context > 1 or not has_state or num_keys > SHORT_KEYS or head_dim > FUSED_DIM or itemsize != 2:
        return None
    return Kind(FUSED, 1, 1, head_dim, itemsize, few_keys=num_keys <= SHORT_KEYS // 2)


_TABLES = Path(__file__).with_name("launch_tables")


class Table(NamedTuple):
    """Exceptions to `rule` for some GPUs: one file of `launch_tables`."""

    gpus: list[str]
    """Names as `torch.cuda.get_device_name` returns them."""
    arch: str
    """Their architecture, one of `mixkernels.triton_common.occupancy.ARCHS`."""
    source: str
    """How the configurations were found."""
    configurations: dict[Kind, LaunchConfig]


@cache
def tables() -> list[Table]:
    """Read all launch tables."""
    found = []
    for path in sorted(_TABLES.glob("*.json")):
        content = json.loads(path.read_text())
        entries = content.pop("configurations")
        configurations = {Kind(**entry["kind"]): LaunchConfig(**entry["config"]) for entry in entries}
        found.append(Table(**content, configurations=configurations))
    return found


@cache
def table_of(gpu: str) -> dict[Kind, LaunchConfig]:
    """Return the exceptions to `rule` of a GPU; empty without a table."""
    return next((table.configurations for table in tables() if gpu in table.gpus), {})


def launch_config(kind: Kind, device: torch.device, launch: Callable[[LaunchConfig], None]) -> LaunchConfig:
    """Return the configuration to launch with.

    Args:
        kind: what is launched.
        device: where; a GPU may have a table.
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
    return table_of(name).get(kind) or rule(kind)


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
    and sm_100: 64 rows fill a product of Hopper's tensor cores. Float32 products use no matrix units and many
    registers, so their tiles are small.
    """
    dim, low = kind.head_dim, kind.itemsize < 4
    if kind.kernel == SHORT:
        return _short_rule(kind)
    if kind.kernel == STREAMED:
        return _streamed_rule(kind)
    if kind.kernel == FUSED:
        if kind.few_keys:
            return LaunchConfig(64 if dim <= 32 else 32, SHORT_KEYS // 2, num_warps=4, num_stages=2)
        return LaunchConfig(64, SHORT_KEYS, num_warps=8, num_stages=2)
    if kind.kernel == CANDIDATES:
        if not low:
            # narrow heads have no stack frame on sm_80, sm_90 and sm_100 in these alone
            if (dim == 16 and kind.num_context > 10) or (dim == 32 and kind.num_context == 1):
                return LaunchConfig(64, 16, 8, 1)
            if dim == 32:
                return LaunchConfig(32, 32, 4, 1)
            return LaunchConfig(32, 32, 8, 1) if dim <= 64 else LaunchConfig(16, 16, 8, 1)
        if dim <= 32:
            # blocks of 64 keys spill on sm_80 at D = 16
            few = dim == 16 and kind.num_context == 1
            return LaunchConfig(64, 32 if few else 64, num_warps=4, num_stages=1)
        if dim == 64:
            # several own keys are one more product of the whole tile
            return LaunchConfig(64, 32, 8, 1) if kind.num_context == 1 else LaunchConfig(32, 64, 4, 1)
        return LaunchConfig(32, 64, num_warps=8, num_stages=1)
    if not low:
        return LaunchConfig(32, 32, num_warps=8, num_stages=1)
    if dim == 64:
        return LaunchConfig(32, 64, num_warps=4, num_stages=1)
    # four warps spill on sm_80 at D = 16
    return LaunchConfig(64, 64 if dim <= 32 else 32, num_warps=4 if dim == 32 else 8, num_stages=1)


def _short_rule(kind: Kind) -> LaunchConfig:
    dim, k, heavy = kind.head_dim, kind.num_context, kind.quantised or kind.lse
    many = kind.quantised and kind.lse
    tall = LaunchConfig(64, SHORT_KEYS, num_warps=4, num_stages=2)
    if dim == 128:
        if k == 1 and kind.descriptors and not kind.lse:
            return tall
        few = k == 1 and not kind.descriptors and (kind.quantised or not kind.lse)
        return tall._replace(block_m=32, num_stages=1 if few else 2)
    if dim <= 32:
        # states in a tile of their own take registers
        return tall._replace(num_stages=1) if k > 2 and kind.lse and (many or kind.slots == k) else tall
    if k == 1:
        return tall if kind.descriptors or not many else tall._replace(block_m=32)
    if many or (heavy and kind.slots == k):
        return tall._replace(block_m=32)
    return tall._replace(num_stages=1) if kind.quantised or kind.slots == k else tall


def _streamed_rule(kind: Kind) -> LaunchConfig:
    dim, k = kind.head_dim, kind.num_context
    if kind.itemsize == 4:
        return LaunchConfig(32, 16, num_warps=4 if dim <= 32 else 8, num_stages=2)
    if dim == 128:
        return LaunchConfig(32, 32, num_warps=8, num_stages=2)
    if k > 1 and kind.slots == k and dim == 64:
        # a tile of states comes on top
        return LaunchConfig(64, 32, num_warps=8 if k == 2 else 4, num_stages=2)
    return LaunchConfig(64, 32 if kind.quantised and dim == 64 else 64, num_warps=4, num_stages=2)


def alternatives(kind: Kind) -> list[LaunchConfig]:
    """Return what tuning tries: the rule, and its neighbours in keys per tile, warps and stages."""
    first = rule(kind)
    # a short query is one block, whatever its length
    blocks = (first.block_n,) if kind.kernel in (SHORT, FUSED) else (32, 64, 128)
    tried = [
        LaunchConfig(first.block_m, block_n, num_warps, num_stages)
        for block_n in blocks
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
    ]
    return [first, *(config for config in tried if config != first)]
