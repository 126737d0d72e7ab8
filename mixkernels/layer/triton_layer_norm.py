"""Residual + LayerNorm and gate + LayerNorm, forward and backward: every input read once, the output written once.

The backward recomputes a row's statistics, which is free because the row is read anyway, so the forward saves none.
Gradients of weight and bias are reduced in two stages of fixed order: a program sums over its run of rows and writes
one partial row, and PyTorch sums those. The number of programs depends only on the number of rows.

All programs are on grid axis x. Triton specialises strides only by whether they are divisible by 16: they are whenever
d is, and loads are then wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkernels.layer.triton_rows import (
    SHIPPED_WIDTHS,
    TRITON_TYPES,
    Run,
    TileConfig,
    load_tile,
    row_layout,
    row_offset,
    rows_runner,
    runs,
    standardise,
    standardise_bwd,
    tile_config,
    variant,
)
from mixkernels.triton_common.runtime import device_of, empty_output
from mixkernels.triton_common.variant import KernelVariant

_SIZES = ["rows", "n1", "n2"]

# per element: addition of the residual, or the gate's sigmoid and mix; mean 1, centring 1, variance 2, scaling 1,
# weight and bias 2
_FLOPS_NORM = 7
_FLOPS_RESIDUAL = 1
_FLOPS_GATE = 7
# recomputed statistics 5, gradient of weight and bias 3, of the rows 9
_FLOPS_NORM_BWD = 17
_FLOPS_GATE_BWD = 13


def residual_config(width: int) -> TileConfig:
    """Tile of the residual's forward kernel."""
    return tile_config(width, 4096)


def wide_config(width: int) -> TileConfig:
    """Tile of the gate's forward kernel and of both backward kernels, which hold up to five tiles at once."""
    return tile_config(width, 2048)


def _metadata(flops_per_element: int, row_pointers: tuple[str, ...]):
    """Work of a launch for profilers: operations, and bytes with every tensor of rows read or written once."""

    def launch_metadata(grid, kernel, args):
        elements = args["rows"] * args["D"]
        present = [args[name] for name in row_pointers if not (name.startswith("state") and not args["HAS_STATE"])]
        return {
            "name": f"{kernel.name} [rows={args['rows']} d={args['D']}]",
            "flops32": flops_per_element * elements,
            "bytes": elements * sum(tensor.element_size() for tensor in present),
        }

    return launch_metadata


@triton.jit(
    do_not_specialize=_SIZES,
    launch_metadata=_metadata(_FLOPS_NORM + _FLOPS_RESIDUAL, ("x_ptr", "residual_ptr", "out_ptr")),
)
def residual_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    rows,
    n1,
    n2,
    x_0,
    x_1,
    x_2,
    r_0,
    r_1,
    r_2,
    o_0,
    o_1,
    o_2,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_R rows
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_tile = (o_row < rows)[:, None] & m_d[None, :]

    # [BLOCK_R, BLOCK_D]
    b_x = load_tile(x_ptr + row_offset(o_row, n1, n2, x_0, x_1, x_2)[:, None] + o_d[None, :], m_tile)
    b_x += load_tile(residual_ptr + row_offset(o_row, n1, n2, r_0, r_1, r_2)[:, None] + o_d[None, :], m_tile)
    b_xhat, _ = standardise(b_x, m_d, eps, D)

    b_w, b_b = load_tile(weight_ptr + o_d, m_d), load_tile(bias_ptr + o_d, m_d)
    b_y = b_xhat * b_w[None, :] + b_b[None, :]
    p_out = out_ptr + row_offset(o_row, n1, n2, o_0, o_1, o_2)[:, None] + o_d[None, :]
    tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(
    do_not_specialize=[*_SIZES, "tiles_each"],
    launch_metadata=_metadata(_FLOPS_NORM_BWD + _FLOPS_RESIDUAL, ("grad_ptr", "x_ptr", "residual_ptr", "dx_ptr")),
)
def residual_layer_norm_bwd_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    eps,
    rows,
    n1,
    n2,
    tiles_each,
    g_0,
    g_1,
    g_2,
    x_0,
    x_1,
    x_2,
    r_0,
    r_1,
    r_2,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: tiles_each tiles of rows, one partial row of dweight and of dbias
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = load_tile(weight_ptr + o_d, m_d)
    b_dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    for i_tile in range(tiles_each):
        o_row = (i_program * tiles_each + i_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_tile = (o_row < rows)[:, None] & m_d[None, :]
        b_x = load_tile(x_ptr + row_offset(o_row, n1, n2, x_0, x_1, x_2)[:, None] + o_d[None, :], m_tile)
        b_x += load_tile(residual_ptr + row_offset(o_row, n1, n2, r_0, r_1, r_2)[:, None] + o_d[None, :], m_tile)
        b_g = load_tile(grad_ptr + row_offset(o_row, n1, n2, g_0, g_1, g_2)[:, None] + o_d[None, :], m_tile)
        b_xhat, b_rstd = standardise(b_x, m_d, eps, D)
        b_dw += b_g * b_xhat
        b_db += b_g
        b_dx = standardise_bwd(b_g * b_w[None, :], b_xhat, b_rstd, m_d, D)
        p_dx = dx_ptr + (o_row.to(tl.int64) * D)[:, None] + o_d[None, :]
        tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_tile)

    # partial: (2, programs, D)
    tl.store(partial_ptr + i_program * D + o_d, tl.sum(b_dw, axis=0), mask=m_d)
    tl.store(partial_ptr + (tl.num_programs(0) + i_program) * D + o_d, tl.sum(b_db, axis=0), mask=m_d)


