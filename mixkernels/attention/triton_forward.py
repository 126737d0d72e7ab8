"""The fused forward kernel of `mixkernels.candidate_attention` and its launch.

A program computes one tile of candidates (mixkernels/attention/triton_tiles.py) for one head and query: their context
rows, and their state rows as a second tile. Own keys initialise the running softmax in registers, then the query's
tokens are read in blocks of BLOCK_N. For a short query (RESIDENT) a program loops the other way: it loads keys and
values once and computes many tiles of candidates, each loaded while the one before is computed. How many programs share
a query's tiles follows from how many run at the same time (`triton_common.occupancy`). Only outputs are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.attention.triton_arguments import (
    constants_of,
    dense,
    forward_metadata,
    num_tiles,
    strides_of,
)
from mixkernels.attention.triton_launch import (
    RESIDENT,
    Kind,
    LaunchConfig,
    forward_options,
    keeps_short_queries,
    launch_config,
    resident_keys,
)
from mixkernels.attention.triton_tiles import (
    LN2,
    LOG2E,
    dot,
    load_length,
    locate_candidates,
    locate_query,
    range_of_program,
)
from mixkernels.attention.triton_variants import attention_variants, resident_variants
from mixkernels.triton_common.occupancy import one_wave, programs_each
from mixkernels.triton_common.runtime import INTERPRET, device_of, empty_output
from mixkernels.triton_common.variant import KernelVariant

_INTERPRETED_WAVE = 4
"""Programs that run at the same time in the interpreter, which has no multiprocessors."""


@triton.jit
def _finite(b_m):
    # rows without any key yet have -inf; 0 replaces it, because -inf - -inf is NaN
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def _softmax_seed(b_s, b_v, b_m, b_l, b_o, m_row):
    # one more own key per row: online softmax in base 2, elementwise, because each row has another key
    b_s = tl.where(m_row, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, b_s)
    b_shift = _finite(b_m_new)
    b_decay = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s - b_shift)
    return b_m_new, b_l * b_decay + b_p, b_o * b_decay[:, None] + b_p[:, None] * b_v


@triton.jit
def _softmax_block(b_q, b_k, b_v, b_scale, m_n, b_m, b_l, b_o, INTERPRET: tl.constexpr):
    # a block of shared keys, online softmax in base 2; b_s is [rows, BLOCK_N]
    b_s = dot(b_q, b_k, INTERPRET) * b_scale[:, None]
    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_shift = _finite(b_m_new)
    b_decay = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_l = b_l * b_decay + tl.sum(b_p, axis=1)
    b_o = b_o * b_decay[:, None]
    if INTERPRET:
        b_o = tl.dot(b_p, b_v.to(tl.float32), acc=b_o, input_precision="ieee")
    else:
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o, input_precision="ieee")
    return b_m_new, b_l, b_o


@triton.jit
def _store_rows(p_o, p_lse, b_m, b_l, b_o, o_d, m_row, HAS_LSE: tl.constexpr):
    # a row without any key has b_l = 0: zeros and -inf
    m_some = b_l > 0.0
    b_l = tl.where(m_some, b_l, 1.0)
    b_o = b_o / b_l[:, None]
    tl.store(p_o[:, None] + o_d[None, :], b_o.to(p_o.dtype.element_ty), mask=m_row[:, None])
    if HAS_LSE:
        tl.store(p_lse, tl.where(m_some, (b_m + tl.log2(b_l)) * LN2, float("-inf")), mask=m_row)


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
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    CANDIDATES: tl.constexpr = BLOCK_M // K

    # heads vary fastest, so that neighbouring programs share cache lines
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    i_tile = i_program // H
    if RAGGED:
        i_batch, i_first, start, stop = locate_query(offsets_ptr, batch, i_tile, CANDIDATES)
        i_last = i_first + 1
    else:
        num_blocks = tl.cdiv(num_candidates, CANDIDATES)
        if RESIDENT:
            programs = tl.num_programs(0) // (H * batch)
            i_batch = i_tile // programs
            i_first, i_last = range_of_program(i_tile % programs, programs, num_blocks)
            # in 64 bits they take the registers that int8 candidates lack
            i_first, i_last = i_first.to(tl.int32), i_last.to(tl.int32)
        else:
            i_batch, i_first = i_tile // num_blocks, i_tile % num_blocks
            i_last = i_first + 1
        start = i_batch * num_candidates
        stop = start + num_candidates
    o_d = tl.arange(0, D)
    # a Python float may arrive as float64 under torch.compile
    base_scale = tl.cast(scale, tl.float32) * LOG2E

    length = num_keys
    if HAS_LENGTHS:
        length = load_length(key_lengths_ptr, i_batch, num_keys)
    o_n = tl.arange(0, BLOCK_N)
    # [D, BLOCK_N] and [BLOCK_N, D]
    p_k = key_ptr + i_batch * k_b + i_head * k_h + o_d[:, None]
    p_v = value_ptr + i_batch * v_b + i_head * v_h + o_d[None, :]
    if RESIDENT:
        # keys and values stay on the chip for all tiles of candidates below
        m_n = o_n < length
        b_k = tl.load(p_k + (o_n.to(tl.int64) * k_m)[None, :], mask=m_n[None, :], other=0.0)
        b_v = tl.load(p_v + (o_n.to(tl.int64) * v_m)[:, None], mask=m_n[:, None], other=0.0)

    for i_block in tl.range(i_first, i_last, num_stages=STAGES):
        o_out, o_source, o_slot, m_row = locate_candidates(
            ids_ptr, i_block, start, stop, CANDIDATES, K, HAS_IDS, BLOCK_M
        )
        if not HAS_IDS and not RAGGED:
            o_source = o_out - start

        # all loads of a tile are issued before any result is used: [BLOCK_M, D] and [BLOCK_S, D]
        p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h + o_source * cq_n + o_slot * cq_c
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_row[:, None], other=0)
        if HAS_STATE:
            o_out_s, o_source_s, _, m_row_s = locate_candidates(
                ids_ptr, i_block, start, stop, CANDIDATES, 1, HAS_IDS, BLOCK_S
            )
            if not HAS_IDS and not RAGGED:
                o_source_s = o_out_s - start
            p_q = state_query_ptr + i_batch * sq_b + i_head * sq_h + o_source_s * sq_n
            b_q_s = tl.load(p_q[:, None] + o_d[None, :], mask=m_row_s[:, None], other=0.0)

        b_scale = tl.zeros([BLOCK_M], tl.float32) + base_scale
        o_scale = o_source
        if QUANTISED:
            if PER_QUERY:
                o_scale = o_out
            b_scale *= tl.load(query_scale_ptr + (o_scale * K + o_slot) * H + i_head, mask=m_row, other=1.0)
            # exact; by way of float32, because the interpreter does not convert integers to bfloat16
            b_q = b_q.to(tl.float32).to(key_ptr.dtype.element_ty)

        b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_o = tl.zeros([BLOCK_M, D], tl.float32)

        # own keys initialise the running softmax: b_m (max), b_l (sum), b_o (weighted values)
        b_q32 = b_q.to(tl.float32)
        p_own_key = context_key_ptr + i_batch * ck_b + i_head * ck_h + o_source * ck_n
        p_own_value = context_value_ptr + i_batch * cv_b + i_head * cv_h + o_source * cv_n
        p_own_logits = own_logits_ptr + i_batch * ol_b + i_head * ol_h + o_source * ol_n + o_slot * ol_r
        # in 64 bits, like slots
        step_key, step_value, step_logits = tl.cast(ck_c, tl.int64), tl.cast(cv_c, tl.int64), tl.cast(ol_c, tl.int64)
        for i_own in tl.static_range(K):
            p_v_own = (p_own_value + i_own * step_value)[:, None] + o_d[None, :]
            b_v_own = tl.load(p_v_own, mask=m_row[:, None], other=0).to(tl.float32)
            if HAS_OWN_LOGITS:
                b_s_own = tl.load(p_own_logits + i_own * step_logits, mask=m_row, other=0.0).to(tl.float32) * LOG2E
            else:
                p_k_own = (p_own_key + i_own * step_key)[:, None] + o_d[None, :]
                b_k_own = tl.load(p_k_own, mask=m_row[:, None], other=0).to(tl.float32)
                b_s_own = tl.sum(b_q32 * b_k_own, axis=1) * b_scale
                if QUANTISED:
                    p_factor = key_scale_ptr + (o_scale * K + i_own) * H + i_head
                    b_s_own *= tl.load(p_factor, mask=m_row, other=1.0)
            if QUANTISED:
                p_factor = value_scale_ptr + (o_scale * K + i_own) * H + i_head
                b_v_own *= tl.load(p_factor, mask=m_row, other=1.0)[:, None]
            b_m, b_l, b_o = _softmax_seed(b_s_own, b_v_own, b_m, b_l, b_o, m_row)

        if HAS_STATE:
            b_scale_s = tl.zeros([BLOCK_S], tl.float32) + base_scale
            b_m_s = tl.full([BLOCK_S], float("-inf"), tl.float32)
            b_l_s = tl.zeros([BLOCK_S], tl.float32)
            b_o_s = tl.zeros([BLOCK_S, D], tl.float32)

        # the query's tokens
        if RESIDENT:
            b_m, b_l, b_o = _softmax_block(b_q, b_k, b_v, b_scale, m_n, b_m, b_l, b_o, INTERPRET)
            if HAS_STATE:
                b_m_s, b_l_s, b_o_s = _softmax_block(b_q_s, b_k, b_v, b_scale_s, m_n, b_m_s, b_l_s, b_o_s, INTERPRET)
        else:
            for i_n in range(0, length, BLOCK_N):
                o_token = (i_n + o_n).to(tl.int64)
                m_n = o_token < length
                b_k = tl.load(p_k + (o_token * k_m)[None, :], mask=m_n[None, :], other=0.0)
                b_v = tl.load(p_v + (o_token * v_m)[:, None], mask=m_n[:, None], other=0.0)
                b_m, b_l, b_o = _softmax_block(b_q, b_k, b_v, b_scale, m_n, b_m, b_l, b_o, INTERPRET)
                if HAS_STATE:
                    b_m_s, b_l_s, b_o_s = _softmax_block(
                        b_q_s, b_k, b_v, b_scale_s, m_n, b_m_s, b_l_s, b_o_s, INTERPRET
                    )

        # outputs are contiguous: (rows, k, H, D), (rows, H, D), (rows, k, H), (rows, H)
        o_row = (o_out * K + o_slot) * H + i_head
        _store_rows(context_ptr + o_row * D, context_lse_ptr + o_row, b_m, b_l, b_o, o_d, m_row, HAS_LSE)
        if HAS_STATE:
            o_row = o_out_s * H + i_head
            _store_rows(state_ptr + o_row * D, state_lse_ptr + o_row, b_m_s, b_l_s, b_o_s, o_d, m_row_s, HAS_LSE)


def forward_kind(call: Call) -> Kind:
    """Return what the launch configuration of a call depends on; a short query in 16 bits stays resident."""
    key, k = call.key, call.context_query.shape[-3]
    dim, itemsize = key.shape[3], key.element_size()
    is_short = key.shape[1] <= resident_keys(k, dim)
    resident = is_short and itemsize < 4 and call.candidate_offsets is None and keeps_short_queries(key.device)
    return Kind(RESIDENT if resident else "forward", k, k + (call.state_query is not None), dim, itemsize)


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
        # absent tensors are never read, so any pointer will do
        pointers = [context if tensor is None else tensor for tensor in (*call, *outputs)]
        constants = constants_of(call) | {
            "QUANTISED": call.query_scale is not None,
            # which rows of the scales are a candidate's
            "PER_QUERY": call.query_scale is not None and call.context_query.dim() == 5,
            "HAS_LSE": return_lse,
        }
        kind = forward_kind(call)

        def launch(config: LaunchConfig) -> None:
            tiles, batch = num_tiles(call, config.block_m // k), key.shape[0]
            arguments = (*pointers, scale, lead[-1], key.shape[1], batch, *strides_of(call))
            options = constants | forward_options(kind, config, key.shape[1])
            if kind.kernel == RESIDENT:
                wave = _INTERPRETED_WAVE
                if not INTERPRET:
                    wave = one_wave(candidate_attention_fwd_kernel, arguments, options, key.device)
                tiles = batch * programs_each(batch * heads, tiles // batch, wave)
            candidate_attention_fwd_kernel[(tiles * heads,)](*arguments, **options)

        with device_of(key):
            launch(launch_config(kind, key.device, launch))
    state = None if state is None else state.to(key.dtype)
    return context.to(key.dtype), state, context_lse, state_lse


def variants() -> list[KernelVariant]:
    """Return the kernel in every launch configuration that is shipped, and in every form of its candidates."""
    kernel, defaults = candidate_attention_fwd_kernel, {"QUANTISED": False, "PER_QUERY": False, "HAS_LSE": False}
    return [*attention_variants(kernel, "forward", defaults), *resident_variants(kernel, defaults)]
