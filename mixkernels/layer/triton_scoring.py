"""Scoring in Triton: mean over k, final LayerNorm, dot product, additive score, and top-k.

Forward: a program takes a run of RUN whole candidates, BLOCK_C at a time, and writes nothing of size d. It writes one
float32 score per candidate or, with top_k, only the best of its run: each score becomes an int64 key (see
`mixkernels.packed_keys`), and the run's keys stay in registers. No two keys are equal, so the number of larger keys is
a key's rank, and the rank says where to store it: the kernel does not sort, and it is the same for every top_k. The
second stage sorts the keys of all runs, at most top_k of each, with PyTorch.

Backward: a program takes a run of tiles of candidates, as in `triton_layer_norm`, and sums weight and bias gradients in
two stages of fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkernels.layer.triton_rows import (
    SHIPPED_WIDTHS,
    TRITON_TYPES,
    TileConfig,
    load_tile,
    runs,
    standardise,
    standardise_bwd,
    tile_config,
    variant,
)
from mixkernels.packed_keys import EMPTY_KEY, LARGEST_ID, best_of, pack_keys
from mixkernels.triton_common.launching import Launch
from mixkernels.triton_common.runtime import Memory, device_of, empty_output
from mixkernels.triton_common.variant import KernelVariant

_EMPTY_KEY = tl.constexpr(EMPTY_KEY)
_LARGEST_ID = tl.constexpr(LARGEST_ID)
_NAN_BITS = tl.constexpr(0x7FC00000)
_LOW_31 = tl.constexpr(0x7FFFFFFF)

_SIZES = ["batch", "num_candidates"]
_SHORT_RUN, _LONG_RUN = 32, 128
_LONG_RUNS_FROM = 32768

# per element of a row: residual 1, mean 1, centring 1, variance 2, scaling 1, sum over k 1; of a candidate: weight and
# bias of e and h 4, dot product 2
_FLOPS_ROW = 7
_FLOPS_CANDIDATE = 6
_FLOPS_ROW_BWD = 20
_FLOPS_CANDIDATE_BWD = 14


def run_length(candidates: int) -> int:
    """Candidates per program: of few candidates short runs fill a GPU; of many, long runs leave fewer keys to sort."""
    return _LONG_RUN if candidates >= _LONG_RUNS_FROM else _SHORT_RUN


def _metadata(per_row: int, per_candidate: int, row_tensors: int, state_tensors: int):
    """Work of a launch for profilers: operations, and bytes with every tensor of rows read or written once."""

    def launch_metadata(grid, kernel, args):
        elements = args["batch"] * args["num_candidates"] * args["D"]
        size = args["context_ptr"].element_size()
        return {
            "name": f"{kernel.name} [candidates={args['batch']}x{args['num_candidates']} k={args['K']} d={args['D']}]",
            "flops32": elements * ((args["K"] + 1) * per_row + per_candidate),
            "bytes": elements * size * (args["K"] * row_tensors + state_tensors),
        }

    return launch_metadata


@triton.jit
def _context_mean(p_context, p_residual, c_k, r_k, o_d, m_tile, m_d, eps, K: tl.constexpr, D: tl.constexpr):
    # mean over k of the standardised context rows; weight and bias come after it. c_k and r_k are 64 bits wide
    b_mean = tl.zeros(m_tile.shape, tl.float32)
    for i_k in range(K):
        b_x = load_tile((p_context + i_k * c_k)[:, None] + o_d[None, :], m_tile)
        b_x += load_tile((p_residual + i_k * r_k)[:, None] + o_d[None, :], m_tile)
        b_xhat, _ = standardise(b_x, m_d, eps, D)
        b_mean += b_xhat
    return b_mean / K


@triton.jit(
    do_not_specialize=[*_SIZES, "first_id", "num_written"],
    launch_metadata=_metadata(_FLOPS_ROW, _FLOPS_CANDIDATE, 2, 2),
)
def score_candidates_fwd_kernel(
    context_ptr,
    context_residual_ptr,
    state_ptr,
    state_residual_ptr,
    weight_ptr,
    bias_ptr,
    additive_ptr,
    scores_ptr,
    keys_ptr,
    eps,
    first_id,
    batch,
    num_candidates,
    num_written,
    # strides in elements: b query, n candidate, k context embedding
    c_b,
    c_n,
    c_k,
    cr_b,
    cr_n,
    cr_k,
    s_b,
    s_n,
    sr_b,
    sr_n,
    a_b,
    a_n,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_ADDITIVE: tl.constexpr,
    TOP: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    TILES: tl.constexpr = RUN // BLOCK_C

    # one program: a run of candidates of one query
    i_program = tl.program_id(0).to(tl.int64)
    num_runs = tl.cdiv(num_candidates, RUN)
    i_run = i_program % num_runs
    i_batch = i_program // num_runs
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w, b_b = load_tile(weight_ptr + o_d, m_d), load_tile(bias_ptr + o_d, m_d)
    # strides that grow with N where contexts are (k, N, d) transposed
    c_k, cr_k = tl.cast(c_k, tl.int64), tl.cast(cr_k, tl.int64)
    if TOP:
        b_keys = tl.full([TILES, BLOCK_C], _EMPTY_KEY, tl.int64)
        o_tile = tl.arange(0, TILES)

    for i_tile in range(TILES):
        o_candidate = i_run * RUN + i_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        m_candidate = o_candidate < num_candidates
        m_tile = m_candidate[:, None] & m_d[None, :]

        # [BLOCK_C, BLOCK_D]: e, then h
        b_e = _context_mean(
            context_ptr + i_batch * c_b + o_candidate * c_n,
            context_residual_ptr + i_batch * cr_b + o_candidate * cr_n,
            c_k,
            cr_k,
            o_d,
            m_tile,
            m_d,
            eps,
            K,
            D,
        )
        b_e = b_e * b_w[None, :] + b_b[None, :]
        b_h = load_tile((state_ptr + i_batch * s_b + o_candidate * s_n)[:, None] + o_d[None, :], m_tile)
        b_h += load_tile((state_residual_ptr + i_batch * sr_b + o_candidate * sr_n)[:, None] + o_d[None, :], m_tile)
        b_h, _ = standardise(b_h, m_d, eps, D)
        b_h = b_h * b_w[None, :] + b_b[None, :]

        # [BLOCK_C]
        b_score = tl.sum(b_h * b_e, axis=1)
        if HAS_ADDITIVE:
            p_additive = additive_ptr + i_batch * a_b + o_candidate * a_n
            b_score += tl.load(p_additive, mask=m_candidate, other=0.0).to(tl.float32)
        if TOP:
            # the packing of mixkernels.packed_keys: -0.0 as 0.0, one NaN above all, order kept as an integer
            b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
            b_bits = tl.where(b_score != b_score, _NAN_BITS, b_bits)
            b_ordered = tl.where(b_bits < 0, b_bits ^ _LOW_31, b_bits).to(tl.int64)
            b_key = (b_ordered << 32) | (_LARGEST_ID - (first_id + o_candidate))
            # rows after the last candidate get keys below those of all candidates, and different from one another
            b_key = tl.where(m_candidate, b_key, _EMPTY_KEY + o_candidate)
            b_keys = tl.where((o_tile == i_tile)[:, None], b_key[None, :], b_keys)
        else:
            tl.store(scores_ptr + i_batch * num_candidates + o_candidate, b_score, mask=m_candidate)

    if TOP:
        b_keys = tl.reshape(b_keys, [RUN])
        # [RUN, RUN] -> [RUN]: how many keys of the run are larger
        b_rank = tl.sum((b_keys[None, :] > b_keys[:, None]).to(tl.int32), axis=1)
        # keys: (B, runs, num_written)
        tl.store(keys_ptr + i_program * num_written + b_rank, b_keys, mask=b_rank < num_written)


@triton.jit(
    do_not_specialize=[*_SIZES, "tiles_each"],
    launch_metadata=_metadata(_FLOPS_ROW_BWD, _FLOPS_CANDIDATE_BWD, 3, 3),
)
def score_candidates_bwd_kernel(
    grad_ptr,
    context_ptr,
    context_residual_ptr,
    state_ptr,
    state_residual_ptr,
    weight_ptr,
    bias_ptr,
    dcontext_ptr,
    dstate_ptr,
    partial_ptr,
    eps,
    batch,
    num_candidates,
    tiles_each,
    # strides in elements: b query, n candidate, k context embedding
    g_b,
    g_n,
    c_b,
    c_n,
    c_k,
    cr_b,
    cr_n,
    cr_k,
    s_b,
    s_n,
    sr_b,
    sr_n,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program: tiles_each tiles of candidates, one partial row of dweight and of dbias
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w, b_b = load_tile(weight_ptr + o_d, m_d), load_tile(bias_ptr + o_d, m_d)
    # as in the forward kernel
    c_k, cr_k = tl.cast(c_k, tl.int64), tl.cast(cr_k, tl.int64)
    b_dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    for i_tile in range(tiles_each):
        o_row = (i_program * tiles_each + i_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_row < batch * num_candidates
        m_tile = m_row[:, None] & m_d[None, :]
        i_batch = (o_row // num_candidates).to(tl.int64)
        o_candidate = (o_row % num_candidates).to(tl.int64)
        p_context = context_ptr + i_batch * c_b + o_candidate * c_n
        p_residual = context_residual_ptr + i_batch * cr_b + o_candidate * cr_n

        # [BLOCK_R, BLOCK_D]
        b_ehat = _context_mean(p_context, p_residual, c_k, cr_k, o_d, m_tile, m_d, eps, K, D)
        b_hhat = load_tile((state_ptr + i_batch * s_b + o_candidate * s_n)[:, None] + o_d[None, :], m_tile)
        b_hhat += load_tile((state_residual_ptr + i_batch * sr_b + o_candidate * sr_n)[:, None] + o_d[None, :], m_tile)
        b_hhat, b_rstd = standardise(b_hhat, m_d, eps, D)
        b_g = tl.load(grad_ptr + i_batch * g_b + o_candidate * g_n, mask=m_row, other=0.0).to(tl.float32)
        b_dh = b_g[:, None] * (b_ehat * b_w[None, :] + b_b[None, :])
        b_de = b_g[:, None] * (b_hhat * b_w[None, :] + b_b[None, :])
        b_dw += b_dh * b_hhat + b_de * b_ehat
        b_db += b_dh + b_de

        # outputs are contiguous: (B, N, d), (B, N, k, d)
        o_out = o_row.to(tl.int64) * D
        b_ds = standardise_bwd(b_dh * b_w[None, :], b_hhat, b_rstd, m_d, D)
        tl.store(dstate_ptr + o_out[:, None] + o_d[None, :], b_ds.to(dstate_ptr.dtype.element_ty), mask=m_tile)
        b_de = b_de * b_w[None, :] / K
        for i_k in range(K):
            b_x = load_tile((p_context + i_k * c_k)[:, None] + o_d[None, :], m_tile)
            b_x += load_tile((p_residual + i_k * cr_k)[:, None] + o_d[None, :], m_tile)
            b_xhat, b_rstd = standardise(b_x, m_d, eps, D)
            b_dc = standardise_bwd(b_de, b_xhat, b_rstd, m_d, D).to(dcontext_ptr.dtype.element_ty)
            tl.store(dcontext_ptr + (o_out * K + i_k * D)[:, None] + o_d[None, :], b_dc, mask=m_tile)

    # partial: (2, programs, D)
    tl.store(partial_ptr + i_program * D + o_d, tl.sum(b_dw, axis=0), mask=m_d)
    tl.store(partial_ptr + (tl.num_programs(0) + i_program) * D + o_d, tl.sum(b_db, axis=0), mask=m_d)


class PreparedScores(NamedTuple):
    """The scoring of all calls of one form; holds no tensors."""

    launch: Launch | None
    """None: there are no candidates."""
    memory: Memory
    """Of the scores, (B, N), or with top_k of the keys, (B, runs, kept)."""

    def __call__(
        self, rows: Sequence[Tensor], eps: float, additive: Tensor | None, first_id: int, out: Tensor | None
    ) -> Tensor:
        """Return scores, or with top_k the best keys of every run; `rows` as the kernel takes them."""
        result = self.memory() if out is None else out
        if self.launch is not None:
            # the absent one of scores and keys is never written
            self.launch((*rows, additive, result, result), result, eps, first_id)
        return result


def prepare(rows: Sequence[Tensor], additive: Tensor | None, *, top_k: int | None) -> PreparedScores:
    """Decide how calls of this form are scored.

    Args:
        rows: dense (B, N, ...) contexts, their residual, states, theirs, weight and bias.
        additive: (B, N) or None.
        top_k: how many to keep, or None for all scores.
    """
    context, context_residual, state, state_residual, _, _ = rows
    batch, num_candidates, k, width = context.shape
    run = _SHORT_RUN if top_k is None else run_length(batch * num_candidates)
    memory = Memory((batch, num_candidates), torch.float32, state.device)
    if top_k is not None:
        kept = (batch, triton.cdiv(num_candidates, run), min(top_k, run))
        memory = Memory(kept, torch.int64, state.device)
    if not batch * num_candidates:
        return PreparedScores(None, memory)
    config = forward_config(width)
    numbers = (
        batch,
        num_candidates,
        0 if top_k is None else memory.shape[-1],
        *context.stride()[:3],
        *context_residual.stride()[:3],
        *state.stride()[:2],
        *state_residual.stride()[:2],
        *((0, 0) if additive is None else additive.stride()),
    )
    options = {
        "K": k,
        "D": width,
        "HAS_ADDITIVE": additive is not None,
        "TOP": top_k is not None,
        "RUN": run,
        "BLOCK_C": config.block_r,
        "BLOCK_D": config.block_d,
        "num_warps": config.num_warps,
    }
    programs = batch * triton.cdiv(num_candidates, run)
    launch = Launch(score_candidates_fwd_kernel, programs, numbers, options, state.device)
    return PreparedScores(launch, memory)


def score_candidates(*rows: Tensor, eps: float, additive: Tensor | None) -> Tensor:
    """Same contract as `mixkernels.layer.reference.score_candidates`; one launch, no workspace."""
    return prepare(rows, additive, top_k=None)(rows, eps, additive, 0, None)


def score_top_k(
    *rows: Tensor,
    eps: float,
    additive: Tensor | None,
    running_scores: Tensor | None,
    running_ids: Tensor | None,
    top_k: int,
    first_id: int,
) -> tuple[Tensor, Tensor]:
    """Same contract as `mixkernels.layer.reference.score_top_k`; one launch, then a sort of the runs' keys."""
    keys = prepare(rows, additive, top_k=top_k)(rows, eps, additive, first_id, None)
    return best_of_runs(keys, rows[2].shape[1], running_scores, running_ids, top_k)


