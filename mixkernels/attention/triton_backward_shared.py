"""The backward kernel that has a block of keys of one query and head: gradients of shared keys and values.

Formulas: mixkernels/attention/triton_backward.py. A program loops over tiles of candidates. Scores are transposed, keys
by rows, so that P and dS need not go through shared memory to become the left sides of dV = P dO and dK = scale dS Q.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import shared_backward_metadata
from mixkernels.attention.triton_backward_tiles import add_key_gradients, store_key_gradients
from mixkernels.attention.triton_tiles import LOG2E, load_length, load_tile


@triton.jit(
    do_not_specialize=["num_candidates", "num_keys", "batch", "splits", "rows"],
    launch_metadata=shared_backward_metadata,
)
def candidate_attention_bwd_shared_kernel(
    grad_context_ptr,
    grad_state_ptr,
    # from the candidates' kernel: log-sum-exps in base 2 and delta, (H, rows, SLOTS)
    shift_ptr,
    delta_ptr,
    context_query_ptr,
    state_query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
    ids_ptr,
    offsets_ptr,
    # outputs: (splits, B, m, H, D), contiguous; (B, m, H, D) if added atomically
    dk_ptr,
    dv_ptr,
    scale,
    num_candidates,
    num_keys,
    batch,
    splits,
    rows,
    cq_b,
    cq_n,
    cq_c,
    cq_h,
    sq_b,
    sq_n,
    sq_h,
    k_b,
    k_m,
    k_h,
    v_b,
    v_m,
    v_h,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    RAGGED: tl.constexpr,
    ATOMIC: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    SLOTS: tl.constexpr = K + 1 if HAS_STATE else K
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS

    # one program: a block of keys of one head and query, every splits-th tile of candidates
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_rest = i_program // H
    num_key_blocks = tl.cdiv(num_keys, BLOCK_N)
    i_n = i_rest % num_key_blocks * BLOCK_N
    i_rest = i_rest // num_key_blocks
    i_batch = i_rest % batch
    i_split = i_rest // batch
    if RAGGED:
        start = tl.load(offsets_ptr + i_batch).to(tl.int64)
        stop = tl.load(offsets_ptr + i_batch + 1).to(tl.int64)
    else:
        start = i_batch * num_candidates
        stop = start + num_candidates

    length = num_keys
    if HAS_LENGTHS:
        length = load_length(key_lengths_ptr, i_batch, num_keys)
    o_token = i_n + tl.arange(0, BLOCK_N)
    m_n = o_token < length
    o_d = tl.arange(0, D)
    scale = tl.cast(scale, tl.float32)
    scale_log2 = scale * LOG2E
    # [BLOCK_N, D]
    p_k = key_ptr + i_batch * k_b + i_head * k_h + o_token * k_m
    p_v = value_ptr + i_batch * v_b + i_head * v_h + o_token * v_m
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
    b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)

    # a block that is only padding loops over no tile
    i_last = tl.where(i_n < length, tl.cdiv(stop - start, CANDIDATES), 0)
    # in 64 bits they take registers
    i_first, i_last, i_step = i_split.to(tl.int32), i_last.to(tl.int32), splits.to(tl.int32)
    # offsets of a tile's rows from those of its first candidate do not change from tile to tile: [BLOCK_M]
    o_row = tl.arange(0, BLOCK_M)
    o_slot = (o_row % SLOTS).to(tl.int64)
    o_local = (o_row // SLOTS).to(tl.int64)
    m_context = o_slot < K
    p_do = grad_context_ptr + ((start + o_local) * K + o_slot) * (H * D) + i_head * D
    step_do = tl.full([BLOCK_M], CANDIDATES * K * H * D, tl.int64)
    o_first = start if RAGGED else tl.zeros([], tl.int64)
    p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h + (o_first + o_local) * cq_n + o_slot * cq_c
    step_q = tl.zeros([BLOCK_M], tl.int64) + tl.cast(cq_n, tl.int64) * CANDIDATES
    if HAS_STATE:
        p_do = tl.where(m_context, p_do, grad_state_ptr + (start + o_local) * (H * D) + i_head * D)
        step_do = tl.where(m_context, step_do, CANDIDATES * H * D)
        p_s = state_query_ptr + i_batch * sq_b + i_head * sq_h
        p_q = tl.where(m_context, p_q, p_s + (o_first + o_local) * sq_n)
        step_q = tl.where(m_context, step_q, tl.cast(sq_n, tl.int64) * CANDIDATES)

    for i_block in tl.range(i_first, i_last, i_step, num_stages=STAGES):
        left = tl.minimum(stop - start - i_block * CANDIDATES, CANDIDATES).to(tl.int32)
        m_row = o_row // SLOTS < left
        # [BLOCK_M, D]
        if HAS_IDS:
            o_source = tl.load(ids_ptr + start + i_block * CANDIDATES + o_local, mask=m_row, other=0).to(tl.int64)
            b_q = load_tile(
                context_query_ptr + i_batch * cq_b + i_head * cq_h,
                state_query_ptr + i_batch * sq_b + i_head * sq_h,
                o_source * cq_n + o_slot * cq_c,
                o_source * sq_n,
                o_d,
                m_row,
                m_context,
                HAS_STATE,
            )
        else:
            b_q = tl.load((p_q + i_block * step_q)[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
        b_do = tl.load((p_do + i_block * step_do)[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
        # rows that do not exist have weight 0
        o_saved = (i_head * rows + start + i_block * CANDIDATES) * SLOTS + o_row
        b_shift = tl.load(shift_ptr + o_saved, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta_ptr + o_saved, mask=m_row, other=0.0)
        # dS is scaled after the sum
        _, b_dk, b_dv = add_key_gradients(b_k, b_v, b_q, b_do, b_shift, b_delta, 1.0, scale_log2, b_dk, b_dv, INTERPRET)

    o_grad = (i_batch * num_keys + o_token) * H + i_head
    o_part = i_split * batch * num_keys * H
    store_key_gradients(dk_ptr, dv_ptr, b_dk * scale, b_dv, o_part, o_grad, o_d, m_n, o_token < num_keys, D, ATOMIC)
