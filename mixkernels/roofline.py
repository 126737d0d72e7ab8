"""Least work of an operator: bytes, FLOPs and exponentials as functions of its shapes.

Benchmarks, `mixkernels.explain`, the profiler and tests share these formulas. Peak rates of devices are in
`mixkernels.devices`. The least time is the largest of bytes / bandwidth, FLOPs / product rate and exponentials /
exponential rate. The bytes of a tensor are counted once, as if nothing were read twice.
"""

from typing import Literal, NamedTuple, get_args

import torch

from mixkernels.devices import Peaks, device_peaks, known_peaks, measured_cpu_peaks

__all__ = [
    "Cost",
    "Form",
    "Peaks",
    "candidate_attention_backward_cost",
    "candidate_attention_cost",
    "device_peaks",
    "gate_layer_norm_cost",
    "known_peaks",
    "measured_cpu_peaks",
    "residual_layer_norm_cost",
    "score_candidates_cost",
]

Form = Literal["pool", "per_query", "gathered", "ragged", "ragged_gather"]
"""How candidates are given, as in the table of `mixkernels.candidate_attention`."""

BOUNDS = ("memory", "matrix units", "exponentials")
"""What can limit a call. All FLOPs, also elementwise ones, count against the product rate."""

_INDEX_BYTES, _FLOAT32_BYTES = 8, 4


