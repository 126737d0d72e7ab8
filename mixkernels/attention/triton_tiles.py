"""Tile arithmetic that the attention kernels share.

A candidate owns SLOTS rows of a tile. In two backward kernels they are its k context rows and its state row (k rows
without a state): slots below k are context rows, slot k the state. The forward kernels (triton_candidates) and the
fused backward kernel have a tile of context rows, SLOTS = k, and one of state rows, SLOTS = 1. A tile has BLOCK_M rows
and holds BLOCK_M // SLOTS whole candidates, so no candidate spans two tiles; the few rows left over are masked. Row r
belongs to candidate r // SLOTS, slot r % SLOTS.

All programs are on grid axis x, whose limit is 2^31 - 1 (of y and z 65,535), and every offset is 64 bits wide.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(b_a, b_b, INTERPRET: tl.constexpr):
    # the interpreter's low-precision product is wrong, so tiles are widened there; float32 is IEEE on a GPU too
    if INTERPRET:
        b_c = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    else:
        b_c = tl.dot(b_a, b_b, input_precision="ieee")
    return b_c


@triton.jit
def dot_rounded(b_a, b_b, INTERPRET: tl.constexpr):
    # b_a b_b, for float32 b_a that is rounded to the dtype of b_b; the interpreter would truncate, so it does not round
    if INTERPRET:
        b_c = tl.dot(b_a, b_b.to(tl.float32), input_precision="ieee")
    else:
        b_c = tl.dot(b_a.to(b_b.dtype), b_b, input_precision="ieee")
    return b_c


@triton.jit
def dot_add(b_a, b_b, b_c, INTERPRET: tl.constexpr):
    # b_c + b_a b_b, otherwise like `dot_rounded`
    if INTERPRET:
        b_c = tl.dot(b_a, b_b.to(tl.float32), acc=b_c, input_precision="ieee")
    else:
        b_c = tl.dot(b_a.to(b_b.dtype), b_b, acc=b_c, input_precision="ieee")
    return b_c


@triton.jit
def range_of_program(i_program, programs, tiles):
    # contiguous ranges that cover all tiles once and whose lengths differ by at most one
    return i_program * tiles // programs, (i_program + 1) * tiles // programs


@triton.jit
def load_length(key_lengths_ptr, i_batch, num_keys):
    # a length out of range is an error that on a GPU is not checked by default: it must not reach other memory
    length = tl.load(key_lengths_ptr + i_batch).to(tl.int64)
    return tl.minimum(tl.maximum(length, 0), num_keys).to(tl.int32)


@triton.jit
def locate_query(offsets_ptr, batch, i_tile, candidates):
    # ragged rows: the first tile of query b is offsets[b] // candidates + b, which leaves every query enough tiles and
    # needs no table; bisection finds the last b whose first tile is at most i_tile
    i_low = tl.zeros([], tl.int64)
    i_high = batch.to(tl.int64)
    while i_low + 1 < i_high:
        i_middle = (i_low + i_high) // 2
        first = tl.load(offsets_ptr + i_middle).to(tl.int64) // candidates + i_middle
        i_low = tl.where(first <= i_tile, i_middle, i_low)
        i_high = tl.where(first <= i_tile, i_high, i_middle)
    start = tl.load(offsets_ptr + i_low).to(tl.int64)
    stop = tl.load(offsets_ptr + i_low + 1).to(tl.int64)
    return i_low, i_tile - (start // candidates + i_low), start, stop


@triton.jit
def locate_candidates(
    ids_ptr,
    i_block,
    start,
    stop,
    CANDIDATES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # for each row of tile i_block, of a query whose candidates are rows start..stop of the results: its result row, its
    # row in the candidates' tensors, its slot, and whether it exists
    o_row = tl.arange(0, BLOCK_M)
    # slots are multiplied by strides that grow with N where candidates are (k, N, H, D) transposed
    o_slot = (o_row % SLOTS).to(tl.int64)
    o_out = start + i_block * CANDIDATES + o_row // SLOTS
    left = tl.minimum(stop - start - i_block * CANDIDATES, CANDIDATES).to(tl.int32)
    m_row = o_row // SLOTS < left
    o_source = o_out
    if HAS_IDS:
        o_source = tl.load(ids_ptr + o_out, mask=m_row, other=0).to(tl.int64)
    return o_out, o_source, o_slot, m_row


@triton.jit
def load_tile(context_ptr, state_ptr, o_context, o_state, o_d, m_row, m_context, HAS_STATE: tl.constexpr):
    # [BLOCK_M, D] from a context row or a state row, in one load; both tensors' last dimension is dense
    p_row = context_ptr + o_context
    if HAS_STATE:
        p_row = tl.where(m_context, p_row, state_ptr + o_state)
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def load_scalars(context_ptr, state_ptr, o_context, o_state, m_row, m_context, HAS_STATE: tl.constexpr):
    # [BLOCK_M]
    p_row = context_ptr + o_context
    if HAS_STATE:
        p_row = tl.where(m_context, p_row, state_ptr + o_state)
    return tl.load(p_row, mask=m_row, other=0.0)
