"""The forward kernel for queries of any length: keys are read in blocks, with an online softmax.

For each row, m is the largest logit so far (base 2), l the sum of weights and O the weighted sum of values. Own keys
come first (mixkernels/attention/triton_candidates.py). A block of keys with logits S of scale s then gives

    m' = max(m, s max(S)),  d = exp2(m - m'),  P = exp2(s S - m')      one multiply-add and one exponential a logit
    l <- d l + P 1,         O <- d O + P V                             1 is a column of ones: a product, no addition

and the result is O / l. Only a query's last block may have padding, so only that one is masked. Where log-sum-exps are
returned, and in float32, l is summed in float32 from weights that are not rounded. State rows without a slot among the
context rows are a second tile, without own keys. A program computes one tile of candidates.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import forward_metadata
from mixkernels.attention.triton_candidates import (
    attend_own,
    attend_own_elementwise,
    load_candidates,
    load_rows,
    negated,
    own_logits,
    own_maximum,
    reciprocal,
    scaled_queries,
    store_rows,
)
from mixkernels.attention.triton_tiles import (
    LOG2E,
    dot,
    dot_add,
    load_length,
    locate_candidates,
    locate_query,
)


@triton.jit
def _block(
    b_q,
    b_k,
    b_v,
    b_scale,
    m_n,
    b_m,
    b_l,
    b_o,
    MASKED: tl.constexpr,
    FLOAT32_SUMS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # one block of shared keys, of which at least one is valid; b_l is [rows] if FLOAT32_SUMS, else [rows, 16]
    b_s = dot(b_q, b_k, INTERPRET)
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1) * b_scale)
    b_decay = tl.exp2(b_m - b_m_new)
    b_p = tl.exp2(b_s * b_scale[:, None] - b_m_new[:, None])
    if FLOAT32_SUMS:
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
    else:
        # by way of float32, because the interpreter knows no other way
        b_one = tl.full([b_k.shape[1], 16], 1.0, tl.float32).to(b_v.dtype)
        b_l = dot_add(b_p, b_one, b_l * b_decay[:, None], INTERPRET)
    return b_m_new, b_l, dot_add(b_p, b_v, b_o * b_decay[:, None], INTERPRET)


@triton.jit
def _row_sums(b_l, FLOAT32_SUMS: tl.constexpr):
    # [rows]
    if not FLOAT32_SUMS:
        b_l = tl.max(b_l, axis=1)
    return b_l


@triton.jit(do_not_specialize=["num_candidates", "num_keys", "batch"], launch_metadata=forward_metadata)
def candidate_attention_fwd_streamed_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS
    STATE_SLOT: tl.constexpr = HAS_STATE and SLOTS > K
    STATE_TILE: tl.constexpr = HAS_STATE and SLOTS == K
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    FLOAT32_SUMS: tl.constexpr = HAS_LSE or dtype == tl.float32

    # heads vary fastest, so that neighbouring programs share cache lines
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_tile = i_program // H
    if RAGGED:
        i_batch, i_block, start, stop = locate_query(offsets_ptr, batch, i_tile, CANDIDATES)
    else:
        num_blocks = tl.cdiv(num_candidates, CANDIDATES)
        i_batch, i_block = i_tile // num_blocks, i_tile % num_blocks
        start = i_batch * num_candidates
        stop = start + num_candidates
    o_out, o_source, o_slot, m_row = locate_candidates(
        ids_ptr, i_block, start, stop, CANDIDATES, SLOTS, HAS_IDS, BLOCK_M
    )
    if not HAS_IDS and not RAGGED:
        o_source = o_out - start
    m_context = m_row & (o_slot < K)
    m_state = m_row & (o_slot == K)
    o_d = tl.arange(0, D)
    # a Python float may arrive as float64 under torch.compile
    scale = tl.cast(scale, tl.float32) * LOG2E

    o_factor = ((o_out if PER_QUERY else o_source) * K + o_slot) * H + i_head
    p_own_logits = own_logits_ptr + i_batch * ol_b + i_head * ol_h + o_source * ol_n + o_slot * ol_r
    # [BLOCK_M, D]
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
    b_q, b_scale = scaled_queries(b_q, scale, query_scale_ptr, o_factor, m_context, QUANTISED, True, BLOCK_M, dtype)
    if dtype == tl.float32:
        b_m, b_l, b_o = attend_own_elementwise(
            b_q,
            b_scale,
            context_key_ptr + i_batch * ck_b + i_head * ck_h + o_source * ck_n,
            ck_c,
            context_value_ptr + i_batch * cv_b + i_head * cv_h + o_source * cv_n,
            cv_c,
            p_own_logits,
            ol_c,
            key_scale_ptr,
            value_scale_ptr,
            o_factor - o_slot * H,
            o_d,
            m_context,
            H,
            K,
            D,
            HAS_OWN_LOGITS,
            QUANTISED,
            BLOCK_M,
        )
    else:
        b_t = own_logits(
            b_q,
            b_k_own,
            b_scale,
            p_own_logits,
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
        b_m = own_maximum(b_t, K)
        b_l, b_o = attend_own(
            b_t, b_m, b_v_own, value_scale_ptr, o_factor, m_context, K, SLOTS, QUANTISED, BLOCK_M, dtype, INTERPRET
        )
    if not FLOAT32_SUMS:
        b_l = tl.zeros([BLOCK_M, 16], tl.float32) + b_l[:, None]
    if STATE_TILE:
        o_out_s, o_source_s, _, m_state = locate_candidates(
            ids_ptr, i_block, start, stop, CANDIDATES, 1, HAS_IDS, BLOCK_S
        )
        if not HAS_IDS and not RAGGED:
            o_source_s = o_out_s - start
        b_q_s = load_rows(state_query_ptr + i_batch * sq_b + i_head * sq_h + o_source_s * sq_n, o_d, m_state)
        b_q_s = negated(b_q_s, scale < 0.0, dtype)
        b_scale_s = tl.zeros([BLOCK_S], tl.float32) + tl.abs(scale)
        b_m_s = tl.full([BLOCK_S], float("-inf"), tl.float32)
        b_l_s = tl.zeros([BLOCK_S] if FLOAT32_SUMS else [BLOCK_S, 16], tl.float32)
        b_o_s = tl.zeros([BLOCK_S, D], tl.float32)

    length = num_keys
    if HAS_LENGTHS:
        length = load_length(key_lengths_ptr, i_batch, num_keys)
    o_n = tl.arange(0, BLOCK_N)
    # [D, BLOCK_N] and [BLOCK_N, D]
    p_k = key_ptr + i_batch * k_b + i_head * k_h + o_d[:, None]
    p_v = value_ptr + i_batch * v_b + i_head * v_h + o_d[None, :]
    # float32 products take so many registers that there is room for one copy of the loop's body
    MASKED: tl.constexpr = dtype == tl.float32
    whole = length if MASKED else length // BLOCK_N * BLOCK_N
    for i_n in range(0, whole, BLOCK_N):
        o_token = (i_n + o_n).to(tl.int64)
        m_n = o_token < length
        if MASKED:
            b_k = tl.load(p_k + (o_token * k_m)[None, :], mask=m_n[None, :], other=0.0)
            b_v = tl.load(p_v + (o_token * v_m)[:, None], mask=m_n[:, None], other=0.0)
        else:
            b_k = tl.load(p_k + (o_token * k_m)[None, :])
            b_v = tl.load(p_v + (o_token * v_m)[:, None])
        b_m, b_l, b_o = _block(b_q, b_k, b_v, b_scale, m_n, b_m, b_l, b_o, MASKED, FLOAT32_SUMS, INTERPRET)
        if STATE_TILE:
            b_m_s, b_l_s, b_o_s = _block(
                b_q_s, b_k, b_v, b_scale_s, m_n, b_m_s, b_l_s, b_o_s, MASKED, FLOAT32_SUMS, INTERPRET
            )
    if not MASKED:  # noqa: SIM102 (the one is known when compiling, the other is not)
        if whole < length:
            o_token = (whole + o_n).to(tl.int64)
            m_n = o_token < length
            b_k = tl.load(p_k + (o_token * k_m)[None, :], mask=m_n[None, :], other=0.0)
            b_v = tl.load(p_v + (o_token * v_m)[:, None], mask=m_n[:, None], other=0.0)
            b_m, b_l, b_o = _block(b_q, b_k, b_v, b_scale, m_n, b_m, b_l, b_o, True, FLOAT32_SUMS, INTERPRET)
            if STATE_TILE:
                b_m_s, b_l_s, b_o_s = _block(
                    b_q_s, b_k, b_v, b_scale_s, m_n, b_m_s, b_l_s, b_o_s, True, FLOAT32_SUMS, INTERPRET
                )

    # outputs: (rows, K, H, D), (rows, H, D); contiguous log-sum-exps: (rows, K, H), (rows, H)
    p_o = context_ptr + o_out * CO_N + o_slot * CO_C + i_head * D
    p_lse = context_lse_ptr + (o_out * K + o_slot) * H + i_head
    if STATE_SLOT:
        p_o = tl.where(m_context, p_o, state_ptr + o_out * SO_N + i_head * D)
        p_lse = tl.where(m_context, p_lse, state_lse_ptr + o_out * H + i_head)
        m_context = m_context | m_state
    b_l = _row_sums(b_l, FLOAT32_SUMS)
    store_rows(p_o, p_lse, b_o * reciprocal(b_l)[:, None], b_m, b_l, o_d, m_context, HAS_LSE)
    if STATE_TILE:
        p_o, p_lse = state_ptr + o_out_s * SO_N + i_head * D, state_lse_ptr + o_out_s * H + i_head
        b_l_s = _row_sums(b_l_s, FLOAT32_SUMS)
        store_rows(p_o, p_lse, b_o_s * reciprocal(b_l_s)[:, None], b_m_s, b_l_s, o_d, m_state, HAS_LSE)