class Cost(NamedTuple):
    """Least work of a call: everything is read and written once."""

    flops: int
    bytes: int
    exps: int

    def limits(self, peaks: Peaks) -> dict[str, float]:
        """Least seconds that each of `BOUNDS` alone allows."""
        times = (self.bytes / peaks.bytes, self.flops / peaks.flops, self.exps / peaks.exps)
        return dict(zip(BOUNDS, times, strict=True))

    def seconds(self, peaks: Peaks) -> float:
        """Least time on a device: the largest of the three limits, as if all overlapped."""
        return max(self.limits(peaks).values())

    def bound(self, peaks: Peaks) -> str:
        """Return the one of `BOUNDS` that decides `seconds`."""
        limits = self.limits(peaks)
        return max(limits, key=limits.__getitem__)

    def and_then(self, other: "Cost") -> "Cost":
        """Cost of two calls, one after the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exps + other.exps)


class _Rows(NamedTuple):
    """Rows of an attention call: those computed, and those of candidates read from memory."""

    context: int
    state: int
    context_read: int
    state_read: int
    index_bytes: int


def _rows(
    form: Form, num_candidates: int, num_context: int, batch: int, pool_size: int | None, *, has_state: bool
) -> _Rows:
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; expected one of {', '.join(get_args(Form))}")
    gathers = form in ("gathered", "ragged_gather")
    if pool_size is not None and not gathers:
        raise ValueError(f"pool_size belongs to the forms that gather by ids, but form is {form!r}")
    ragged = form in ("ragged", "ragged_gather")
    computed = num_candidates if ragged else batch * num_candidates
    read = num_candidates if form == "pool" else computed
    if pool_size is not None:
        # repeats come from cache
        read = min(read, pool_size)
    indices = (computed if gathers else 0) + (batch + 1 if ragged else 0)
    states = 1 if has_state else 0
    return _Rows(computed * num_context, computed * states, read * num_context, read * states, indices * _INDEX_BYTES)


def candidate_attention_cost(
    num_candidates: int,
    num_context: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    has_state: bool = True,
    form: Form = "pool",
    pool_size: int | None = None,
    own_logits: bool = False,
    int8: bool = False,
    return_lse: bool = False,
) -> Cost:
    """Cost of `mixkernels.candidate_attention` (docs/design.md, section 2).

    FLOPs: 4 D for every row and shared key, and for every context row and own key (2 D where own logits are given).
    Bytes: queries, own keys and values and shared keys and values read once, outputs written once. Exponentials: one
    per logit. key_lengths are not known here: all m tokens count.

    Args:
        num_candidates: N; for "gathered" n, candidates per query; for the ragged forms the rows of all queries.
        num_context, num_keys, num_heads, head_dim: k, m, H, D.
        dtype: of key, value and outputs, and of the candidates unless int8.
        batch: queries B. A pool is read once for all of them, per-query candidates once each.
        has_state: whether state rows are computed.
        form: how candidates are given.
        pool_size: candidates in the pool that ids gather from: at most these are read, however often ids repeat. None:
            assume that no id repeats.
        own_logits: own logits, (k, k, H) float32 per candidate, are read instead of own keys.
        int8: candidates are int8, with a float32 scale for every row and head of query, key and value.
        return_lse: log-sum-exps, float32, are written too.
    """
    rows = _rows(form, num_candidates, num_context, batch, pool_size, has_state=has_state)
    logits_shared = num_heads * (rows.context + rows.state) * num_keys
    logits_own = num_heads * rows.context * num_context
    # query, value and, unless its logits are given, key of a context row
    tensors_read = 2 if own_logits else 3
    row_bytes = num_heads * head_dim * dtype.itemsize
    candidate_row_bytes = num_heads * (head_dim + _FLOAT32_BYTES) if int8 else row_bytes
    moved = rows.context_read * tensors_read * candidate_row_bytes + rows.index_bytes
    moved += (rows.state_read + 2 * batch * num_keys + rows.context + rows.state) * row_bytes
    if own_logits:
        moved += rows.context_read * num_context * num_heads * _FLOAT32_BYTES
    if return_lse:
        moved += (rows.context + rows.state) * num_heads * _FLOAT32_BYTES
    return Cost(
        flops=head_dim * (4 * logits_shared + (2 if own_logits else 4) * logits_own),
        bytes=moved,
        exps=logits_shared + logits_own,
    )


def candidate_attention_backward_cost(
    num_candidates: int,
    num_context: int,
    num_keys: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    has_state: bool = True,
    form: Form = "pool",
    pool_size: int | None = None,
    own_logits: bool = False,
) -> Cost:
    """Cost of the gradients of `mixkernels.candidate_attention` in all its floating inputs; arguments as in
    `candidate_attention_cost`.

    FLOPs: five products of 2 D per logit: scores again, dP, dQ, dK, dV; for own keys whose logits are given, only dP
    and dV. Two kernels that each compute scores and dP do seven; the two extra ones are not counted here.
    Bytes: the forward's inputs, outputs, their gradients and log-sum-exps read, input gradients written. Exponentials:
    one per logit.
    """
    rows = _rows(form, num_candidates, num_context, batch, pool_size, has_state=has_state)
    logits_shared = num_heads * (rows.context + rows.state) * num_keys
    logits_own = num_heads * rows.context * num_context
    row_bytes = num_heads * head_dim * dtype.itemsize
    tensors_read = 2 if own_logits else 3
    # candidates and their gradients; shared keys and values and theirs; outputs and theirs
    moved = 2 * (tensors_read * rows.context_read + rows.state_read) * row_bytes
    moved += 2 * (2 * batch * num_keys) * row_bytes
    moved += 2 * (rows.context + rows.state) * row_bytes
    moved += (rows.context + rows.state) * num_heads * _FLOAT32_BYTES + rows.index_bytes
    if own_logits:
        moved += 2 * rows.context_read * num_context * num_heads * _FLOAT32_BYTES
    return Cost(
        flops=head_dim * (10 * logits_shared + (4 if own_logits else 10) * logits_own),
        bytes=moved,
        exps=logits_shared + logits_own,
    )


def residual_layer_norm_cost(rows: int, d: int, dtype: torch.dtype) -> Cost:
    """Cost of `mixkernels.residual_layer_norm`, LN(x + residual) over rows of d.

    Bytes: two tensors read, one written, weight and bias read. FLOPs: 8 per element: the sum, 1 for the mean, 3
    for centring and variance, 3 for scale, weight and bias.
    """
    return Cost(flops=8 * rows * d, bytes=(3 * rows * d + 2 * d) * dtype.itemsize, exps=0)


def gate_layer_norm_cost(rows: int, d: int, dtype: torch.dtype, *, has_state: bool = True) -> Cost:
    """Cost of `mixkernels.gate_layer_norm`, LN(z u + (1 - z) h) with z = sigmoid(gate), over rows of d.

    Bytes: gate, update and state (not in a first layer, where h = 0) read, one tensor written, weight and bias read.
    FLOPs: 13 per element, 7 of them the normalisation's and 2 the sigmoid's. Exponentials: one per element.
    """
    tensors = 4 if has_state else 3
    return Cost(flops=13 * rows * d, bytes=(tensors * rows * d + 2 * d) * dtype.itemsize, exps=rows * d)


def score_candidates_cost(
    num_candidates: int,
    num_context: int,
    d: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    additive: bool = False,
    top_k: int | None = None,
) -> Cost:
    """Cost of `mixkernels.score_candidates`: last normalisation, pooling, dot product and, with top_k, selection.

    Bytes read per candidate: k + 1 rows of d, as many rows of residuals, and 4 of an additive score. Bytes written: 4
    per score, or 12 (score and 64-bit index) for each of the top_k. FLOPs: 8 per element to normalise, then 1 per
    element to pool context rows and 2 for the dot product.
    """
    candidates = batch * num_candidates
    elements = candidates * (num_context + 1) * d
    kept = batch * min(top_k, num_candidates) if top_k is not None else 0
    written = kept * (_FLOAT32_BYTES + _INDEX_BYTES) if top_k is not None else candidates * _FLOAT32_BYTES
    return Cost(
        flops=8 * elements + candidates * (num_context + 2) * d,
        bytes=(2 * elements + 2 * d) * dtype.itemsize + written + (candidates * _FLOAT32_BYTES if additive else 0),
        exps=0,
    )
