"""Compile every kernel, without a GPU, and list what it uses: registers, stack, shared memory, occupancy, instructions.

    python -m mixkernels.resources [--arch sm_90 | all] [--kernel NAME] [--config TEXT] [--json]

Each kernel is compiled ahead of time in each shipped launch configuration (`mixkernels.triton_common.catalogue`), as
Triton compiles it at run time for tensors from PyTorch's allocator whose strides are multiples of 16 elements. The
figures come from the machine code: for NVIDIA by cuobjdump, which is part of Triton's package, for AMD from the
assembly's own metadata. A stack frame means spilled registers. Tests call `measure`.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixkernels.errors import BackendError
from mixkernels.machine_code import Loop, MachineCode, read_amdgcn, read_sass
from mixkernels.triton_common.occupancy import ARCHS, blocks_per_multiprocessor

if TYPE_CHECKING:
    from mixkernels.triton_common.variant import KernelVariant


@dataclass(frozen=True)
class Resources:
    """Resources that one kernel variant uses on one architecture."""

    kernel: str
    config: str
    arch: str
    registers: int
    """32-bit registers per thread; on AMD vector registers, including accumulation registers."""
    stack_bytes: int
    """Local memory per thread: spilled registers, or arrays that are indexed at run time. Shipped kernels have none."""
    shared_bytes: int
    """Shared memory per block."""
    shared_bytes_limit: int
    """Largest shared memory that a block may have on this architecture."""
    num_warps: int
    """Warps per block."""
    blocks_per_multiprocessor: int
    warps_per_multiprocessor: int
    occupancy: float
    """Warps that fit on a multiprocessor, as a fraction of those it can hold."""
    limited_by: str
    """What limits the number of blocks: registers, shared memory, tensor memory, or warps and blocks."""
    tensor_instructions: dict[str, int]
    """Matrix instructions in the machine code, with the number of times each appears (not how often it runs)."""
    global_load_bits: int
    """Bits of the widest load from global memory by one thread; 0 if there is none."""
    layout_conversions: int
    """Conversions between layouts of tiles, mostly by way of shared memory, in the whole kernel."""
    loop_instructions: int
    """Instructions of the hottest loop (`mixkernels.machine_code`); 0 without one, and on AMD."""
    loop_async_copies: int
    loop_barriers: int
    instructions_per_logit: float
    """Instructions of a thread in the hottest loop, times threads, by logits: what a score of one row costs in
    attention. Rows that a tile leaves empty count as cost. 0 in other kernels."""

    @property
    def fits(self) -> bool:
        """Whether a block can be launched at all."""
        return self.shared_bytes <= self.shared_bytes_limit and self.blocks_per_multiprocessor > 0


def measure(variant: "KernelVariant", arch: str) -> Resources:
    """Compile one variant for one of `ARCHS` (Triton caches the result) and read what it uses.

    Raises:
        BackendError: triton is not installed, TRITON_INTERPRET is set, or the kernel does not compile.
    """
    require_compiler()
    import triton

    limits = ARCHS[arch]
    try:
        compiled = triton.compile(
            _source(variant),
            target=triton.backends.compiler.GPUTarget(limits.backend, limits.target, limits.warp_size),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    # the errors of the compiler, of MLIR and of ptxas have no common base class
    except Exception as error:
        name = f"{variant.kernel.__name__} ({variant.config})"
        raise BackendError(f"{name} does not compile for {arch}: {type(error).__name__}: {error}") from error
    read = _read_cubin if limits.backend == "cuda" else read_amdgcn
    found = read(compiled.asm["cubin" if limits.backend == "cuda" else "amdgcn"])
    loop = found.loop or Loop(0, 0, 0, 0)
    threads = variant.num_warps * limits.warp_size
    shared_bytes, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    blocks, limited_by = blocks_per_multiprocessor(
        limits, found.registers, shared_bytes, variant.num_warps, tensor_memory=tensor_memory
    )
    return Resources(
        kernel=variant.kernel.__name__,
        config=variant.config,
        arch=arch,
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        shared_bytes=shared_bytes,
        shared_bytes_limit=limits.shared_bytes_per_block,
        num_warps=variant.num_warps,
        blocks_per_multiprocessor=blocks,
        warps_per_multiprocessor=blocks * variant.num_warps,
        occupancy=blocks * variant.num_warps / limits.warps,
        limited_by=limited_by,
        tensor_instructions=found.tensor_instructions,
        global_load_bits=found.global_load_bits,
        layout_conversions=compiled.asm["ttgir"].count("ttg.convert_layout "),
        loop_instructions=loop.instructions,
        loop_async_copies=loop.async_copies,
        loop_barriers=loop.barriers,
        instructions_per_logit=round(loop.instructions * threads / variant.logits, 2) if variant.logits else 0.0,
    )


def require_compiler() -> None:
    """Raise if kernels cannot be compiled here; no GPU is needed.

    Raises:
        BackendError: triton is not installed, or would interpret kernels instead of compiling them.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError("triton is not installed (pip install triton, Linux only); kernels cannot be compiled here")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise BackendError("TRITON_INTERPRET is set, so kernels would be interpreted; unset it to compile them")


