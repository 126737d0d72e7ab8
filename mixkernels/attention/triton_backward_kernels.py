"""The two backward kernels of candidate attention; `triton_backward` launches them and has the formulas.

A program of the candidates' kernel has a tile of candidates and a head, loops over a pool's queries and writes delta;
with K > 1 own keys are one more block of keys, the tile itself, under a block-diagonal mask. A program of the shared
keys' kernel has a block of keys of one query and head and loops over the tiles of candidates. Tile arithmetic:
mixkernels/attention/triton_tiles.py.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import candidates_backward_metadata, shared_backward_metadata
from mixkernels.attention.triton_tiles import LOG2E, dot, load_length, locate_candidates, locate_query

_SIZES = ["num_candidates", "num_keys", "batch", "splits"]


@triton.jit
def _load_rows(context_ptr, state_ptr, o_context, o_state, o_d, m_row, m_context, HAS_STATE: tl.constexpr):
    # [BLOCK_M, D] from a context row or a state row, in one load; both tensors' last dimension is dense
    p_row = context_ptr + o_context
    if HAS_STATE:
        p_row = tl.where(m_context, p_row, state_ptr + o_state)
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def _load_scalars(context_ptr, state_ptr, o_context, o_state, m_row, m_context, HAS_STATE: tl.constexpr):
    # [BLOCK_M]
    p_row = context_ptr + o_context
    if HAS_STATE:
        p_row = tl.where(m_context, p_row, state_ptr + o_state)
    return tl.load(p_row, mask=m_row, other=0.0)


@triton.jit(do_not_specialize=_SIZES, launch_metadata=candidates_backward_metadata)
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
    context_delta_ptr,
    state_delta_ptr,
    scale,
    num_candidates,
    num_keys,
    batch,
    splits,
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
    b_q = _load_rows(
        context_query_ptr + o_query * cq_b + i_head * cq_h,
        state_query_ptr + o_query * sq_b + i_head * sq_h,
        o_source * cq_n + o_slot * cq_c,
        o_source * sq_n,
        o_d,
        m_row,
        m_context,
        HAS_STATE,
    )
    p_v_own = context_value_ptr + o_query * cv_b + i_head * cv_h + o_source * cv_n + o_slot * cv_c
    b_v_own = tl.load(p_v_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
    # own logits: [BLOCK_M] at K = 1, where a row's own key is in the same row; otherwise [BLOCK_M, BLOCK_M],
    # context rows with the context keys of their candidate, which are rows of the same tile
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
        b_dl = tl.zeros_like(b_own)
    else:
        p_k_own = context_key_ptr + o_query * ck_b + i_head * ck_h + o_source * ck_n + o_slot * ck_c
        b_k_own = tl.load(p_k_own[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
        if K == 1:
            b_own = tl.sum(b_q.to(tl.float32) * b_k_own.to(tl.float32), axis=1)
        else:
            b_own = dot(b_q, tl.trans(b_k_own), INTERPRET)
        b_dk = tl.zeros([BLOCK_M, D], tl.float32)
    b_dq = tl.zeros([BLOCK_M, D], tl.float32)
    b_dv = tl.zeros([BLOCK_M, D], tl.float32)
    o_n = tl.arange(0, BLOCK_N)

    for i_batch in range(i_first, i_last, i_step):
        o_out = o_first
        if POOL:
            o_out = o_first + i_batch * num_candidates
        o_context = (o_out * K + o_slot) * H + i_head
        o_state = o_out * H + i_head
        b_do = _load_rows(
            grad_context_ptr, grad_state_ptr, o_context * D, o_state * D, o_d, m_row, m_context, HAS_STATE
        )
        b_o = _load_rows(context_ptr, state_ptr, o_context * D, o_state * D, o_d, m_row, m_context, HAS_STATE)
        b_lse = _load_scalars(context_lse_ptr, state_lse_ptr, o_context, o_state, m_row, m_context, HAS_STATE)
        b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
        if HAS_LSE_GRAD:
            b_delta -= _load_scalars(
                grad_context_lse_ptr, grad_state_lse_ptr, o_context, o_state, m_row, m_context, HAS_STATE
            )
        tl.store(context_delta_ptr + o_context, b_delta, mask=m_context)
        if HAS_STATE:
            tl.store(state_delta_ptr + o_state, b_delta, mask=m_state)

        # own keys; a row without any valid key has lse = -inf, and its P is masked
        b_shift = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)
        if K == 1:
            b_p_own = tl.where(m_context, tl.exp2(b_own * own_scale_log2 - b_shift), 0.0)
            b_do32 = b_do.to(tl.float32)
            b_ds_own = b_p_own * (tl.sum(b_do32 * b_v_own.to(tl.float32), axis=1) - b_delta)
            b_dv += b_p_own[:, None] * b_do32
            if not HAS_OWN_LOGITS:
                b_dq += b_ds_own[:, None] * b_k_own.to(tl.float32)
                b_dk += b_ds_own[:, None] * b_q.to(tl.float32)
        else:
            b_p_own = tl.where(m_own, tl.exp2(b_own * own_scale_log2 - b_shift[:, None]), 0.0)
            b_ds_own = b_p_own * (dot(b_do, tl.trans(b_v_own), INTERPRET) - b_delta[:, None])
            b_dv += dot(tl.trans(b_p_own.to(b_do.dtype)), b_do, INTERPRET)
            if not HAS_OWN_LOGITS:
                b_dq += dot(b_ds_own.to(b_q.dtype), b_k_own, INTERPRET)
                b_dk += dot(tl.trans(b_ds_own.to(b_q.dtype)), b_q, INTERPRET)
        if HAS_OWN_LOGITS:
            b_dl += b_ds_own

        # shared keys
        length = num_keys
        if HAS_LENGTHS:
            length = load_length(key_lengths_ptr, i_batch, num_keys)
        p_k = key_ptr + i_batch * k_b + i_head * k_h
        p_v = value_ptr + i_batch * v_b + i_head * v_h
        for i_n in range(0, length, BLOCK_N):
            m_n = i_n + o_n < length
            o_token = (i_n + o_n).to(tl.int64)
            # [BLOCK_N, D]
            b_k = tl.load(p_k + (o_token * k_m)[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
            b_v = tl.load(p_v + (o_token * v_m)[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
            # [BLOCK_M, BLOCK_N]
            b_p = tl.exp2(dot(b_q, tl.trans(b_k), INTERPRET) * scale_log2 - b_shift[:, None])
            b_p = tl.where(m_n[None, :], b_p, 0.0)
            b_ds = b_p * (dot(b_do, tl.trans(b_v), INTERPRET) - b_delta[:, None])
            b_dq += dot(b_ds.to(b_k.dtype), b_k, INTERPRET)

    o_context = (o_grad * K + o_slot) * H + i_head
    b_dq *= scale
    tl.store(
        dq_ptr + (o_context * D)[:, None] + o_d[None, :], b_dq.to(dq_ptr.dtype.element_ty), mask=m_context[:, None]
    )
    tl.store(
        dv_ptr + (o_context * D)[:, None] + o_d[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=m_context[:, None]
    )
    if HAS_STATE:
        p_ds = ds_ptr + ((o_grad * H + i_head) * D)[:, None] + o_d[None, :]
        tl.store(p_ds, b_dq.to(ds_ptr.dtype.element_ty), mask=m_state[:, None])
    if HAS_OWN_LOGITS:
        # (rows, K, K, H)
        p_dl = dl_logits_ptr + ((o_grad * K + o_slot) * K) * H + i_head
        if K == 1:
            tl.store(p_dl, b_dl, mask=m_context)
        else:
            tl.store(p_dl[:, None] + (o_slot * H)[None, :], b_dl, mask=m_own)
    else:
        p_dk = dk_ptr + (o_context * D)[:, None] + o_d[None, :]
        tl.store(p_dk, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_context[:, None])


@triton.jit(do_not_specialize=_SIZES, launch_metadata=shared_backward_metadata)
def candidate_attention_bwd_shared_kernel(
    grad_context_ptr,
    grad_state_ptr,
    context_lse_ptr,
    state_lse_ptr,
    context_delta_ptr,
    state_delta_ptr,
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
    for i_block in range(i_split, i_last, splits):
        o_out, o_source, o_slot, m_row = locate_candidates(
            ids_ptr, i_block, start, stop, CANDIDATES, SLOTS, HAS_IDS, BLOCK_M
        )
        if not HAS_IDS and not RAGGED:
            o_source = o_out - start
        m_context = m_row & (o_slot < K)
        o_context = (o_out * K + o_slot) * H + i_head
        o_state = o_out * H + i_head
        # [BLOCK_M, D]
        b_q = _load_rows(
            context_query_ptr + i_batch * cq_b + i_head * cq_h,
            state_query_ptr + i_batch * sq_b + i_head * sq_h,
            o_source * cq_n + o_slot * cq_c,
            o_source * sq_n,
            o_d,
            m_row,
            m_context,
            HAS_STATE,
        )
        b_do = _load_rows(
            grad_context_ptr, grad_state_ptr, o_context * D, o_state * D, o_d, m_row, m_context, HAS_STATE
        )
        b_lse = _load_scalars(context_lse_ptr, state_lse_ptr, o_context, o_state, m_row, m_context, HAS_STATE)
        b_delta = _load_scalars(context_delta_ptr, state_delta_ptr, o_context, o_state, m_row, m_context, HAS_STATE)
        # [BLOCK_M, BLOCK_N]
        b_shift = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)
        b_p = tl.exp2(dot(b_q, tl.trans(b_k), INTERPRET) * scale_log2 - b_shift[:, None])
        b_p = tl.where(m_row[:, None] & m_n[None, :], b_p, 0.0)
        b_ds = b_p * (dot(b_do, tl.trans(b_v), INTERPRET) - b_delta[:, None])
        b_dv += dot(tl.trans(b_p.to(b_do.dtype)), b_do, INTERPRET)
        b_dk += dot(tl.trans(b_ds.to(b_q.dtype)), b_q, INTERPRET)

    b_dk *= scale
    o_grad = (i_batch * num_keys + o_token) * H + i_head
    m_store = (o_token < num_keys)[:, None]
    if ATOMIC:
        tl.atomic_add(dk_ptr + (o_grad * D)[:, None] + o_d[None, :], b_dk, mask=m_store)
        tl.atomic_add(dv_ptr + (o_grad * D)[:, None] + o_d[None, :], b_dv, mask=m_store)
    else:
        o_grad += i_split * batch * num_keys * H
        tl.store(dk_ptr + (o_grad * D)[:, None] + o_d[None, :], b_dk.to(dk_ptr.dtype.element_ty), mask=m_store)
        tl.store(dv_ptr + (o_grad * D)[:, None] + o_d[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=m_store)
