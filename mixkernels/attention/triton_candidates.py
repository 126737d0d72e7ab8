"""What the forward kernels do with a tile of candidates: load rows, compute logits of own keys, store results.

A candidate has SLOTS rows of a tile (mixkernels/attention/triton_tiles.py), a power of two that is not below K. Where a
slot is left, slot K is the candidate's state row (STATE_SLOT); otherwise states have a tile of their own, one row a
candidate.

Own keys are rows of the same tile, so the logits T of all rows with all own keys are one product, of which the blocks
of K x K on the diagonal are kept, and the weighted own values are another, with zeros outside those blocks. Because
SLOTS is a power of two, a block lies within one group of 16 columns, which matrix units sum at once, so a result does
not depend on the candidate's position in the tile. At K = 1 a block is one number, and T is a vector.

Logits are in base 2. Row maxima are taken before scaling, so the scale must not be negative: signs go to the rows.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_tiles import LN2, LOG2E, dot, dot_rounded


@triton.jit
def load_rows(p_row, o_d, m_row):
    # [rows, D]
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None], other=0)


@triton.jit
def widen(b_x, dtype: tl.constexpr):
    # int8 numbers in the dtype of the products, exact; by way of float32, because the interpreter knows no other way
    return b_x.to(tl.float32).to(dtype)


@triton.jit
def negated(b_x, m_negative, dtype: tl.constexpr):
    # -b_x where m_negative, else b_x; exact, and by way of float32 like `widen`
    b_x = b_x.to(tl.float32)
    return tl.where(m_negative, -b_x, b_x).to(dtype)


@triton.jit
def load_candidates(
    context_query_ptr,
    context_key_ptr,
    context_value_ptr,
    state_query_ptr,
    # of the three contexts: b query, n candidate, c context embedding, h head; of the state without c
    strides,
    i_batch,
    i_head,
    o_source,
    o_slot,
    o_d,
    m_context,
    m_state,
    HAS_OWN_LOGITS: tl.constexpr,
    STATE_SLOT: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    # queries, own keys and own values of context rows, [BLOCK_M, D]; with STATE_SLOT queries of state rows too
    cq_b, cq_n, cq_c, cq_h, ck_b, ck_n, ck_c, ck_h, cv_b, cv_n, cv_c, cv_h, sq_b, sq_n, sq_h = strides
    p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h + o_source * cq_n + o_slot * cq_c
    p_v = context_value_ptr + i_batch * cv_b + i_head * cv_h + o_source * cv_n + o_slot * cv_c
    b_v_own = load_rows(p_v, o_d, m_context)
    b_k_own = b_v_own
    if not HAS_OWN_LOGITS:
        p_k = context_key_ptr + i_batch * ck_b + i_head * ck_h + o_source * ck_n + o_slot * ck_c
        b_k_own = load_rows(p_k, o_d, m_context)
    if STATE_SLOT:
        p_s = state_query_ptr + i_batch * sq_b + i_head * sq_h + o_source * sq_n
        if QUANTISED:
            # states are floating; one of the two is zero
            b_q_s = load_rows(p_s, o_d, m_state)
            b_q = widen(load_rows(p_q, o_d, m_context), b_q_s.dtype) + b_q_s
        else:
            b_q = load_rows(tl.where(m_context, p_q, p_s), o_d, m_context | m_state)
    else:
        b_q = load_rows(p_q, o_d, m_context)
    return b_q, b_k_own, b_v_own


@triton.jit
def load_factor(factor_ptr, o_factor, m_context):
    # [BLOCK_M]: a scale of int8 candidates
    return tl.load(factor_ptr + o_factor, mask=m_context, other=1.0)


@triton.jit
def own_pairs(K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    # [BLOCK_M, BLOCK_M]: whether a context row and an own key are of one candidate
    o_row = tl.arange(0, BLOCK_M)
    m_own = (o_row // SLOTS)[:, None] == (o_row // SLOTS)[None, :]
    if SLOTS > K:
        m_own = m_own & (o_row % SLOTS < K)[:, None] & (o_row % SLOTS < K)[None, :]
    return m_own


@triton.jit
def scaled_queries(
    b_q,
    scale,
    query_scale_ptr,
    o_factor,
    m_context,
    QUANTISED: tl.constexpr,
    # move the sign of the scale to the queries; otherwise the caller moved it to the shared keys
    SIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    dtype: tl.constexpr,
):
    # queries in the dtype of products, and the scale of each row's logits with shared keys, not negative
    b_scale = tl.zeros([BLOCK_M], tl.float32) + tl.abs(scale)
    if QUANTISED:
        b_factor = load_factor(query_scale_ptr, o_factor, m_context)
        b_q = negated(b_q, (b_factor < 0.0)[:, None], dtype)
        b_scale *= tl.abs(b_factor)
    if SIGNED:
        b_q = negated(b_q, scale < 0.0, dtype)
    return b_q, b_scale


@triton.jit
def own_logits(
    b_q,
    b_k_own,
    b_scale,
    p_own_logits,
    own_logits_step,
    key_scale_ptr,
    o_factor,
    o_slot,
    m_context,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # T: [BLOCK_M] at K = 1, -inf in a state's row; else [BLOCK_M, BLOCK_M], -inf outside the blocks
    m_own = own_pairs(K, SLOTS, BLOCK_M)
    if HAS_OWN_LOGITS:
        if K == 1:
            b_t = tl.load(p_own_logits, mask=m_context, other=0.0).to(tl.float32) * LOG2E
        else:
            # an own key's number is its row's slot
            p_t = p_own_logits[:, None] + (o_slot * own_logits_step)[None, :]
            b_t = tl.load(p_t, mask=m_own & m_context[:, None], other=0.0).to(tl.float32) * LOG2E
    else:
        b_factor = tl.full([BLOCK_M], 1.0, tl.float32)
        if QUANTISED:
            b_factor = load_factor(key_scale_ptr, o_factor, m_context)
            b_k_own = widen(b_k_own, b_q.dtype)
        b_t = dot(b_q, tl.trans(b_k_own), INTERPRET)
        if K == 1:
            b_t = tl.sum(tl.where(m_own, b_t, 0.0), axis=1) * (b_scale * b_factor)
        else:
            b_t = b_t * b_scale[:, None] * b_factor[None, :]
    if K > 1:
        b_t = tl.where(m_own, b_t, float("-inf"))
    elif SLOTS > 1:
        b_t = tl.where(m_context, b_t, float("-inf"))
    return b_t


@triton.jit
def own_maximum(b_t, K: tl.constexpr):
    # [BLOCK_M]; -inf in a state's row
    b_m = b_t
    if K > 1:
        b_m = tl.max(b_t, axis=1)
    return b_m


@triton.jit
def attend_own(
    b_t,
    b_m,
    b_v_own,
    value_scale_ptr,
    o_factor,
    m_context,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # R = exp2(T - m): its row sums, [BLOCK_M], and R V_own, [BLOCK_M, D]
    b_shift = finite(b_m)
    b_value_factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if QUANTISED:
        b_value_factor = load_factor(value_scale_ptr, o_factor, m_context)
        b_v_own = widen(b_v_own, dtype)
    if K == 1:
        b_l = tl.exp2(b_t - b_shift)
        b_r = tl.where(own_pairs(K, SLOTS, BLOCK_M), (b_l * b_value_factor)[:, None], 0.0)
    else:
        b_r = tl.exp2(b_t - b_shift[:, None])
        b_l = tl.sum(b_r, axis=1)
        b_r = b_r * b_value_factor[None, :]
    return b_l, dot_rounded(b_r, b_v_own, INTERPRET)


@triton.jit
def attend_own_elementwise(
    b_q,
    b_scale,
    p_own_key,
    key_step,
    p_own_value,
    value_step,
    p_own_logits,
    own_logits_step,
    key_scale_ptr,
    value_scale_ptr,
    o_factor,
    o_d,
    m_context,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # the same without matrix units, which float32 does not use: an online softmax over one own key after the other.
    # pointers and o_factor are those of the candidate's first own key; returns m, l and O after the own keys
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, D], tl.float32)
    for i_own in tl.static_range(K):
        b_v = load_rows(p_own_value + i_own * tl.cast(value_step, tl.int64), o_d, m_context).to(tl.float32)
        if HAS_OWN_LOGITS:
            p_t = p_own_logits + i_own * tl.cast(own_logits_step, tl.int64)
            b_t = tl.load(p_t, mask=m_context, other=0.0).to(tl.float32) * LOG2E
        else:
            b_k = load_rows(p_own_key + i_own * tl.cast(key_step, tl.int64), o_d, m_context).to(tl.float32)
            b_t = tl.sum(b_q * b_k, axis=1) * b_scale
        if QUANTISED:
            if not HAS_OWN_LOGITS:
                b_t *= load_factor(key_scale_ptr, o_factor + i_own * HEADS, m_context)
            b_v *= load_factor(value_scale_ptr, o_factor + i_own * HEADS, m_context)[:, None]
        b_t = tl.where(m_context, b_t, float("-inf"))
        b_m_new = tl.maximum(b_m, b_t)
        b_decay = tl.exp2(b_m - finite(b_m_new))
        b_p = tl.exp2(b_t - finite(b_m_new))
        b_m, b_l, b_o = b_m_new, b_l * b_decay + b_p, b_o * b_decay[:, None] + b_p[:, None] * b_v
    return b_m, b_l, b_o


@triton.jit
def finite(b_m):
    # a row without any key has -inf; 0 replaces it, because -inf - -inf is NaN
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def reciprocal(b_l):
    # one division a row; a row without any key becomes zero
    return tl.where(b_l > 0.0, 1.0 / b_l, 0.0)


@triton.jit
def store_rows(p_row, p_lse, b_o, b_m, b_l, o_d, m_row, HAS_LSE: tl.constexpr):
    # [rows, D], and log-sum-exps from base 2; a row without any key has -inf
    tl.store(p_row[:, None] + o_d[None, :], b_o.to(p_row.dtype.element_ty), mask=m_row[:, None])
    if HAS_LSE:
        store_lse(p_lse, b_m, b_l, m_row)


@triton.jit
def store_lse(p_lse, b_m, b_l, m_row):
    tl.store(p_lse, tl.where(b_l > 0.0, (b_m + tl.log2(b_l)) * LN2, float("-inf")), mask=m_row)
