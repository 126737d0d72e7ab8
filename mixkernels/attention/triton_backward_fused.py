"""The backward kernel for one context embedding, up to 128 tokens and candidates of one query: all gradients at once.

With a query's keys K, V as one block, and of a tile of its candidates the rows Q, dO, O and own keys K_own, V_own:

    delta = rowsum(dO * O)
    P^T = exp2(K Q^T - lse),  dS^T = P^T * (V dO^T - delta)      transposed: keys by rows
    dV += P^T dO,  dK += dS^T Q                                  sums over tiles, in registers
    dQ = dS K + dS_own K_own                                     whole: no other program has a share of it
    dK_own = dS_own Q,  dV_own = P_own dO                        row by row: a candidate has one own key

(scales left out; mixkernels/attention/triton_backward_tiles.py). Five products with shared keys where two kernels need
seven, and each row is read once. A tile of contexts is followed by the tile of the same candidates' states. Padding
repeats the query's last key, so that no weight is above 1; in dS K these keys are zero.

A program has one query and head, and every splits-th tile of its candidates, of which the next is loaded while one is
computed. Its dK and dV are a partial sum, which a second stage adds in a fixed order.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_arguments import fused_backward_metadata
from mixkernels.attention.triton_backward_tiles import (
    add_key_gradients,
    add_own_gradients,
    add_own_query_gradients,
    load_own_logits,
    own_key_gradients,
    own_logits,
    store_key_gradients,
    store_own_logits,
)
from mixkernels.attention.triton_tiles import LOG2E, dot_rounded, load_length


@triton.jit
def _load_rows(p_tile, o_row, o_d, m_row):
    # [BLOCK_M, D]; p_tile is that of a tile's first candidate
    return tl.load(p_tile + o_row[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)


@triton.jit
def _load_gradients(p_do, p_o, p_lse, o_result, o_d, m_row, D: tl.constexpr):
    # dO, [BLOCK_M, D], and of each row its log-sum-exp in base 2 (0 for -inf: no weights) and delta = rowsum(dO * O)
    b_do = _load_rows(p_do, o_result * D, o_d, m_row)
    b_o = _load_rows(p_o, o_result * D, o_d, m_row)
    b_lse = tl.load(p_lse + o_result, mask=m_row, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    return b_do, tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E), b_delta


@triton.jit
def _store_rows(p_tile, o_row, o_d, b_x, m_row):
    tl.store(p_tile + o_row[:, None] + o_d[None, :], b_x.to(p_tile.dtype.element_ty), mask=m_row[:, None])


@triton.jit(
    do_not_specialize=["num_candidates", "num_keys", "batch", "splits"],
    launch_metadata=fused_backward_metadata,
)
def candidate_attention_bwd_fused_kernel(
    grad_context_ptr,
    grad_state_ptr,
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
    own_logits_ptr,
    # outputs of candidates: (rows, ...), contiguous
    dq_ptr,
    dk_own_ptr,
    dv_own_ptr,
    ds_ptr,
    dl_logits_ptr,
    # outputs of shared keys: (splits, B, m, H, D), contiguous; (B, m, H, D) if added atomically
    dk_ptr,
    dv_ptr,
    scale,
    num_candidates,
    num_keys,
    batch,
    splits,
    cq_b,
    cq_n,
    cq_h,
    ck_b,
    ck_n,
    ck_h,
    cv_b,
    cv_n,
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
    ol_h,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    ATOMIC: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_batch = i_program // H % batch
    i_split = i_program // H // batch
    start = i_batch * num_candidates
    length = num_keys
    if HAS_LENGTHS:
        length = load_length(key_lengths_ptr, i_batch, num_keys)
    scale = tl.cast(scale, tl.float32)
    scale_log2 = scale * LOG2E

    # shared keys and values, [BLOCK_N, D]
    o_d = tl.arange(0, D)
    o_token = tl.arange(0, BLOCK_N)
    o_kept = tl.maximum(tl.minimum(o_token, length - 1), 0).to(tl.int64)
    m_n = o_token < length
    p_k = key_ptr + i_batch * k_b + i_head * k_h
    b_k = _load_rows(p_k, o_kept * k_m, o_d, o_token < length * BLOCK_N)
    b_k_zero = _load_rows(p_k, o_kept * k_m, o_d, m_n)
    b_v = _load_rows(value_ptr + i_batch * v_b + i_head * v_h, o_kept * v_m, o_d, m_n)
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)

    # from here on pointers are those of the query's first candidate
    p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h
    p_k_own = context_key_ptr + i_batch * ck_b + i_head * ck_h
    p_v_own = context_value_ptr + i_batch * cv_b + i_head * cv_h
    p_s = state_query_ptr + i_batch * sq_b + i_head * sq_h
    p_t = own_logits_ptr + i_batch * ol_b + i_head * ol_h
    i_result = start * H + i_head
    grad_context_ptr += i_result * D
    grad_state_ptr += i_result * D
    context_ptr += i_result * D
    state_ptr += i_result * D
    context_lse_ptr += i_result
    state_lse_ptr += i_result
    dq_ptr += i_result * D
    dk_own_ptr += i_result * D
    dv_own_ptr += i_result * D
    ds_ptr += i_result * D
    dl_logits_ptr += i_result

    o_local = tl.arange(0, BLOCK_M)
    o_result = o_local * H
    # invariant code stays in the loop: outside it takes registers that the loop lacks
    for i_tile in tl.range(
        i_split.to(tl.int32) * BLOCK_M,
        num_candidates,
        splits.to(tl.int32) * BLOCK_M,
        num_stages=STAGES,
        disable_licm=True,
    ):
        m_row = o_local < num_candidates - i_tile
        # a query without keys has weights that nothing sees, finite ones
        m_keys = m_row
        if HAS_LENGTHS:
            m_keys = m_row & (length > 0)
        # in 64 bits, as are strides over candidates
        i_moved = tl.cast(i_tile, tl.int64)
        i_result = i_moved * H
        o_source = o_local.to(tl.int64)

        # contexts: own keys, then shared keys
        b_q = _load_rows(p_q + i_moved * cq_n, o_source * cq_n, o_d, m_row)
        b_do, b_shift, b_delta = _load_gradients(
            grad_context_ptr + i_result * D,
            context_ptr + i_result * D,
            context_lse_ptr + i_result,
            o_result,
            o_d,
            m_row,
            D,
        )
        b_v_own = _load_rows(p_v_own + i_moved * cv_n, o_source * cv_n, o_d, m_row)
        if HAS_OWN_LOGITS:
            b_t = load_own_logits(p_t + i_moved * ol_n + o_source * ol_n, o_local, 0, m_row, m_row, 1)
            own_scale_log2 = LOG2E
        else:
            b_k_own = _load_rows(p_k_own + i_moved * ck_n, o_source * ck_n, o_d, m_row)
            b_t = own_logits(b_q, b_k_own, 1, INTERPRET)
            own_scale_log2 = scale_log2
        b_dt, b_dv_own = add_own_gradients(
            b_t,
            own_scale_log2,
            b_shift,
            b_delta,
            b_do,
            b_v_own,
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, D], tl.float32),
            m_row,
            m_row,
            False,
            1,
            INTERPRET,
        )
        _store_rows(dv_own_ptr + i_result * D, o_result * D, o_d, b_dv_own, m_row)
        if HAS_OWN_LOGITS:
            store_own_logits(dl_logits_ptr + i_result + o_result, o_local, 0, b_dt, m_row, m_row, 1)
        else:
            b_dk_own = own_key_gradients(b_dt * scale, b_q, 1, INTERPRET)
            _store_rows(dk_own_ptr + i_result * D, o_result * D, o_d, b_dk_own, m_row)
        b_shift = tl.load(context_lse_ptr + i_result + o_result, mask=m_keys, other=0.0) * LOG2E
        b_ds, b_dk, b_dv = add_key_gradients(
            b_k, b_v, b_q, b_do, b_shift, b_delta * scale, scale, scale_log2, b_dk, b_dv, INTERPRET
        )
        b_dq = dot_rounded(tl.trans(b_ds), b_k_zero, INTERPRET)
        if not HAS_OWN_LOGITS:
            b_dq = add_own_query_gradients(b_dt * scale, b_k_own, b_dq, 1, INTERPRET)
        _store_rows(dq_ptr + i_result * D, o_result * D, o_d, b_dq, m_row)

        # states
        b_q = _load_rows(p_s + i_moved * sq_n, o_source * sq_n, o_d, m_row)
        b_do, _, b_delta = _load_gradients(
            grad_state_ptr + i_result * D, state_ptr + i_result * D, state_lse_ptr + i_result, o_result, o_d, m_row, D
        )
        b_shift = tl.load(state_lse_ptr + i_result + o_result, mask=m_keys, other=0.0) * LOG2E
        b_ds, b_dk, b_dv = add_key_gradients(
            b_k, b_v, b_q, b_do, b_shift, b_delta * scale, scale, scale_log2, b_dk, b_dv, INTERPRET
        )
        b_dq = dot_rounded(tl.trans(b_ds), b_k_zero, INTERPRET)
        _store_rows(ds_ptr + i_result * D, o_result * D, o_d, b_dq, m_row)

    o_grad = (i_batch * num_keys + o_token) * H + i_head
    i_part = i_split * batch * num_keys * H
    store_key_gradients(dk_ptr, dv_ptr, b_dk, b_dv, i_part, o_grad, o_d, m_n, o_token < num_keys, D, ATOMIC)
