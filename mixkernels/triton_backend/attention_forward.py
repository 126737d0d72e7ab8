"""The fused forward kernel of `mixkernels.candidate_attention` and its launch.

One program serves one tile (mixkernels/triton_backend/tiles.py), one head, one query. Own keys seed the running softmax
in registers, then the query's tokens stream past in blocks of BLOCK_N. Nothing but the outputs is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkernels.checks import Call
from mixkernels.triton_backend.arguments import (
    constants_of,
    dense,
    forward_metadata,
    num_tiles,
    strides_of,
)
from mixkernels.triton_backend.launch import Kind, LaunchConfig, launch_config
from mixkernels.triton_backend.runtime import device_of, empty_output
from mixkernels.triton_backend.tiles import LN2, LOG2E, dot, locate_candidates, locate_query
from mixkernels.triton_backend.variant import KernelVariant, attention_variants


@triton.jit
def _softmax_seed(b_s, b_v, b_m, b_l, b_o, m_row):
    # one more own key per row: online softmax in base 2, elementwise, as rows differ in their key
    b_s = tl.where(m_row, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, b_s)
    # rows that have met no key keep -inf; 0 stands in so that no -inf - -inf arises
    b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_decay = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s - b_shift)
    return b_m_new, b_l * b_decay + b_p, b_o * b_decay[:, None] + b_p[:, None] * b_v


@triton.jit(
    do_not_specialize=["num_candidates", "num_keys", "batch"],
    launch_metadata=forward_metadata,
)
def candidate_attention_fwd_kernel(
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
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_OWN_LOGITS: tl.constexpr,
    QUANTISED: tl.constexpr,
    PER_QUERY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    SLOTS: tl.constexpr = K + 1 if HAS_STATE else K
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS

    # heads fastest, so that neighbouring programs share lines
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
    o_d = tl.arange(0, D)

    # a Python float may arrive as float64 under torch.compile
    b_scale = tl.full([BLOCK_M], 1.0, tl.float32) * (tl.cast(scale, tl.float32) * LOG2E)
    # [BLOCK_M, D]: a context row or a state row
    p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h + o_source * cq_n + o_slot * cq_c
    p_state = state_query_ptr + i_batch * sq_b + i_head * sq_h + o_source * sq_n
    o_scale = o_source
    if QUANTISED:
        if PER_QUERY:
            o_scale = o_out
        b_scale *= tl.load(query_scale_ptr + (o_scale * K + o_slot) * H + i_head, mask=m_context, other=1.0)
        # exact, by way of float32: the interpreter does not turn integers into bfloat16
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_context[:, None], other=0)
        b_q = b_q.to(tl.float32).to(key_ptr.dtype.element_ty)
        if HAS_STATE:
            b_q += tl.load(p_state[:, None] + o_d[None, :], mask=(m_row & (o_slot == K))[:, None], other=0.0)
    else:
        if HAS_STATE:
            p_q = tl.where(m_context, p_q, p_state)
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0.0)

    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, D], tl.float32)

    # own keys seed the running softmax: b_m (max), b_l (sum), b_o (weighted values)
    b_q32 = b_q.to(tl.float32)
    p_own_key = context_key_ptr + i_batch * ck_b + i_head * ck_h + o_source * ck_n
    p_own_value = context_value_ptr + i_batch * cv_b + i_head * cv_h + o_source * cv_n
    p_own_logits = own_logits_ptr + i_batch * ol_b + i_head * ol_h + o_source * ol_n + o_slot * ol_r
    for i_own in tl.static_range(K):
        if HAS_OWN_LOGITS:
            b_s_own = tl.load(p_own_logits + i_own * ol_c, mask=m_context, other=0.0).to(tl.float32) * LOG2E
        else:
            p_k_own = (p_own_key + i_own * ck_c)[:, None] + o_d[None, :]
            b_s_own = (
                tl.sum(b_q32 * tl.load(p_k_own, mask=m_context[:, None], other=0).to(tl.float32), axis=1) * b_scale
            )
            if QUANTISED:
                p_factor = key_scale_ptr + (o_scale * K + i_own) * H + i_head
                b_s_own *= tl.load(p_factor, mask=m_context, other=1.0)
        p_v_own = (p_own_value + i_own * cv_c)[:, None] + o_d[None, :]
        b_v_own = tl.load(p_v_own, mask=m_context[:, None], other=0).to(tl.float32)
        if QUANTISED:
            p_factor = value_scale_ptr + (o_scale * K + i_own) * H + i_head
            b_v_own *= tl.load(p_factor, mask=m_context, other=1.0)[:, None]
        b_m, b_l, b_o = _softmax_seed(b_s_own, b_v_own, b_m, b_l, b_o, m_context)

    # the query's tokens stream
    length = num_keys
    if HAS_LENGTHS:
        length = tl.load(key_lengths_ptr + i_batch).to(tl.int32)
    o_n = tl.arange(0, BLOCK_N)
    p_k = key_ptr + i_batch * k_b + i_head * k_h
    p_v = value_ptr + i_batch * v_b + i_head * v_h
    for i_n in range(0, length, BLOCK_N):
        m_n = i_n + o_n < length
        o_token = (i_n + o_n).to(tl.int64)
        # [D, BLOCK_N] and [BLOCK_N, D]
        b_k = tl.load(p_k + o_d[:, None] + (o_token * k_m)[None, :], mask=m_n[None, :], other=0.0)
        b_v = tl.load(p_v + (o_token * v_m)[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_s = dot(b_q, b_k, INTERPRET) * b_scale[:, None]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        # every block holds at least one valid token, so the new maximum is finite
        b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_decay = tl.exp2(b_m - b_m_new)
        b_p = tl.exp2(b_s - b_m_new[:, None])
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        b_o = b_o * b_decay[:, None]
        if INTERPRET:
            b_o = tl.dot(b_p, b_v.to(tl.float32), acc=b_o, input_precision="ieee")
        else:
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o, input_precision="ieee")
        b_m = b_m_new

    # a row without any key has b_l = 0: zeros and -inf
    m_some = b_l > 0.0
    b_o = b_o / tl.where(m_some, b_l, 1.0)[:, None]

    # outputs are contiguous: (rows, k, H, D), (rows, H, D), (rows, k, H), (rows, H)
    o_context = (o_out * K + o_slot) * H + i_head
    o_state = o_out * H + i_head
    p_o = context_ptr + o_context * D
    p_lse = context_lse_ptr + o_context
    if HAS_STATE:
        p_o = tl.where(m_context, p_o, state_ptr + o_state * D)
        p_lse = tl.where(m_context, p_lse, state_lse_ptr + o_state)
    tl.store(p_o[:, None] + o_d[None, :], b_o.to(context_ptr.dtype.element_ty), mask=m_row[:, None])
    if HAS_LSE:
        b_lse = tl.where(m_some, (b_m + tl.log2(tl.where(m_some, b_l, 1.0))) * LN2, float("-inf"))
        tl.store(p_lse, b_lse, mask=m_row)


def candidate_attention(
    call: Call, *, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Same contract as the reference's; one launch, no workspace."""
    call = dense(call)
    key, lead = call.key, call.lead
    heads, head_dim = key.shape[2:]
    k, has_state = call.context_query.shape[-3], call.state_query is not None
    context = empty_output(key, *lead, k, heads, head_dim)
    state = empty_output(key, *lead, heads, head_dim) if has_state else None
    context_lse = key.new_empty(context.shape[:-1], dtype=torch.float32) if return_lse else None
    state_lse = key.new_empty(state.shape[:-1], dtype=torch.float32) if return_lse and state is not None else None
    outputs = (context, state, context_lse, state_lse)
    if context.numel():
        slots = k + has_state
        # absent tensors are never read: any pointer does
        pointers = [context if tensor is None else tensor for tensor in (*call, *outputs)]
        constants = constants_of(call) | {
            "QUANTISED": call.query_scale is not None,
            "PER_QUERY": call.context_query.dim() == 5,
            "HAS_LSE": return_lse,
        }

        def launch(config: LaunchConfig) -> None:
            candidate_attention_fwd_kernel[(num_tiles(call, config.block_m // slots) * heads,)](
                *pointers,
                scale,
                lead[-1],
                key.shape[1],
                key.shape[0],
                *strides_of(call),
                **constants,
                **config.options(),
            )

        with device_of(key):
            launch(launch_config(Kind("forward", k, slots, head_dim, key.element_size()), key.device, launch))
    state = None if state is None else state.to(key.dtype)
    return context.to(key.dtype), state, context_lse, state_lse


def variants() -> list[KernelVariant]:
    """Return the kernel in every launch configuration that is shipped, and in every form of its candidates."""
    return attention_variants(
        candidate_attention_fwd_kernel, "forward", {"QUANTISED": False, "PER_QUERY": False, "HAS_LSE": False}
    )