@triton.jit(
    do_not_specialize=_SIZES,
    launch_metadata=_metadata(_FLOPS_NORM + _FLOPS_GATE, ("gate_ptr", "update_ptr", "state_ptr", "out_ptr")),
)
def gate_layer_norm_fwd_kernel(
    gate_ptr,
    update_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    rows,
    n1,
    n2,
    z_0,
    z_1,
    z_2,
    u_0,
    u_1,
    u_2,
    h_0,
    h_1,
    h_2,
    o_0,
    o_1,
    o_2,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: BLOCK_R rows
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_tile = (o_row < rows)[:, None] & m_d[None, :]

    # [BLOCK_R, BLOCK_D]
    b_z = tl.sigmoid(load_tile(gate_ptr + row_offset(o_row, n1, n2, z_0, z_1, z_2)[:, None] + o_d[None, :], m_tile))
    b_u = load_tile(update_ptr + row_offset(o_row, n1, n2, u_0, u_1, u_2)[:, None] + o_d[None, :], m_tile)
    b_mixed = b_z * b_u
    if HAS_STATE:
        b_h = load_tile(state_ptr + row_offset(o_row, n1, n2, h_0, h_1, h_2)[:, None] + o_d[None, :], m_tile)
        b_mixed += (1.0 - b_z) * b_h
    b_xhat, _ = standardise(b_mixed, m_d, eps, D)

    b_w, b_b = load_tile(weight_ptr + o_d, m_d), load_tile(bias_ptr + o_d, m_d)
    b_y = b_xhat * b_w[None, :] + b_b[None, :]
    p_out = out_ptr + row_offset(o_row, n1, n2, o_0, o_1, o_2)[:, None] + o_d[None, :]
    tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(
    do_not_specialize=[*_SIZES, "tiles_each"],
    launch_metadata=_metadata(
        _FLOPS_NORM_BWD + _FLOPS_GATE_BWD,
        ("grad_ptr", "gate_ptr", "update_ptr", "state_ptr", "dgate_ptr", "dupdate_ptr", "state_grad_ptr"),
    ),
)
def gate_layer_norm_bwd_kernel(
    grad_ptr,
    gate_ptr,
    update_ptr,
    state_ptr,
    weight_ptr,
    dgate_ptr,
    dupdate_ptr,
    state_grad_ptr,
    partial_ptr,
    eps,
    rows,
    n1,
    n2,
    tiles_each,
    g_0,
    g_1,
    g_2,
    z_0,
    z_1,
    z_2,
    u_0,
    u_1,
    u_2,
    h_0,
    h_1,
    h_2,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: tiles_each tiles of rows, one partial row of dweight and of dbias
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = load_tile(weight_ptr + o_d, m_d)
    b_dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    for i_tile in range(tiles_each):
        o_row = (i_program * tiles_each + i_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_tile = (o_row < rows)[:, None] & m_d[None, :]
        b_g = load_tile(grad_ptr + row_offset(o_row, n1, n2, g_0, g_1, g_2)[:, None] + o_d[None, :], m_tile)
        b_z = load_tile(gate_ptr + row_offset(o_row, n1, n2, z_0, z_1, z_2)[:, None] + o_d[None, :], m_tile)
        b_z = tl.sigmoid(b_z)
        b_u = load_tile(update_ptr + row_offset(o_row, n1, n2, u_0, u_1, u_2)[:, None] + o_d[None, :], m_tile)
        b_mixed = b_z * b_u
        if HAS_STATE:
            b_h = load_tile(state_ptr + row_offset(o_row, n1, n2, h_0, h_1, h_2)[:, None] + o_d[None, :], m_tile)
            b_mixed += (1.0 - b_z) * b_h
            b_u -= b_h
        b_xhat, b_rstd = standardise(b_mixed, m_d, eps, D)
        b_dw += b_g * b_xhat
        b_db += b_g
        b_dmixed = standardise_bwd(b_g * b_w[None, :], b_xhat, b_rstd, m_d, D)

        # mixed = h + z (u - h), and b_u is u - h
        o_out = (o_row.to(tl.int64) * D)[:, None] + o_d[None, :]
        b_dgate = b_dmixed * b_u * b_z * (1.0 - b_z)
        tl.store(dgate_ptr + o_out, b_dgate.to(dgate_ptr.dtype.element_ty), mask=m_tile)
        tl.store(dupdate_ptr + o_out, (b_dmixed * b_z).to(dupdate_ptr.dtype.element_ty), mask=m_tile)
        if HAS_STATE:
            b_dstate = b_dmixed * (1.0 - b_z)
            tl.store(state_grad_ptr + o_out, b_dstate.to(state_grad_ptr.dtype.element_ty), mask=m_tile)

    # partial: (2, programs, D)
    tl.store(partial_ptr + i_program * D + o_d, tl.sum(b_dw, axis=0), mask=m_d)
    tl.store(partial_ptr + (tl.num_programs(0) + i_program) * D + o_d, tl.sum(b_db, axis=0), mask=m_d)


def residual_runner(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None) -> tuple[Run, bool]:
    """As `mixkernels.layer.triton_rows.rows_runner`; tensors are x, residual, weight and bias."""
    config = residual_config(x.shape[-1])
    return rows_runner(residual_layer_norm_fwd_kernel, config, {}, (x, residual), (weight, bias), out)


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Same contract as `mixkernels.layer.reference.residual_layer_norm`; one launch, no workspace."""
    return residual_runner(x, residual, weight, bias, None)[0]((x, residual, weight, bias), eps, None)


def residual_layer_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (that of the residual too), weight and bias."""
    dx = empty_output(x, *x.shape)
    width = x.shape[-1]
    layout = row_layout(grad, x, residual)
    config = wide_config(width)
    programs, tiles_each = runs(layout.rows, config.block_r)
    partial = x.new_empty(2, programs, width, dtype=torch.float32)
    if programs:
        grad, x, residual = layout.tensors
        with device_of(x):
            residual_layer_norm_bwd_kernel[(programs,)](
                grad,
                x,
                residual,
                weight,
                dx,
                partial,
                eps,
                layout.rows,
                *layout.sizes[1:],
                tiles_each,
                *(step for strides in layout.strides for step in strides),
                D=width,
                BLOCK_R=config.block_r,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    dweight, dbias = (part.sum(dim=0).to(weight.dtype) for part in partial)
    return dx.to(x.dtype), dweight, dbias


def gate_runner(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor | None
) -> tuple[Run, bool]:
    """As `mixkernels.layer.triton_rows.rows_runner`; tensors are gate, update, state or update, weight and bias."""
    config, options = wide_config(update.shape[-1]), {"HAS_STATE": state is not None}
    # without a state nothing is read through its pointer
    rows = (gate, update, update if state is None else state)
    return rows_runner(gate_layer_norm_fwd_kernel, config, options, rows, (weight, bias), out)


def gate_layer_norm(
    gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> Tensor:
    """Same contract as `mixkernels.layer.reference.gate_layer_norm`; one launch, no workspace."""
    tensors = (gate, update, update if state is None else state, weight, bias)
    return gate_runner(gate, update, state, weight, bias, None)[0](tensors, eps, None)


def gate_layer_norm_backward(
    grad: Tensor, gate: Tensor, update: Tensor, state: Tensor | None, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of gate, update, state (None without one), weight and bias."""
    width = update.shape[-1]
    dgate, dupdate = (empty_output(update, *update.shape) for _ in range(2))
    dstate = None if state is None else empty_output(update, *update.shape)
    layout = row_layout(grad, gate, update, update if state is None else state)
    config = wide_config(width)
    programs, tiles_each = runs(layout.rows, config.block_r)
    partial = update.new_empty(2, programs, width, dtype=torch.float32)
    if programs:
        with device_of(update):
            gate_layer_norm_bwd_kernel[(programs,)](
                *layout.tensors,
                weight,
                dgate,
                dupdate,
                dupdate if dstate is None else dstate,
                partial,
                eps,
                layout.rows,
                *layout.sizes[1:],
                tiles_each,
                *(step for strides in layout.strides for step in strides),
                D=width,
                HAS_STATE=state is not None,
                BLOCK_R=config.block_r,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    dtype = update.dtype
    dstate = None if dstate is None else dstate.to(dtype)
    dweight, dbias = (part.sum(dim=0).to(weight.dtype) for part in partial)
    return dgate.to(dtype), dupdate.to(dtype), dstate, dweight, dbias


def variants() -> list[KernelVariant]:
    """Every shipped launch configuration."""
    found = []
    for width in SHIPPED_WIDTHS:
        for dtype in TRITON_TYPES:
            wide = wide_config(width)
            found.append(variant(residual_layer_norm_fwd_kernel, width, dtype, residual_config(width)))
            found.append(variant(residual_layer_norm_bwd_kernel, width, dtype, wide))
            for has_state in (False, True):
                found.append(variant(gate_layer_norm_fwd_kernel, width, dtype, wide, HAS_STATE=has_state))
                found.append(variant(gate_layer_norm_bwd_kernel, width, dtype, wide, HAS_STATE=has_state))
    return found