def best_of_runs(
    keys: Tensor, num_candidates: int, running_scores: Tensor | None, running_ids: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return scores and ids of the best of the runs' keys (B, runs, kept) and the running ones."""
    keys, total = keys.flatten(1), num_candidates
    if running_scores is not None and running_ids is not None:
        total += running_scores.shape[1]
        keys = torch.cat([pack_keys(running_scores, running_ids), keys], dim=1)
    # not more than there are candidates: the last run is padded with empty keys
    return best_of(keys, min(top_k, total))


def score_candidates_backward(
    grad: Tensor,
    context: Tensor,
    context_residual: Tensor,
    state: Tensor,
    state_residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of context and state (those of their residuals too), weight and bias."""
    batch, num_candidates, k, width = context.shape
    dcontext, dstate = empty_output(context, *context.shape), empty_output(state, *state.shape)
    config = backward_config(width)
    programs, tiles_each = runs(batch * num_candidates, config.block_r)
    partial = state.new_empty(2, programs, width, dtype=torch.float32)
    if programs:
        with device_of(state):
            score_candidates_bwd_kernel[(programs,)](
                grad,
                context,
                context_residual,
                state,
                state_residual,
                weight,
                bias,
                dcontext,
                dstate,
                partial,
                eps,
                batch,
                num_candidates,
                tiles_each,
                *grad.stride(),
                *context.stride()[:3],
                *context_residual.stride()[:3],
                *state.stride()[:2],
                *state_residual.stride()[:2],
                K=k,
                D=width,
                BLOCK_R=config.block_r,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
            )
    dweight, dbias = (part.sum(dim=0).to(weight.dtype) for part in partial)
    return dcontext.to(context.dtype), dstate.to(state.dtype), dweight, dbias


def forward_config(width: int) -> TileConfig:
    """Tile of the forward kernel, in candidates."""
    return tile_config(width, 4096)


def backward_config(width: int) -> TileConfig:
    """Tile of the backward kernel, which holds seven tiles at once."""
    return tile_config(width, 2048)


def variants() -> list[KernelVariant]:
    """Every shipped launch configuration for k = 1: k is only the length of a loop."""
    found = []
    for width in SHIPPED_WIDTHS:
        for dtype in TRITON_TYPES:
            found.append(variant(score_candidates_bwd_kernel, width, dtype, backward_config(width), K=1))
            forward = forward_config(width)
            for top, run in ((False, _SHORT_RUN), (True, _SHORT_RUN), (True, _LONG_RUN)):
                constants = {"K": 1, "HAS_ADDITIVE": True, "TOP": top, "RUN": run, "BLOCK_C": forward.block_r}
                found.append(variant(score_candidates_fwd_kernel, width, dtype, forward, **constants))
    return found