def _source(variant: "KernelVariant") -> Any:
    """Describe a variant to the compiler as the launcher would, for dense tensors from PyTorch's allocator."""
    from triton.compiler import ASTSource

    parameters = variant.kernel.params
    signature, attributes = {}, {}
    for parameter in parameters:
        if parameter.name in variant.constants:
            signature[parameter.name] = "constexpr"
            continue
        kind = variant.signature[parameter.name]
        signature[parameter.name] = kind
        specialises = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        # at run time Triton specialises on alignment to 16 bytes and divisibility by 16: wide loads need both
        if specialises and (kind.startswith("*") or kind in ("i32", "i64")):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=attributes)


def _read_cubin(cubin: bytes) -> MachineCode:
    import triton.knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, flag, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    return read_sass(usage, sass)


def measure_numbered(module: str, number: int, arch: str) -> Resources | str:
    """`measure` a variant given by number (kernels cannot be sent to a process); return an error as its message."""
    from mixkernels.triton_common.catalogue import variants_of

    try:
        return measure(variants_of(module)[number], arch)
    except BackendError as error:
        return str(error)


def _table(rows: Sequence[Resources]) -> Iterator[str]:
    header = (
        "kernel",
        "configuration",
        "arch",
        "regs",
        "stack",
        "shared",
        "warps",
        "occupancy",
        "limited by",
        "loads",
        "a logit",
    )
    cells = [
        (
            row.kernel,
            row.config,
            row.arch,
            str(row.registers),
            str(row.stack_bytes) + ("!" if row.stack_bytes else ""),
            str(row.shared_bytes) + ("" if row.fits else "!"),
            f"{row.blocks_per_multiprocessor}x{row.num_warps}",
            f"{row.occupancy:.0%}",
            row.limited_by,
            str(row.global_load_bits),
            f"{row.instructions_per_logit:.2f}" if row.instructions_per_logit else "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    products = [", ".join(f"{count} {name}" for name, count in row.tensor_instructions.items()) for row in rows]
    last_column = ["tensor instructions", *(text or "none" for text in products)]
    for line, last in zip([header, *cells], last_column, strict=True):
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=True)), last])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixkernels.resources",
        description="Compile every kernel ahead of time, without a GPU, and list the GPU resources that it uses.",
    )
    parser.add_argument("--arch", action="append", choices=[*ARCHS, "all"], help="may be repeated (default: sm_90)")
    parser.add_argument("--kernel", metavar="NAME", help="only kernels whose name contains NAME")
    parser.add_argument("--config", metavar="TEXT", help="only configurations whose description contains TEXT")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of the table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 1 if a variant does not compile or fit; exits with 2 on wrong arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    archs = list(ARCHS) if "all" in (options.arch or ()) else list(dict.fromkeys(options.arch or ["sm_90"]))
    try:
        require_compiler()
    except BackendError as error:
        parser.error(str(error))
    from mixkernels.triton_common.catalogue import MODULES, variants_of

    every = [(module, number, v) for module in MODULES for number, v in enumerate(variants_of(module))]
    jobs = [
        (module, number, arch)
        for module, number, variant in every
        if (options.kernel or "") in variant.kernel.__name__ and (options.config or "") in variant.config
        for arch in archs
        if variant.arch in (None, arch)
    ]
    if not jobs:
        names = ", ".join(sorted({variant.kernel.__name__ for _, _, variant in every}))
        parser.error(f"no variant has --kernel {options.kernel} and --config {options.config}; kernels are {names}")
    results = []
    # every worker is a fresh interpreter: a forked one would share torch's threads
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for result in pool.map(measure_numbered, *zip(*jobs, strict=True)):
            results.append(result)
            print(f"\rcompiled {len(results)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = [result for result in results if isinstance(result, Resources)]
    if options.json:
        print(json.dumps([asdict(replace(row, occupancy=round(row.occupancy, 4))) for row in rows], indent=1))
    else:
        for line in _table(rows):
            print(line)
    problems = [result for result in results if isinstance(result, str)]
    problems += [
        f"{row.kernel} ({row.config}) does not fit {row.arch}: {row.shared_bytes} bytes of shared memory per block, "
        f"limit {row.shared_bytes_limit}"
        for row in rows
        if not row.fits
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
