"""The forward kernel for queries of up to 128 tokens: all keys are one block that stays on the chip.

With S = Q K^T of a tile of candidates, T the logits of its own keys, and s the scale (all in base 2):

    m = max(s max(S), max(T))               the row's maximum over all keys, known at once
    P = exp2(s S - m),  R = exp2(T - m)     one multiply-add and one exponential a logit
    l = P 1 + sum(R)                        1 is a column of ones, zero at padding: a product, no addition a logit
    O = (P V + R V_own) / l                 own keys: mixkernels/attention/triton_candidates.py

so nothing is rescaled and no running state is kept. Padding repeats the query's last key, which changes no maximum; its
values and ones are zero. Where log-sum-exps are returned, l is summed in float32 from weights that are not rounded.
State rows without a slot among the context rows are a second tile, without own keys.

A program has one query and head, loads its keys once, and computes many tiles of candidates, of which the next is
loaded while one is computed. Where strides allow (DESCRIPTORS), the memory engine copies whole tiles.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import forward_metadata
from mixkernels.attention.triton_candidates import (
    attend_own,
    finite,
    load_candidates,
    load_rows,
    negated,
    own_logits,
    own_maximum,
    reciprocal,
    scaled_queries,
    store_lse,
    store_rows,
)
from mixkernels.attention.triton_tiles import (
    LOG2E,
    dot,
    dot_add,
    dot_rounded,
    load_length,
    locate_candidates,
    locate_query,
    range_of_program,
)


@triton.jit
def _maximum(b_s, b_scale, length):
    # [rows]: of logits with shared keys
    return tl.where(length > 0, tl.max(b_s, axis=1) * b_scale, float("-inf"))


@triton.jit
def _attend(b_s, b_v, b_valid, b_scale, b_m, b_o, length, FLOAT32_SUMS: tl.constexpr, INTERPRET: tl.constexpr):
    # row sums of P, [rows], and b_o + P V, [rows, D]
    b_shift = tl.where(length > 0, finite(b_m), 0.0)
    b_p = tl.exp2(b_s * b_scale[:, None] - b_shift[:, None])
    if FLOAT32_SUMS:
        # a product and a sum are one instruction; a choice and a sum are two
        b_l = tl.sum(b_p * b_valid[None, :], axis=1)
    else:
        # [rows, 16], equal columns
        b_l = tl.max(dot_rounded(b_p, b_valid, INTERPRET), axis=1)
    return b_l, dot_add(b_p, b_v, b_o, INTERPRET)


@triton.jit(do_not_specialize=["num_candidates", "num_keys", "batch", "tiles_each"], launch_metadata=forward_metadata)
def candidate_attention_fwd_short_kernel(
    context_query_ptr,
    context_key_ptr,
    context_value_ptr,
    state_query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
    ids_ptr,
    offsets_ptr,
    own_logits_ptr,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    context_ptr,
    state_ptr,
    context_lse_ptr,
    state_lse_ptr,
    scale,
    num_candidates,
    num_keys,
    batch,
    # of ragged rows, the most tiles of a program; otherwise programs share a query's tiles evenly
    tiles_each,
    # strides in elements: b query, n candidate, c context embedding, m token, h head
    cq_b,
    cq_n,
    cq_c,
    cq_h,
    ck_b,
    ck_n,
    ck_c,
    ck_h,
    cv_b,
    cv_n,
    cv_c,
    cv_h,
    sq_b,
    sq_n,
    sq_h,
    k_b,
    k_m,
    k_h,
    v_b,
    v_m,
    v_h,
    # own logits: n candidate, r row, c own key; scales are contiguous (..., k, H)
    ol_b,
    ol_n,
    ol_r,
    ol_c,
    ol_h,
    H: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    # strides of the outputs: n candidate, c context embedding; heads are contiguous
    CO_N: tl.constexpr,
    CO_C: tl.constexpr,
    SO_N: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    QUANTISED: tl.constexpr,
    PER_QUERY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS
    # a state row takes a free slot of its candidate, or is in a tile of its own
    STATE_SLOT: tl.constexpr = HAS_STATE and SLOTS > K
    STATE_TILE: tl.constexpr = HAS_STATE and SLOTS == K
    dtype: tl.constexpr = key_ptr.dtype.element_ty

    # heads vary fastest, so that neighbouring programs share cache lines
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_part = i_program // H
    if RAGGED:
        i_batch, i_part, start, stop = locate_query(offsets_ptr, batch, i_part, tiles_each * CANDIDATES)
        i_first = i_part * tiles_each
        i_last = tl.minimum(i_first + tiles_each, tl.cdiv(stop - start, CANDIDATES))
    else:
        programs = tl.num_programs(0) // (H * batch)
        i_batch = i_part // programs
        i_first, i_last = range_of_program(i_part % programs, programs, tl.cdiv(num_candidates, CANDIDATES))
        start = i_batch * num_candidates
        stop = start + num_candidates
    # in 64 bits they take registers that the loop lacks
    i_first, i_last = i_first.to(tl.int32), i_last.to(tl.int32)
    # a Python float may arrive as float64 under torch.compile
    scale = tl.cast(scale, tl.float32) * LOG2E

    length = num_keys
    if HAS_LENGTHS:
        length = load_length(key_lengths_ptr, i_batch, num_keys)
    o_d = tl.arange(0, D)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < length
    # [D, BLOCK_N] and [BLOCK_N, D]
    o_key = tl.maximum(tl.minimum(o_n, length - 1), 0).to(tl.int64)
    p_k = key_ptr + i_batch * k_b + i_head * k_h + (o_key * k_m)[None, :] + o_d[:, None]
    b_k = tl.load(p_k, mask=(o_n < length * BLOCK_N)[None, :], other=0.0)
    b_k = negated(b_k, scale < 0.0, dtype)
    p_v = value_ptr + i_batch * v_b + i_head * v_h + (o_n.to(tl.int64) * v_m)[:, None] + o_d[None, :]
    b_v = tl.load(p_v, mask=m_n[:, None], other=0.0)
    if HAS_LSE:
        b_valid = m_n.to(tl.float32)
    else:
        b_valid = tl.where(m_n[:, None], tl.full([BLOCK_N, 16], 1.0, tl.float32), 0.0).to(dtype)

    if DESCRIPTORS:
        # [rows, H * D] of this query; the memory engine copies a tile and masks it
        rows = tl.maximum(stop - start, 1).to(tl.int32)
        count = rows * K
        step_q, step_k, step_v = (cq_n, ck_n, cv_n) if K == 1 else (cq_c, ck_c, cv_c)
        base = start if RAGGED else tl.zeros([], tl.int64)
        q_desc = tl.make_tensor_descriptor(
            context_query_ptr + i_batch * cq_b + base * cq_n, [count, H * D], [step_q, 1], [BLOCK_M, D]
        )
        v_desc = tl.make_tensor_descriptor(
            context_value_ptr + i_batch * cv_b + base * cv_n, [count, H * D], [step_v, 1], [BLOCK_M, D]
        )
        if not HAS_OWN_LOGITS:
            k_desc = tl.make_tensor_descriptor(
                context_key_ptr + i_batch * ck_b + base * ck_n, [count, H * D], [step_k, 1], [BLOCK_M, D]
            )
        context_desc = tl.make_tensor_descriptor(
            context_ptr + start * CO_N, [count, H * D], [CO_N // K, 1], [BLOCK_M, D]
        )
        if STATE_TILE:
            s_desc = tl.make_tensor_descriptor(
                state_query_ptr + i_batch * sq_b + base * sq_n, [rows, H * D], [sq_n, 1], [BLOCK_S, D]
            )
            state_desc = tl.make_tensor_descriptor(state_ptr + start * SO_N, [rows, H * D], [SO_N, 1], [BLOCK_S, D])
        column = (i_head * D).to(tl.int32)

    for i_block in tl.range(i_first, i_last, num_stages=STAGES):
        o_out, o_source, o_slot, m_row = locate_candidates(
            ids_ptr, i_block, start, stop, CANDIDATES, SLOTS, HAS_IDS, BLOCK_M
        )
        if not HAS_IDS and not RAGGED:
            o_source = o_out - start
        m_context = m_row
        if SLOTS > K:
            m_context = m_row & (o_slot < K)
        m_state = m_row & (o_slot == K)
        if STATE_TILE:
            o_out_s, o_source_s, _, m_state = locate_candidates(
                ids_ptr, i_block, start, stop, CANDIDATES, 1, HAS_IDS, BLOCK_S
            )
            if not HAS_IDS and not RAGGED:
                o_source_s = o_out_s - start
        # [BLOCK_M, D], a tile of states [BLOCK_S, D]
        if DESCRIPTORS:
            b_q = q_desc.load([i_block * BLOCK_M, column])
            b_v_own = v_desc.load([i_block * BLOCK_M, column])
            b_k_own = b_v_own
            if not HAS_OWN_LOGITS:
                b_k_own = k_desc.load([i_block * BLOCK_M, column])
            if STATE_TILE:
                b_q_s = s_desc.load([i_block * BLOCK_S, column])
        else:
            b_q, b_k_own, b_v_own = load_candidates(
                context_query_ptr,
                context_key_ptr,
                context_value_ptr,
                state_query_ptr,
                (cq_b, cq_n, cq_c, cq_h, ck_b, ck_n, ck_c, ck_h, cv_b, cv_n, cv_c, cv_h, sq_b, sq_n, sq_h),
                i_batch,
                i_head,
                o_source,
                o_slot,
                o_d,
                m_context,
                m_state,
                HAS_OWN_LOGITS,
                STATE_SLOT,
                QUANTISED,
            )
            if STATE_TILE:
                b_q_s = load_rows(state_query_ptr + i_batch * sq_b + i_head * sq_h + o_source_s * sq_n, o_d, m_state)
        o_factor = ((o_out if PER_QUERY else o_source) * K + o_slot) * H + i_head
        b_q, b_scale = scaled_queries(
            b_q, scale, query_scale_ptr, o_factor, m_context, QUANTISED, False, BLOCK_M, dtype
        )
        b_t = own_logits(
            b_q,
            b_k_own,
            tl.where(scale < 0.0, -b_scale, b_scale),
            own_logits_ptr + i_batch * ol_b + i_head * ol_h + o_source * ol_n + o_slot * ol_r,
            ol_c,
            key_scale_ptr,
            o_factor,
            o_slot,
            m_context,
            K,
            SLOTS,
            HAS_OWN_LOGITS,
            QUANTISED,
            BLOCK_M,
            INTERPRET,
        )

        b_s = dot(b_q, b_k, INTERPRET)
        b_m = tl.maximum(_maximum(b_s, b_scale, length), own_maximum(b_t, K))
        b_l_own, b_o = attend_own(
            b_t, b_m, b_v_own, value_scale_ptr, o_factor, m_context, K, SLOTS, QUANTISED, BLOCK_M, dtype, INTERPRET
        )
        b_l, b_o = _attend(b_s, b_v, b_valid, b_scale, b_m, b_o, length, HAS_LSE, INTERPRET)
        b_l += b_l_own
        b_o = b_o * reciprocal(b_l)[:, None]
        # outputs: (rows, K, H, D), (rows, H, D); contiguous log-sum-exps: (rows, K, H), (rows, H)
        p_o = context_ptr + o_out * CO_N + o_slot * CO_C + i_head * D
        p_lse = context_lse_ptr + (o_out * K + o_slot) * H + i_head
        if STATE_SLOT:
            p_o = tl.where(m_context, p_o, state_ptr + o_out * SO_N + i_head * D)
            p_lse = tl.where(m_context, p_lse, state_lse_ptr + o_out * H + i_head)
            m_context = m_context | m_state
        if DESCRIPTORS:
            context_desc.store([i_block * BLOCK_M, column], b_o.to(context_ptr.dtype.element_ty))
            if HAS_LSE:
                store_lse(p_lse, b_m, b_l, m_context)
        else:
            store_rows(p_o, p_lse, b_o, b_m, b_l, o_d, m_context, HAS_LSE)

        if STATE_TILE:
            b_scale_s = tl.zeros([BLOCK_S], tl.float32) + tl.abs(scale)
            b_s = dot(b_q_s, b_k, INTERPRET)
            b_m = _maximum(b_s, b_scale_s, length)
            b_o = tl.zeros([BLOCK_S, D], tl.float32)
            b_l, b_o = _attend(b_s, b_v, b_valid, b_scale_s, b_m, b_o, length, HAS_LSE, INTERPRET)
            b_o = b_o * reciprocal(b_l)[:, None]
            p_lse = state_lse_ptr + o_out_s * H + i_head
            if DESCRIPTORS:
                state_desc.store([i_block * BLOCK_S, column], b_o.to(state_ptr.dtype.element_ty))
                if HAS_LSE:
                    store_lse(p_lse, b_m, b_l, m_state)
            else:
                p_o = state_ptr + o_out_s * SO_N + i_head * D
                store_rows(p_o, p_lse, b_o, b_m, b_l, o_d, m_state, HAS_LSE)
