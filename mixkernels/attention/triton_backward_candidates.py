"""The backward kernel that has a tile of candidates and a head: gradients of candidates, states and own logits.

Formulas: mixkernels/attention/triton_backward.py. A program loops over a pool's queries twice: over own keys, whose
gradients it then stores, and over the shared keys. With K > 1 own keys are one more block of keys, the tile itself,
under a block-diagonal mask. Of a query's blocks of keys only the last is masked; the others are loaded ahead. It also
writes the log-sum-exps in base 2 and delta, (H, rows, SLOTS), as the shared keys' kernel reads them.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import candidates_backward_metadata
from mixkernels.attention.triton_tiles import (
    LOG2E,
    dot,
    dot_add,
    dot_rounded,
    load_length,
    load_scalars,
    load_tile,
    locate_candidates,
    locate_query,
)


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
    o_first, o_source, o_slot, m_row = locate_candidates(
        ids_ptr, i_block, start, stop, CANDIDATES, SLOTS, HAS_IDS, BLOCK_M
    )
    o_grad = o_first
    if POOL:
        # partial sums of this split; the pool's rows are candidates
        o_grad = o_first + i_first * num_candidates
    if not HAS_IDS and not RAGGED:
        o_source = o_first - start
    i_last = i_first + 1
    i_step = tl.full([], 1, tl.int64)
    if POOL:
        i_last = batch.to(tl.int64)
        i_step = splits.to(tl.int64)
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
    p_q = context_query_ptr + o_query * cq_b + i_head * cq_h + o_source * cq_n + o_slot * cq_c
    if HAS_STATE:
        p_q = tl.where(m_context, p_q, state_query_ptr + o_query * sq_b + i_head * sq_h + o_source * sq_n)
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
    p_v_own = context_value_ptr + o_query * cv_b + i_head * cv_h + o_source * cv_n + o_slot * cv_c
    b_v_own = tl.load(p_v_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
    # T: [BLOCK_M] at K = 1, where a row's own key is in the same row; otherwise [BLOCK_M, BLOCK_M], context rows with
    # the context keys of their candidate, which are rows of the same tile
    o_row = tl.arange(0, BLOCK_M)
    m_own = ((o_row // SLOTS)[:, None] == (o_row // SLOTS)[None, :]) & m_context[:, None] & m_context[None, :]
    own_scale_log2 = scale_log2
    if HAS_OWN_LOGITS:
        own_scale_log2 = tl.full([], 1.0, tl.float32) * LOG2E
        p_l = own_logits_ptr + o_query * ol_b + i_head * ol_h + o_source * ol_n + o_slot * ol_r
        if K == 1:
            b_own = tl.load(p_l, mask=m_context, other=0.0).to(tl.float32)
        else:
            b_own = tl.load(p_l[:, None] + (o_slot * ol_c)[None, :], mask=m_own, other=0.0).to(tl.float32)
    else:
        p_k_own = context_key_ptr + o_query * ck_b + i_head * ck_h + o_source * ck_n + o_slot * ck_c
        b_k_own = tl.load(p_k_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
        if K == 1:
            b_own = tl.sum(b_q.to(tl.float32) * b_k_own.to(tl.float32), axis=1)
        else:
            b_own = dot(b_q, tl.trans(b_k_own), INTERPRET)

    # own keys, for every query: the sums of dS, in T's shape, and of dV_own = P^T dO
    b_ds_own = tl.zeros_like(b_own)
    b_dv = tl.zeros([BLOCK_M, D], tl.float32)
    for i_batch in range(i_first, i_last, i_step):
        o_out = o_first
        if POOL:
            o_out = o_first + i_batch * num_candidates
        b_do, b_shift, b_delta = _load_gradients(
            grad_context_ptr,
            grad_state_ptr,
            grad_context_lse_ptr,
            grad_state_lse_ptr,
            context_ptr,
            state_ptr,
            context_lse_ptr,
            state_lse_ptr,
            (o_out * K + o_slot) * H + i_head,
            o_out * H + i_head,
            o_d,
            m_row,
            m_context,
            D,
            HAS_STATE,
            HAS_LSE_GRAD,
        )
        # for the shared keys' kernel
        o_saved = (i_head * rows + o_out) * SLOTS + o_slot
        tl.store(shift_ptr + o_saved, b_shift, mask=m_row)
        tl.store(delta_ptr + o_saved, b_delta, mask=m_row)
        if K == 1:
            b_p = tl.where(m_context, tl.exp2(b_own * own_scale_log2 - b_shift), 0.0)
            b_do32 = b_do.to(tl.float32)
            b_ds_own += b_p * (tl.sum(b_do32 * b_v_own.to(tl.float32), axis=1) - b_delta)
            b_dv += b_p[:, None] * b_do32
        else:
            b_p = tl.where(m_own, tl.exp2(b_own * own_scale_log2 - b_shift[:, None]), 0.0)
            b_ds_own += b_p * (dot(b_do, tl.trans(b_v_own), INTERPRET) - b_delta[:, None])
            b_dv = dot_add(tl.trans(b_p), b_do, b_dv, INTERPRET)
    o_grad_row = (o_grad * K + o_slot) * H + i_head
    p_dv = dv_ptr + (o_grad_row * D)[:, None] + o_d[None, :]
    tl.store(p_dv, b_dv.to(dv_ptr.dtype.element_ty), mask=m_context[:, None])
    # loaded again, which leaves registers for the loop above
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    if HAS_OWN_LOGITS:
        # (rows, K, K, H)
        p_dl = dl_logits_ptr + ((o_grad * K + o_slot) * K) * H + i_head
        if K == 1:
            tl.store(p_dl, b_ds_own, mask=m_context)
        else:
            tl.store(p_dl[:, None] + (o_slot * H)[None, :], b_ds_own, mask=m_own)
    else:
        # queries and own keys are those of every query of a pool, so products wait for the sum
        b_k_own = tl.load(p_k_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
        if K == 1:
            b_dk = b_ds_own[:, None] * b_q.to(tl.float32)
            b_dq += b_ds_own[:, None] * b_k_own.to(tl.float32)
        else:
            b_dk = dot_rounded(tl.trans(b_ds_own), b_q, INTERPRET)
            b_dq = dot_add(b_ds_own, b_k_own, b_dq, INTERPRET)
        p_dk = dk_ptr + (o_grad_row * D)[:, None] + o_d[None, :]
        tl.store(p_dk, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_context[:, None])

    # shared keys, for every query; its gradients are loaded again, which leaves registers for the loop over keys
    o_n = tl.arange(0, BLOCK_N)
    for i_batch in range(i_first, i_last, i_step):
        o_out = o_first
        if POOL:
            o_out = o_first + i_batch * num_candidates
        b_do, b_shift, b_delta = _load_gradients(
            grad_context_ptr,
            grad_state_ptr,
            grad_context_lse_ptr,
            grad_state_lse_ptr,
            context_ptr,
            state_ptr,
            context_lse_ptr,
            state_lse_ptr,
            (o_out * K + o_slot) * H + i_head,
            o_out * H + i_head,
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
        p_k = key_ptr + i_batch * k_b + i_head * k_h + o_d[None, :]
        p_v = value_ptr + i_batch * v_b + i_head * v_h + o_d[None, :]
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
    p_dq = dq_ptr + (o_grad_row * D)[:, None] + o_d[None, :]
    tl.store(p_dq, b_dq.to(dq_ptr.dtype.element_ty), mask=m_context[:, None])
    if HAS_STATE:
        p_ds = ds_ptr + ((o_grad * H + i_head) * D)[:, None] + o_d[None, :]
        tl.store(p_ds, b_dq.to(ds_ptr.dtype.element_ty), mask=m_state[:, None])
