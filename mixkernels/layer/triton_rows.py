"""What the kernels over rows of d share: the tile rule, addressing, LayerNorm of a tile and its gradient.

A tile has BLOCK_R rows and BLOCK_D >= D columns; columns beyond D are masked. Rows are addressed by up to three leading
dimensions, so slices of stacked rows, expanded pools and transposes are read in place.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkernels.tensors import dense_rows
from mixkernels.triton_common.launching import Launch
from mixkernels.triton_common.runtime import INTERPRET, Memory
from mixkernels.triton_common.variant import KernelVariant

SHIPPED_WIDTHS = (384, 768, 1024)
"""Hidden sizes of common encoders: the variants that are compiled ahead of time."""

TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# strides of rows of d, not those of one number per candidate: the additive score's (a) and its gradient's (g)
_ROW_STRIDE = re.compile(r"[a-z]+_[012]|(?!a_|g_)[a-z]+_[bnk]")

_LEVELS = 3
_MOST_SUMMING_PROGRAMS = 1024
_STAGES = 2


class TileConfig(NamedTuple):
    """Rows and columns of a tile; they depend only on d and the kernel, so a new size never recompiles."""

    block_r: int
    block_d: int
    num_warps: int


def tile_config(width: int, elements: int) -> TileConfig:
    """Tile of at most 32 rows of `width`, about `elements` in all: 4096 are 32 registers per thread of four warps."""
    block_d = triton.next_power_of_2(width)
    return TileConfig(min(32, max(1, elements // block_d)), block_d, num_warps=8 if block_d > elements else 4)


def runs(rows: int, block_r: int) -> tuple[int, int]:
    """Programs of a launch that sums over rows, and tiles per program; both depend only on the number of rows."""
    tiles = triton.cdiv(rows, block_r)
    tiles_each = max(1, triton.cdiv(tiles, _MOST_SUMMING_PROGRAMS))
    return triton.cdiv(tiles, tiles_each), tiles_each


def variant(kernel, width: int, dtype: torch.dtype, config: TileConfig, **constants: int) -> KernelVariant:
    """Describe a kernel over rows of `width` in one launch configuration, for compilation ahead of time."""
    constants = {**constants, "D": width, "BLOCK_D": config.block_d}
    if "BLOCK_R" in kernel.arg_names:
        constants["BLOCK_R"] = config.block_r
    pointers = {"partial_ptr": "*fp32", "scores_ptr": "*fp32", "additive_ptr": "*fp32", "keys_ptr": "*i64"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            signature[name] = pointers.get(name, f"*{TRITON_TYPES[dtype]}")
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    label = "".join(f" {name}={value}" for name, value in constants.items() if not name.startswith("BLOCK"))
    config_name = f"{label.strip()} {str(dtype).removeprefix('torch.')}"
    divisible = tuple(name for name in signature if name.endswith("_ptr") or _ROW_STRIDE.fullmatch(name))
    return KernelVariant(kernel, config_name, signature, constants, config.num_warps, _STAGES, divisible)


class RowLayout(NamedTuple):
    """Leading dimensions of several tensors (..., d) of one shape, merged where the strides of all allow it."""

    sizes: tuple[int, ...]
    """Of the three dimensions, outermost first."""
    strides: list[tuple[int, ...]]
    """Of every tensor, in elements, for the three dimensions."""
    tensors: list[Tensor]
    """The tensors to hand to the kernel: copies where three dimensions do not describe them."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return math.prod(self.sizes)


def row_layout(*tensors: Tensor) -> RowLayout:
    """Describe tensors (..., d) of one shape as rows; copies what has more than three unmergeable dimensions."""
    dense = [dense_rows(tensor) for tensor in tensors]
    sizes: list[int] = []
    strides: list[list[int]] = []
    for dim, size in enumerate(dense[0].shape[:-1]):
        if size == 1:
            continue
        steps = [tensor.stride(dim) for tensor in dense]
        if sizes and all(outer == step * size for outer, step in zip(strides[-1], steps, strict=True)):
            sizes[-1] *= size
            strides[-1] = steps
        else:
            sizes.append(size)
            strides.append(steps)
    if len(sizes) > _LEVELS:
        return row_layout(*(tensor.contiguous() for tensor in dense))
    missing = _LEVELS - len(sizes)
    sizes = [1] * missing + sizes
    strides = [[0] * len(tensors)] * missing + strides
    return RowLayout(tuple(sizes), list(zip(*strides, strict=True)), dense)


Run = Callable[[Sequence[Tensor], float, Any], Tensor]
"""Takes a call's tensors, eps and out, and returns the result."""


