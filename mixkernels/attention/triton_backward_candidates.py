"""The backward kernel that has a tile of candidates and a head: gradients of candidates, states and own logits.

Formulas: mixkernels/attention/triton_backward.py. A program loops over a pool's queries twice: over own keys, whose
gradients it then stores, and over the shared keys. With K > 1 own keys are one more block of keys, the tile itself,
under a block-diagonal mask. Of a query's blocks of keys only the last is masked; the others are loaded ahead. It also
writes the log-sum-exps in base 2 and delta, (H, rows, SLOTS), as the shared keys' kernel reads them.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import candidates_backward_metadata
from mixkernels.attention.triton_backward_tiles import (
    add_own_gradients,
    add_own_query_gradients,
    load_own_logits,
    own_key_gradients,
    own_logits,
    own_pairs,
    store_own_logits,
)
from mixkernels.attention.triton_tiles import LOG2E, dot, dot_add, load_length, load_scalars, load_tile, locate_query


@triton.jit
def _load_gradients(
    grad_context_ptr,
    grad_state_ptr,
    grad_context_lse_ptr,
    grad_state_lse_ptr,
    context_ptr,
    state_ptr,
    context_lse_ptr,
    state_lse_ptr,
    # of contiguous results: (rows, K, H), (rows, H)
    o_context,
    o_state,
    o_d,
    m_row,
    m_context,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LSE_GRAD: tl.constexpr,
):
    # dO, [BLOCK_M, D], and of each row its log-sum-exp in base 2 and delta = rowsum(dO * O) - dlse. A row without any
    # valid key has a log-sum-exp of -inf and no weights, so any number may replace it
    b_do = load_tile(grad_context_ptr, grad_state_ptr, o_context * D, o_state * D, o_d, m_row, m_context, HAS_STATE)
    b_o = load_tile(context_ptr, state_ptr, o_context * D, o_state * D, o_d, m_row, m_context, HAS_STATE)
    b_lse = load_scalars(context_lse_ptr, state_lse_ptr, o_context, o_state, m_row, m_context, HAS_STATE)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    if HAS_LSE_GRAD:
        b_delta -= load_scalars(
            grad_context_lse_ptr, grad_state_lse_ptr, o_context, o_state, m_row, m_context, HAS_STATE
        )
    return b_do, tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E), b_delta


@triton.jit
def _add_block(
    b_q,
    b_do,
    b_k,
    b_v,
    b_shift,
    b_delta,
    scale_log2,
    b_dq,
    PADDED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # b_dq + dS K of one block of shared keys
    b_s = dot(b_q, tl.trans(b_k), INTERPRET) * scale_log2 - b_shift[:, None]
    if PADDED:
        # keys of padding are zero, so any finite weight will do; no weight is above 1
        b_s = tl.minimum(b_s, 0.0)
    b_p = tl.exp2(b_s)
    b_ds = b_p * (dot(b_do, tl.trans(b_v), INTERPRET) - b_delta[:, None])
    return dot_add(b_ds, b_k, b_dq, INTERPRET)


@triton.jit(
    do_not_specialize=["num_candidates", "num_keys", "batch", "splits", "rows"],
    launch_metadata=candidates_backward_metadata,
)
def candidate_attention_bwd_candidates_kernel(
    grad_context_ptr,
    grad_state_ptr,
    grad_context_lse_ptr,
    grad_state_lse_ptr,
    context_ptr,
    state_ptr,
    context_lse_ptr,
    state_lse_ptr,
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
    # outputs: gradients (splits, rows, ...), contiguous
    dq_ptr,
    dk_ptr,
    dv_ptr,
    ds_ptr,
    dl_logits_ptr,
    # for the shared keys' kernel
    shift_ptr,
    delta_ptr,
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
    ol_b,
    ol_n,
    ol_r,
    ol_c,
    ol_h,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    HAS_LSE_GRAD: tl.constexpr,
    POOL: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    SLOTS: tl.constexpr = K + 1 if HAS_STATE else K
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS

    # a pool's program loops over queries i_split, i_split + splits, ...; any other program has one query
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_tile = i_program // H
    num_blocks = tl.cdiv(num_candidates, CANDIDATES)
    if RAGGED:
        i_first, i_block, start, stop = locate_query(offsets_ptr, batch, i_tile, CANDIDATES)
    else:
        i_first, i_block = i_tile // num_blocks, i_tile % num_blocks
        start = i_first * num_candidates
        if POOL:
            start = tl.zeros([], tl.int64)
        stop = start + num_candidates
    # scalars are 64 bits wide; offsets of results in a tile fit in 32
    i_out = start + i_block * CANDIDATES
    i_grad = i_out
    if POOL:
        # partial sums of this split; the pool's rows are candidates
        i_grad = i_out + i_first * num_candidates
    o_row = tl.arange(0, BLOCK_M)
    o_slot = o_row % SLOTS
    o_context = (o_row // SLOTS * K + o_slot) * H
    o_state = o_row // SLOTS * H
    m_row = o_row // SLOTS < tl.minimum(stop - i_out, CANDIDATES).to(tl.int32)
    o_source = i_out + o_row // SLOTS
    if HAS_IDS:
        o_source = tl.load(ids_ptr + o_source, mask=m_row, other=0).to(tl.int64)
    elif not RAGGED:
        o_source -= start
    # in 64 bits they take registers that the loops lack
    i_query = i_first.to(tl.int32)
    i_last = i_query + 1
    i_step = tl.full([], 1, tl.int32)
    if POOL:
        i_last = batch.to(tl.int32)
        i_step = splits.to(tl.int32)
    m_context = m_row & (o_slot < K)
    m_state = m_row & (o_slot == K)
    o_d = tl.arange(0, D)
    scale = tl.cast(scale, tl.float32)
    scale_log2 = scale * LOG2E

    # candidates that are not a pool may have a stride over queries
    o_query = i_first
    if POOL:
        o_query = tl.zeros([], tl.int64)
    # [BLOCK_M, D]: rows, and the same candidates' own keys and values, one per context row
    p_q = context_query_ptr + o_query * cq_b + i_head * cq_h + o_source * cq_n + o_slot.to(tl.int64) * cq_c
    if HAS_STATE:
        p_q = tl.where(m_context, p_q, state_query_ptr + o_query * sq_b + i_head * sq_h + o_source * sq_n)
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
    p_v_own = context_value_ptr + o_query * cv_b + i_head * cv_h + o_source * cv_n + o_slot.to(tl.int64) * cv_c
    b_v_own = tl.load(p_v_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
    m_own = own_pairs(m_context, SLOTS, BLOCK_M)
    own_scale_log2 = scale_log2
    if HAS_OWN_LOGITS:
        own_scale_log2 = tl.full([], 1.0, tl.float32) * LOG2E
        p_l = own_logits_ptr + o_query * ol_b + i_head * ol_h + o_source * ol_n + o_slot.to(tl.int64) * ol_r
        b_t = load_own_logits(p_l, o_slot.to(tl.int64), ol_c, m_context, m_own, K)
    else:
        p_k_own = context_key_ptr + o_query * ck_b + i_head * ck_h + o_source * ck_n + o_slot.to(tl.int64) * ck_c
        b_k_own = tl.load(p_k_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
        b_t = own_logits(b_q, b_k_own, K, INTERPRET)

    # own keys, for every query: the sums of dS, in T's shape, and of dV_own = P^T dO
    b_dt = tl.zeros_like(b_t)
    b_dv = tl.zeros([BLOCK_M, D], tl.float32)
    for i_batch in tl.range(i_query, i_last, i_step, disable_licm=True):
        i_result = i_out
        if POOL:
            i_result = i_out + tl.cast(i_batch, tl.int64) * num_candidates
        b_do, b_shift, b_delta = _load_gradients(
            grad_context_ptr + (i_result * K * H + i_head) * D,
            grad_state_ptr + (i_result * H + i_head) * D,
            grad_context_lse_ptr + i_result * K * H + i_head,
            grad_state_lse_ptr + i_result * H + i_head,
            context_ptr + (i_result * K * H + i_head) * D,
            state_ptr + (i_result * H + i_head) * D,
            context_lse_ptr + i_result * K * H + i_head,
            state_lse_ptr + i_result * H + i_head,
            o_context,
            o_state,
            o_d,
            m_row,
            m_context,
            D,
            HAS_STATE,
            HAS_LSE_GRAD,
        )
        # for the shared keys' kernel
        i_saved = (i_head * rows + i_result) * SLOTS
        tl.store(shift_ptr + i_saved + o_row, b_shift, mask=m_row)
        tl.store(delta_ptr + i_saved + o_row, b_delta, mask=m_row)
        b_dt, b_dv = add_own_gradients(
            b_t,
            own_scale_log2,
            b_shift,
            b_delta,
            b_do,
            b_v_own,
            b_dt,
            b_dv,
            m_context,
            m_own,
            HAS_STATE,
            K,
            INTERPRET,
        )
    i_grad_context = (i_grad * K * H + i_head) * D
    o_grad = (o_context * D)[:, None] + o_d[None, :]
    tl.store(dv_ptr + i_grad_context + o_grad, b_dv.to(dv_ptr.dtype.element_ty), mask=m_context[:, None])
    # loaded again, which leaves registers for the loop above
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    if HAS_OWN_LOGITS:
        # (rows, K, K, H)
        p_dl = dl_logits_ptr + i_grad * K * K * H + i_head + o_context * K
        store_own_logits(p_dl, o_slot, H, b_dt, m_context, m_own, K)
    else:
        # queries and own keys are those of every query of a pool, so products wait for the sum
        b_k_own = tl.load(p_k_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
        b_dk = own_key_gradients(b_dt, b_q, K, INTERPRET)
        b_dq = add_own_query_gradients(b_dt, b_k_own, b_dq, K, INTERPRET)
        tl.store(dk_ptr + i_grad_context + o_grad, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_context[:, None])

    # shared keys, for every query; its gradients are loaded again, which leaves registers for the loop over keys
    o_n = tl.arange(0, BLOCK_N)
    for i_batch in tl.range(i_query, i_last, i_step, disable_licm=True):
        i_result = i_out
        if POOL:
            i_result = i_out + tl.cast(i_batch, tl.int64) * num_candidates
        b_do, b_shift, b_delta = _load_gradients(
            grad_context_ptr + (i_result * K * H + i_head) * D,
            grad_state_ptr + (i_result * H + i_head) * D,
            grad_context_lse_ptr + i_result * K * H + i_head,
            grad_state_lse_ptr + i_result * H + i_head,
            context_ptr + (i_result * K * H + i_head) * D,
            state_ptr + (i_result * H + i_head) * D,
            context_lse_ptr + i_result * K * H + i_head,
            state_lse_ptr + i_result * H + i_head,
            o_context,
            o_state,
            o_d,
            m_row,
            m_context,
            D,
            HAS_STATE,
            HAS_LSE_GRAD,
        )
        length = num_keys
        if HAS_LENGTHS:
            length = load_length(key_lengths_ptr, i_batch, num_keys)
        # [BLOCK_N, D]
        p_k = key_ptr + tl.cast(i_batch, tl.int64) * k_b + i_head * k_h + o_d[None, :]
        p_v = value_ptr + tl.cast(i_batch, tl.int64) * v_b + i_head * v_h + o_d[None, :]
        # float32 products take so many registers that there is room for one copy of the loop's body
        PADDED: tl.constexpr = key_ptr.dtype.element_ty == tl.float32
        whole = length if PADDED else length // BLOCK_N * BLOCK_N
        for i_n in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            o_token = (i_n + o_n).to(tl.int64)
            if PADDED:
                m_n = o_token < length
                b_k = tl.load(p_k + (o_token * k_m)[:, None], mask=m_n[:, None], other=0.0)
                b_v = tl.load(p_v + (o_token * v_m)[:, None], mask=m_n[:, None], other=0.0)
            else:
                b_k = tl.load(p_k + (o_token * k_m)[:, None])
                b_v = tl.load(p_v + (o_token * v_m)[:, None])
            b_dq = _add_block(b_q, b_do, b_k, b_v, b_shift, b_delta, scale_log2, b_dq, PADDED, INTERPRET)
        if whole < length:
            o_token = (whole + o_n).to(tl.int64)
            m_n = o_token < length
            b_k = tl.load(p_k + (o_token * k_m)[:, None], mask=m_n[:, None], other=0.0)
            b_v = tl.load(p_v + (o_token * v_m)[:, None], mask=m_n[:, None], other=0.0)
            b_dq = _add_block(b_q, b_do, b_k, b_v, b_shift, b_delta, scale_log2, b_dq, True, INTERPRET)

    b_dq *= scale
    tl.store(dq_ptr + i_grad_context + o_grad, b_dq.to(dq_ptr.dtype.element_ty), mask=m_context[:, None])
    if HAS_STATE:
        p_ds = ds_ptr + (i_grad * H + i_head) * D
        tl.store(p_ds + (o_state * D)[:, None] + o_d[None, :], b_dq.to(ds_ptr.dtype.element_ty), mask=m_state[:, None])
