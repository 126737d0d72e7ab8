"""The fused forward kernel of `mixkernels.candidate_attention` and its launch.

Tile arithmetic. A candidate owns k + 1 rows: its k context rows and its state row (k rows without a state). A tile has
BLOCK_M rows and holds BLOCK_M // (k + 1) whole candidates, so no candidate straddles two tiles; the few rows left over
are masked. Row r of a tile belongs to candidate r // (k + 1) and is slot r % (k + 1): slots below k are context rows,
slot k is the state.

One program serves one tile, one head, one query. Own keys seed the running softmax in registers, then the query's
tokens stream past in blocks of BLOCK_N. Nothing but the outputs is written. All programs lie on grid x, whose limit is
2^31 - 1: y and z stop at 65,535.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


class LaunchConfig(NamedTuple):
    """How the kernel is cut into tiles; a function of k, D and the dtype alone, so sizes never recompile it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_config(slots: int, head_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Rows and keys of a tile for candidates of `slots` rows each.

    64 rows waste at most slots - 1 of them; wide heads in float32 take narrower key blocks to stay in registers.
    """
    block_m = 64 if slots <= 8 else 128
    block_n = 32 if dtype == torch.float32 or head_dim >= 128 else 64
    return LaunchConfig(block_m, block_n, num_warps=4 if block_m == 64 else 8, num_stages=2)


@triton.jit
def _softmax_seed(b_q, b_m, b_l, b_o, p_key, p_value, m_row, scale_log2):
    # one more own key per row: online softmax in base 2, elementwise, rows differ in their key
    b_k = tl.load(p_key, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_v = tl.load(p_value, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_s = tl.where(m_row, tl.sum(b_q * b_k, axis=1) * scale_log2, float("-inf"))
    b_m_new = tl.maximum(b_m, b_s)
    # rows that have met no key keep -inf; 0 stands in so that no -inf - -inf arises
    b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_decay = tl.exp2(b_m - b_shift)
    b_p = tl.exp2(b_s - b_shift)
    b_l = b_l * b_decay + b_p
    b_o = b_o * b_decay[:, None] + b_p[:, None] * b_v
    return b_m_new, b_l, b_o


@triton.jit(do_not_specialize=["num_candidates", "num_keys", "batch"])
def candidate_attention_fwd_kernel(
    context_query_ptr,
    context_key_ptr,
    context_value_ptr,
    state_query_ptr,
    key_ptr,
    value_ptr,
    key_lengths_ptr,
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
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    SLOTS: tl.constexpr = K + 1 if HAS_STATE else K
    CANDIDATES: tl.constexpr = BLOCK_M // SLOTS

    # one program: BLOCK_M rows of whole candidates, one head, one query; heads fastest, so that neighbours share lines
    i_program = tl.program_id(0).to(tl.int64)
    i_head = i_program % H
    num_blocks = tl.cdiv(num_candidates, CANDIDATES)
    i_block = (i_program // H) % num_blocks
    i_batch = i_program // H // num_blocks

    o_row = tl.arange(0, BLOCK_M)
    o_slot = o_row % SLOTS
    o_candidate = i_block * CANDIDATES + o_row // SLOTS
    m_row = (o_row < CANDIDATES * SLOTS) & (o_candidate < num_candidates)
    m_context = m_row & (o_slot < K)
    o_d = tl.arange(0, D)

    # [BLOCK_M, D]
    p_q = context_query_ptr + i_batch * cq_b + i_head * cq_h + o_candidate * cq_n + o_slot * cq_c
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_context[:, None], other=0.0)
    if HAS_STATE:
        m_state = m_row & (o_slot == K)
        p_s = state_query_ptr + i_batch * sq_b + i_head * sq_h + o_candidate * sq_n
        b_q += tl.load(p_s[:, None] + o_d[None, :], mask=m_state[:, None], other=0.0)

    # a Python float may arrive as float64 under torch.compile
    scale_log2 = tl.cast(scale, tl.float32) * _LOG2E
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, D], tl.float32)

    # own keys seed the running softmax: b_m (max), b_l (sum), b_o (weighted values)
    b_q32 = b_q.to(tl.float32)
    p_own_key = context_key_ptr + i_batch * ck_b + i_head * ck_h + o_candidate * ck_n
    p_own_value = context_value_ptr + i_batch * cv_b + i_head * cv_h + o_candidate * cv_n
    for i_own in tl.static_range(K):
        b_m, b_l, b_o = _softmax_seed(
            b_q32,
            b_m,
            b_l,
            b_o,
            (p_own_key + i_own * ck_c)[:, None] + o_d[None, :],
            (p_own_value + i_own * cv_c)[:, None] + o_d[None, :],
            m_context,
            scale_log2,
        )

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
        # [BLOCK_M, BLOCK_N]; the interpreter's low-precision dot is wrong, so tiles are widened there
        if INTERPRET:
            b_s = tl.dot(b_q32, b_k.to(tl.float32), input_precision="ieee")
        else:
            b_s = tl.dot(b_q, b_k, input_precision="ieee")
        b_s = tl.where(m_n[None, :], b_s * scale_log2, float("-inf"))
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
    b_lse = tl.where(m_some, (b_m + tl.log2(tl.where(m_some, b_l, 1.0))) * _LN2, float("-inf"))

    # outputs are contiguous: (B, N, k, H, D), (B, N, H, D), (B, N, k, H), (B, N, H)
    b_o = b_o.to(context_ptr.dtype.element_ty)
    o_context = ((i_batch * num_candidates + o_candidate) * K + o_slot) * H + i_head
    tl.store(context_ptr + (o_context * D)[:, None] + o_d[None, :], b_o, mask=m_context[:, None])
    tl.store(context_lse_ptr + o_context, b_lse, mask=m_context)
    if HAS_STATE:
        o_state = (i_batch * num_candidates + o_candidate) * H + i_head
        tl.store(state_ptr + (o_state * D)[:, None] + o_d[None, :], b_o, mask=m_state[:, None])
        tl.store(state_lse_ptr + o_state, b_lse, mask=m_state)


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Fixed when triton is imported, as triton fixes it."""


def candidate_attention(
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Same contract as `mixkernels.reference.attention.candidate_attention`; one launch, no workspace."""
    batch, num_keys, heads, head_dim = key.shape
    num_candidates, num_context = context_query.shape[-4:-2]
    has_state = state_query is not None
    # the interpreter truncates to bfloat16 where a GPU rounds, so there PyTorch rounds
    out_dtype = torch.float32 if INTERPRET else key.dtype
    context = key.new_empty(batch, num_candidates, num_context, heads, head_dim, dtype=out_dtype)
    context_lse = key.new_empty(context.shape[:-1], dtype=torch.float32)
    state = key.new_empty(batch, num_candidates, heads, head_dim, dtype=out_dtype) if has_state else None
    state_lse = key.new_empty(state.shape[:-1], dtype=torch.float32) if has_state else None
    if context.numel() == 0:
        return context.to(key.dtype), state.to(key.dtype) if has_state else None, context_lse, state_lse

    slots = num_context + has_state
    config = launch_config(slots, head_dim, key.dtype)
    blocks = triton.cdiv(num_candidates, config.block_m // slots)
    with _device_of(key):
        candidate_attention_fwd_kernel[(blocks * heads * batch,)](
            context_query,
            context_key,
            context_value,
            state_query if has_state else context_query,
            key,
            value,
            key if key_lengths is None else key_lengths,
            context,
            state if has_state else context,
            context_lse,
            state_lse if has_state else context_lse,
            scale,
            num_candidates,
            num_keys,
            batch,
            *_candidate_strides(context_query, 4),
            *_candidate_strides(context_key, 4),
            *_candidate_strides(context_value, 4),
            *(_candidate_strides(state_query, 3) if has_state else (0, 0, 0)),
            *key.stride()[:3],
            *value.stride()[:3],
            H=heads,
            K=num_context,
            D=head_dim,
            HAS_STATE=has_state,
            HAS_LENGTHS=key_lengths is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            INTERPRET=INTERPRET,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return context.to(key.dtype), state.to(key.dtype) if has_state else None, context_lse, state_lse


def _candidate_strides(tensor: Tensor, pool_dims: int) -> tuple[int, ...]:
    """Strides of all dimensions but the last; a pool repeats for every query, which is a stride of 0."""
    strides = tensor.stride()[:-1]
    return (0, *strides) if tensor.dim() == pool_dims else strides


def _device_of(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)