class PreparedRows(NamedTuple):
    """A LayerNorm of all calls of one form; holds no tensors."""

    launch: Launch | None
    """None: there are no rows."""
    memory: Memory
    """Of the result."""

    def __call__(self, tensors: Sequence[Tensor], eps: float, out: Tensor | None) -> Tensor:
        """Run a call of the form: `tensors` are its rows, weight and bias, as the kernel takes them."""
        result = self.memory() if out is None else out
        if self.launch is not None:
            self.launch((*tensors, result), result, eps)
        return result.to(tensors[0].dtype) if INTERPRET else result


def rows_runner(
    kernel: Any,
    config: TileConfig,
    options: dict[str, Any],
    rows: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    out: Tensor | None,
) -> tuple[Run, bool]:
    """Return what runs calls of a form, and whether it may be kept: it takes tensors as they are.

    Args:
        kernel: its arguments are pointers of rows, weight, bias and output, eps, the number of rows, n1, n2, and three
            strides for each tensor of rows and the output.
        config: its tile.
        options: its other constexpr arguments.
        rows: tensors (..., d) of one shape.
        parameters: weight and bias.
        out: where the result is written, or None.
    """
    shape, dtype, device = rows[0].shape, torch.float32 if INTERPRET else rows[0].dtype, rows[0].device
    own = torch.empty(shape, dtype=dtype, device="meta")
    place = own if out is None or out.dtype != dtype else out
    layout = row_layout(*rows, place)
    if place is not own and layout.tensors[-1] is not place:
        place, layout = own, row_layout(*rows, own)
    direct = place is not own
    dense = (*layout.tensors[:-1], *(parameter.contiguous() for parameter in parameters))
    launch = None
    if rows[0].numel():
        numbers = (layout.rows, *layout.sizes[1:], *(step for strides in layout.strides for step in strides))
        constants = {**options, "D": shape[-1], "BLOCK_R": config.block_r, "BLOCK_D": config.block_d}
        programs = triton.cdiv(layout.rows, config.block_r)
        launch = Launch(kernel, programs, numbers, constants | {"num_warps": config.num_warps}, device)
    run: Run = PreparedRows(launch, Memory(shape, dtype, device))
    kept = all(before is after for before, after in zip((*rows, *parameters), dense, strict=True))
    return (run if out is None or direct else _copied(run)) if kept else _fixed(run, dense, direct), kept


def _copied(run: Run) -> Run:
    return lambda tensors, eps, out: out.copy_(run(tensors, eps, None))


def _fixed(run: Run, tensors: Sequence[Tensor], direct: bool) -> Run:
    """Run on these tensors, copies of the call's own."""
    if direct:
        return lambda _, eps, out: run(tensors, eps, out)
    return lambda _, eps, out: (lambda result: result if out is None else out.copy_(result))(run(tensors, eps, None))


@triton.jit
def row_offset(o_row, n1, n2, s0, s1, s2):
    """Return the offset of row numbers (int32) in a tensor of leading dimensions (..., n1, n2)."""
    i_2 = (o_row % n2).to(tl.int64)
    i_1 = (o_row // n2 % n1).to(tl.int64)
    i_0 = (o_row // n2 // n1).to(tl.int64)
    return i_0 * s0 + i_1 * s1 + i_2 * s2


@triton.jit
def load_tile(p_tile, m_tile):
    """Load a tile in float32, zero where masked."""
    return tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def standardise(b_x, m_d, eps, D: tl.constexpr):
    """Return a tile's rows with mean 0 and variance 1, and the factors 1 / sqrt(variance + eps)."""
    # rounded to nearest: with a GPU's plain division the variance of equal numbers may not be 0
    b_mean = tl.div_rn(tl.sum(b_x, axis=1), D * 1.0)
    b_centred = tl.where(m_d[None, :], b_x - b_mean[:, None], 0.0)
    # a Python float may arrive as float64 under torch.compile
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, axis=1) / D + tl.cast(eps, tl.float32))
    return b_centred * b_rstd[:, None], b_rstd


@triton.jit
def standardise_bwd(b_grad, b_xhat, b_rstd, m_d, D: tl.constexpr):
    """Return the gradient of `standardise`'s input rows from that of its output; zero in masked columns."""
    b_along = tl.sum(b_grad * b_xhat, axis=1) / D
    b_mean = tl.sum(b_grad, axis=1) / D
    b_dx = (b_grad - b_mean[:, None] - b_xhat * b_along[:, None]) * b_rstd[:, None]
    return tl.where(m_d[None, :], b_dx, 0.0)
