"""What the backward kernels share: gradients of a tile's own keys, and of shared keys.

Formulas: mixkernels/attention/triton_backward.py. Own keys are rows of the same tile. At K = 1 a row's own key is in
the same row, so T, the row's logit with it, is a vector, [BLOCK_M]. Otherwise T is [BLOCK_M, BLOCK_M], of which only
context rows with the context keys of their candidate count: a mask of blocks on the diagonal.
"""

import triton
import triton.language as tl

from mixkernels.attention.triton_tiles import dot, dot_add, dot_rounded


@triton.jit
def own_pairs(m_context, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    # [BLOCK_M, BLOCK_M]: whether a context row and a context key are of one candidate
    o_row = tl.arange(0, BLOCK_M)
    return ((o_row // SLOTS)[:, None] == (o_row // SLOTS)[None, :]) & m_context[:, None] & m_context[None, :]


@triton.jit
def load_own_logits(p_row, o_slot, own_logits_step, m_context, m_own, K: tl.constexpr):
    # T of stored own logits; pointers are those of a row's first own key, whose number is its slot
    if K == 1:
        b_t = tl.load(p_row, mask=m_context, other=0.0)
    else:
        b_t = tl.load(p_row[:, None] + (o_slot * own_logits_step)[None, :], mask=m_own, other=0.0)
    return b_t.to(tl.float32)


@triton.jit
def store_own_logits(p_row, o_slot, own_logits_step, b_dt, m_context, m_own, K: tl.constexpr):
    if K == 1:
        tl.store(p_row, b_dt, mask=m_context)
    else:
        tl.store(p_row[:, None] + (o_slot * own_logits_step)[None, :], b_dt, mask=m_own)


@triton.jit
def own_logits(b_q, b_k_own, K: tl.constexpr, INTERPRET: tl.constexpr):
    # T, not scaled
    if K == 1:
        b_t = tl.sum(b_q.to(tl.float32) * b_k_own.to(tl.float32), axis=1)
    else:
        b_t = dot(b_q, tl.trans(b_k_own), INTERPRET)
    return b_t


@triton.jit
def add_own_gradients(
    b_t,
    scale_log2,
    b_shift,
    b_delta,
    b_do,
    b_v_own,
    b_dt,
    b_dv,
    m_context,
    m_own,
    HAS_STATE: tl.constexpr,
    K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # adds dS of the own keys to b_dt, in T's shape, and dV_own = P^T dO to b_dv
    if K == 1:
        b_p = tl.exp2(b_t * scale_log2 - b_shift)
        if HAS_STATE:
            # in a state's row
            b_p = tl.where(m_context, b_p, 0.0)
        b_do32 = b_do.to(tl.float32)
        b_dt += b_p * (tl.sum(b_do32 * b_v_own.to(tl.float32), axis=1) - b_delta)
        b_dv += b_p[:, None] * b_do32
    else:
        b_p = tl.where(m_own, tl.exp2(b_t * scale_log2 - b_shift[:, None]), 0.0)
        b_dt += b_p * (dot(b_do, tl.trans(b_v_own), INTERPRET) - b_delta[:, None])
        b_dv = dot_add(tl.trans(b_p), b_do, b_dv, INTERPRET)
    return b_dt, b_dv


@triton.jit
def own_key_gradients(b_dt, b_q, K: tl.constexpr, INTERPRET: tl.constexpr):
    # dS^T Q
    return b_dt[:, None] * b_q.to(tl.float32) if K == 1 else dot_rounded(tl.trans(b_dt), b_q, INTERPRET)


@triton.jit
def add_own_query_gradients(b_dt, b_k_own, b_dq, K: tl.constexpr, INTERPRET: tl.constexpr):
    # b_dq + dS K_own
    if K == 1:
        b_dq += b_dt[:, None] * b_k_own.to(tl.float32)
    else:
        b_dq = dot_add(b_dt, b_k_own, b_dq, INTERPRET)
    return b_dq


@triton.jit
def add_key_gradients(b_k, b_v, b_q, b_do, b_shift, b_delta, scale, scale_log2, b_dk, b_dv, INTERPRET: tl.constexpr):
    # of shared keys; all scores are transposed, [BLOCK_N, BLOCK_M], so P and dS stay in registers as left sides of
    # products: returns scale dS, b_dk + scale dS^T Q and b_dv + P^T dO. delta is scaled already; so a multiplication
    # and a subtraction are one instruction
    b_p = tl.exp2(dot(b_k, tl.trans(b_q), INTERPRET) * scale_log2 - b_shift[None, :])
    b_dv = dot_add(b_p, b_do, b_dv, INTERPRET)
    b_ds = b_p * (dot(b_v, tl.trans(b_do), INTERPRET) * scale - b_delta[None, :])
    return b_ds, dot_add(b_ds, b_q, b_dk, INTERPRET), b_dv


@triton.jit
def store_key_gradients(
    dk_ptr, dv_ptr, b_dk, b_dv, i_part, o_row, o_d, m_valid, m_store, D: tl.constexpr, ATOMIC: tl.constexpr
):
    # of shared keys, [BLOCK_N, D]; keys of padding have a weight, which nothing else sees
    b_dk = tl.where(m_valid[:, None], b_dk, 0.0)
    b_dv = tl.where(m_valid[:, None], b_dv, 0.0)
    if ATOMIC:
        o_row = (o_row * D)[:, None] + o_d[None, :]
        tl.atomic_add(dk_ptr + o_row, b_dk, mask=m_store[:, None])
        tl.atomic_add(dv_ptr + o_row, b_dv, mask=m_store[:, None])
    else:
        o_row = ((o_row + i_part) * D)[:, None] + o_d[None, :]
        tl.store(dk_ptr + o_row, b_dk.to(dk_ptr.dtype.element_ty), mask=m_store[:, None])
        tl.store(dv_ptr + o_row, b_dv.to(dv_ptr.dtype.element_ty), mask=m_store[:, None])
