"""How many programs of a kernel a GPU runs at the same time (a wave), and how many a launch should have."""

from functools import cache
from typing import Any, NamedTuple

import torch


class Arch(NamedTuple):
    """Limits of one multiprocessor (compute unit on AMD) of an architecture.

    NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability. AMD: the CDNA3 instruction set
    guide, and LLVM's AMDGPU backend for workgroups per compute unit.
    """

    backend: str
    target: int | str
    warp_size: int
    warps: int
    blocks: int
    registers: int
    """32-bit registers per lane, summed over the warps of a partition; a warp gets a multiple of `register_unit`."""
    register_unit: int
    shared_bytes: int
    shared_bytes_per_block: int
    shared_bytes_reserved: int
    tensor_memory_columns: int = 0


_PARTITIONS = 4
"""Schedulers (SIMDs) per multiprocessor, on all architectures here; each has a quarter of the warps and registers."""

ARCHS = {
    "sm_80": Arch("cuda", 80, 32, 64, 32, 512, 8, 164 * 1024, 163 * 1024, 1024),
    "sm_90": Arch("cuda", 90, 32, 64, 32, 512, 8, 228 * 1024, 227 * 1024, 1024),
    "sm_100": Arch("cuda", 100, 32, 64, 32, 512, 8, 228 * 1024, 227 * 1024, 1024, 512),
    "gfx942": Arch("hip", "gfx942", 64, 32, 16, 512, 8, 64 * 1024, 64 * 1024, 0),
}


def blocks_per_multiprocessor(
    arch: Arch, registers: int, shared_bytes: int, num_warps: int, *, tensor_memory: int = 0
) -> tuple[int, str]:
    """Return how many blocks fit on a multiprocessor at once, and which resource limits them.

    Args:
        arch: one of `ARCHS`.
        registers: per thread.
        shared_bytes: per block.
        num_warps: per block.
        tensor_memory: columns of tensor memory per block (sm_100).
    """
    # registers are allocated to whole warps, in units
    allocated = -(-max(registers, 1) // arch.register_unit) * arch.register_unit
    fitting = {
        "warps and blocks": min(arch.blocks, arch.warps // num_warps),
        "registers": arch.registers // allocated * _PARTITIONS // num_warps,
    }
    if shared_bytes:
        fitting["shared memory"] = arch.shared_bytes // (shared_bytes + arch.shared_bytes_reserved)
    if tensor_memory:
        fitting["tensor memory"] = arch.tensor_memory_columns // tensor_memory
    limited_by = min(fitting, key=fitting.__getitem__)
    return fitting[limited_by], limited_by


@cache
def limits_of(device: torch.device) -> tuple[int, Arch]:
    """Return the number of multiprocessors of an NVIDIA GPU, and the limits of each."""
    found = torch.cuda.get_device_properties(device)
    reserved = 1024 if found.major >= 8 else 0
    arch = Arch(
        backend="cuda",
        target=10 * found.major + found.minor,
        warp_size=found.warp_size,
        warps=found.max_threads_per_multi_processor // found.warp_size,
        # every GPU has 16 blocks and 65,536 registers; PyTorch does not report them
        blocks=16,
        registers=65536 // (found.warp_size * _PARTITIONS),
        register_unit=8,
        shared_bytes=found.shared_memory_per_multiprocessor,
        shared_bytes_per_block=found.shared_memory_per_multiprocessor - reserved,
        shared_bytes_reserved=reserved,
    )
    return found.multi_processor_count, arch


_MOST_WAVES = 32
_START_TILES = 1
"""What starting a program costs, in tiles: loading the keys and values of a query."""


@cache
def programs_each(pairs: int, tiles: int, wave: int) -> int:
    """Return how many programs share the tiles of each query and head, so that the last wave is as full as others.

    All programs take equally long. For every number of waves the most programs that fit are considered, and those with
    the least time are chosen; of equals, the fewest.

    Args:
        pairs: number of queries times heads.
        tiles: of one query and head.
        wave: programs that run at the same time.
    """

    def time(programs: int) -> int:
        return -(-pairs * programs // wave) * (-(-tiles // programs) + _START_TILES)

    fitting = {min(max(waves * wave // pairs, 1), tiles) for waves in range(1, _MOST_WAVES + 1)}
    return min(sorted(fitting), key=time)


_WAVES: dict[Any, int] = {}


def one_wave(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], device: torch.device) -> int:
    """Return how many programs of a kernel run at the same time on a GPU; compiles the kernel at its first call.

    Results are cached per kernel, options, device and dtypes. Strides and alignment specialise a kernel too, but the
    number of programs changes no result.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: those of a launch that are not constexpr.
        options: its constexpr arguments, num_warps and num_stages.
        device: where it is launched; the current device.
    """
    dtypes = tuple(value.dtype for value in arguments if isinstance(value, torch.Tensor))
    key = (kernel, device, dtypes, tuple(options.items()))
    if key not in _WAVES:
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        # loads the machine code, which tells its registers
        compiled._init_handles()
        multiprocessors, arch = limits_of(device)
        blocks, _ = blocks_per_multiprocessor(arch, compiled.n_regs, compiled.metadata.shared, options["num_warps"])
        _WAVES[key] = multiprocessors * max(blocks, 1)
    return _WAVES[key]
