"""Candidate attention on a GPU with PyTorch and FlashInfer at their best: the rivals of `benchmarks.gpu`.

Functions of `benchmarks.measuring.formulations` are used where they suit a GPU. This module adds the forms for a GPU:
chunks below its grid limits, a two-pass merge over any fused attention, FlexAttention over keys that are laid out
ahead, FlashInfer's cascade, and the batch forms of a training step. Functions run on the device of their inputs.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import log, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring.formulations import Inputs, Result, einsum_concatenated, expand, sdpa_on_expanded
from mixkernels import candidate_attention

Call = Callable[[], object]
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Attention of (B, H, rows, D) that also returns log-sum-exps (B, H, rows), natural log."""

GRID_LIMIT = 65_535
"""Blocks that a CUDA grid takes along its second and third axis, where fused attention puts the batch."""

EXPANDED_BYTES = 4 * 2**30
"""Largest memory of a chunk's expanded keys and values."""


class UnavailableError(Exception):
    """A contender does not run for these inputs; the message says why."""


def ours(inputs: Inputs, backend: str) -> Result:
    """This library's operator for one query."""
    result = candidate_attention(
        inputs.context_query,
        inputs.context_key,
        inputs.context_value,
        inputs.state_query,
        inputs.key.unsqueeze(0),
        inputs.value.unsqueeze(0),
        backend=backend,
    )
    return result.context[0], result.state[0]


# -- expanded keys -----------------------------------------------------------------------------------------------------


def expanded_bytes(inputs: Inputs) -> int:
    """Memory of all expanded keys and values."""
    n, k, h, d = inputs.context_query.shape
    return 2 * n * (len(inputs.key) + k) * h * d * inputs.key.element_size()


def sdpa_expanded(inputs: Inputs) -> Result:
    """SDPA over expanded keys, in chunks as large as grid and memory allow; the expansion is timed."""
    n = len(inputs.context_query)
    chunk = min(GRID_LIMIT, max(EXPANDED_BYTES * n // expanded_bytes(inputs), 1))
    parts = [inputs.rows(start, start + chunk) for start in range(0, n, chunk)]
    return _joined([sdpa_on_expanded(part, *expand(part)) for part in parts])


def sdpa_pre_expanded(inputs: Inputs, *, most_bytes: int) -> Call:
    """SDPA over keys that are expanded ahead; the expansion is not timed."""
    if expanded_bytes(inputs) > most_bytes:
        raise UnavailableError(f"expanded keys and values would take {expanded_bytes(inputs) / 1e9:.0f} GB")
    key, value = expand(inputs)

    def run() -> Result:
        stops = [(at, at + GRID_LIMIT) for at in range(0, len(key), GRID_LIMIT)]
        return _joined([sdpa_on_expanded(inputs.rows(at, to), key[at:to], value[at:to]) for at, to in stops])

    return run


def _joined(parts: list[Result]) -> Result:
    contexts, states = zip(*parts, strict=True)
    return (contexts[0], states[0]) if len(parts) == 1 else (torch.cat(contexts), torch.cat(states))


# -- two passes and a merge --------------------------------------------------------------------------------------------


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own fused attention: flash, or memory-efficient where flash has no such dtype."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        # log-sum-exps are padded to whole tiles
        lse = lse[..., : query.shape[-2]]
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out, lse


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, on Hopper the fastest that PyTorch has."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    return out, lse.reshape(query.shape[:-1])


def two_pass(inputs: Inputs, *, attend: Attend, fused_own: bool) -> Result:
    """One fused attention over shared keys, own keys apart, merged by their log-sum-exps.

    Args:
        inputs: of one query.
        attend: the fused attention.
        fused_own: compute own keys by `attend` too, in chunks below the grid limit; otherwise by elementwise products,
            which a compiler fuses with the merge.
    """
    shared, shared_lse = _shared_rows(inputs.context_query, inputs, attend)
    state, _ = _shared_rows(inputs.state_query.unsqueeze(1), inputs, attend)
    merged = _fused_own(inputs, shared, shared_lse, attend) if fused_own else own_products(inputs, shared, shared_lse)
    return merged, state.squeeze(1)


def _shared_rows(rows: Tensor, inputs: Inputs, attend: Attend) -> tuple[Tensor, Tensor]:
    """Rows (N, r, H, D) over the query's keys alone: (N, r, H, D) and (N, r, H)."""
    n, r, h, d = rows.shape
    key, value = inputs.key.transpose(0, 1).unsqueeze(0), inputs.value.transpose(0, 1).unsqueeze(0)
    out, lse = attend(rows.reshape(1, n * r, h, d).transpose(1, 2), key, value)
    return out.transpose(1, 2).reshape(n, r, h, d), lse.transpose(1, 2).reshape(n, r, h)


def _fused_own(inputs: Inputs, shared: Tensor, shared_lse: Tensor, attend: Attend) -> Tensor:
    tensors = [t.transpose(1, 2) for t in (inputs.context_query, inputs.context_key, inputs.context_value)]
    parts = [attend(*chunk) for chunk in zip(*(t.split(GRID_LIMIT) for t in tensors), strict=True)]
    own, own_lse = _joined(parts)
    weight = torch.sigmoid(own_lse.transpose(1, 2) - shared_lse).unsqueeze(-1).to(shared.dtype)
    return torch.lerp(shared, own.transpose(1, 2), weight)


def own_products(inputs: Inputs, shared: Tensor, shared_lse: Tensor) -> Tensor:
    """Merge own keys by elementwise products with attention over shared keys; a compiler makes one kernel of it."""
    scale = 1 / sqrt(inputs.key.shape[-1])
    wide = torch.promote_types(shared.dtype, torch.float32)
    # (N, row, own key, H)
    logits = (inputs.context_query.unsqueeze(2) * inputs.context_key.unsqueeze(1)).sum(-1, dtype=wide) * scale
    total = torch.logaddexp(shared_lse, logits.logsumexp(2))
    kept = torch.exp(shared_lse - total).unsqueeze(-1)
    probs = torch.exp(logits - total.unsqueeze(2)).unsqueeze(-1)
    own = (probs * inputs.context_value.unsqueeze(1)).sum(2)
    return (shared * kept + own).to(shared.dtype)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


class FlexLayout(NamedTuple):
    """Order of keys in a buffer: the query's first, padded to whole blocks, then every candidate's own."""

    num_candidates: int
    num_context: int
    num_keys: int
    row_block: int
    key_block: int

    @property
    def rows(self) -> int:
        """Return the number of context rows."""
        return self.num_candidates * self.num_context

    @property
    def own_start(self) -> int:
        """Return where own keys begin."""
        return -(-self.num_keys // self.key_block) * self.key_block


def flex_layout(n: int, k: int, m: int) -> FlexLayout:
    """Return a layout with smaller key blocks for a short query, which would leave large ones mostly empty."""
    return FlexLayout(n, k, m, row_block=128, key_block=64 if m <= 64 else 128)


def flex_mask(layout: FlexLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return a function that says whether a row attends to a key: to the query's and to its own candidate's."""
    k, m, own_start = layout.num_context, layout.num_keys, layout.own_start

    def own_or_shared(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own = (column - own_start) // k == row // k
        return (column < m) | ((column >= own_start) & own)

    return own_or_shared


def flex_block_mask(layout: FlexLayout, device: torch.device) -> Any:
    """`flex_mask` as a BlockMask, built directly, because create_block_mask would allocate a mask of rows x keys."""
    from torch.nn.attention.flex_attention import BlockMask

    row_blocks = -(-layout.rows // layout.row_block)
    width = -(-(layout.own_start + layout.rows) // layout.key_block)
    if 4 * row_blocks * width > 4 * 2**30:
        raise UnavailableError(f"FlexAttention's mask of {row_blocks} x {width} blocks would take several GB")
    full, shared = layout.num_keys // layout.key_block, layout.own_start // layout.key_block
    first_row = torch.arange(row_blocks, device=device) * layout.row_block
    last_row = (first_row + layout.row_block - 1).clamp(max=layout.rows - 1)
    # own keys of the first and the last candidate in a block of rows
    k = layout.num_context
    first = (layout.own_start + first_row // k * k) // layout.key_block
    last = (layout.own_start + last_row // k * k + k - 1) // layout.key_block
    own_blocks = int((last - first).max()) + 1
    partial_blocks = torch.zeros(row_blocks, width, dtype=torch.int32, device=device)
    partial_blocks[:, : shared - full] = torch.arange(full, shared, device=device)
    room = min(own_blocks, width - (shared - full))
    partial_blocks[:, shared - full : shared - full + room] = first[:, None] + torch.arange(room, device=device)
    full_blocks = torch.zeros_like(partial_blocks)
    full_blocks[:, :full] = torch.arange(full, device=device)
    counts = (last - first + 1 + shared - full, torch.full_like(first, full))
    return BlockMask.from_kv_blocks(
        counts[0].to(torch.int32)[None, None],
        partial_blocks[None, None],
        counts[1].to(torch.int32)[None, None],
        full_blocks[None, None],
        BLOCK_SIZE=(layout.row_block, layout.key_block),
        mask_mod=flex_mask(layout),
        seq_lengths=(layout.rows, layout.own_start + layout.rows),
    )


def flex_prepare(attend: Callable[..., Tensor], block_mask: Any, layout: FlexLayout, inputs: Inputs) -> Call:
    """FlexAttention over one buffer that already holds the candidates' keys; copying the query's in is timed."""
    n, k, h, d = inputs.context_query.shape
    m, start = layout.num_keys, layout.own_start
    buffers = []
    for own in (inputs.context_key, inputs.context_value):
        buffer = own.new_zeros(start + layout.rows, h, d)
        buffer[start:] = own.reshape(n * k, h, d)
        buffers.append(buffer)
    keys, values = buffers
    options = {"BLOCK_M": layout.row_block, "BLOCK_N": layout.key_block} if keys.is_cuda else None

    def run() -> Result:
        keys[:m], values[:m] = inputs.key, inputs.value
        context = attend(
            inputs.context_query.reshape(1, n * k, h, d).transpose(1, 2),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            block_mask=block_mask,
            kernel_options=options,
        )
        state, _ = _shared_rows(inputs.state_query.unsqueeze(1), inputs, fused_attention)
        return context.transpose(1, 2).reshape(n, k, h, d), state.squeeze(1)

    return run


# -- FlashInfer --------------------------------------------------------------------------------------------------------


def flashinfer_unavailable() -> str | None:
    """Why FlashInfer does not run here."""
    return None if importlib.util.find_spec("flashinfer") else "flashinfer is not installed"


def flashinfer_merge(inputs: Inputs) -> Result:
    """FlashInfer's prefill over shared keys, own keys by elementwise products, its `merge_state`."""
    import flashinfer

    n, k, h, d = inputs.context_query.shape
    rows = inputs.context_query.reshape(n * k, h, d)
    shared, shared_lse = flashinfer.single_prefill_with_kv_cache(rows, inputs.key, inputs.value, return_lse=True)
    state = flashinfer.single_prefill_with_kv_cache(inputs.state_query, inputs.key, inputs.value)
    logits = (inputs.context_query.unsqueeze(2) * inputs.context_key.unsqueeze(1)).sum(-1, dtype=torch.float32)
    logits = logits / sqrt(d)
    own = (logits.softmax(2).unsqueeze(-1) * inputs.context_value.unsqueeze(1)).sum(2).to(rows.dtype)
    # FlashInfer's log-sum-exps are to base 2
    own_lse = logits.logsumexp(2).reshape(n * k, h) / log(2)
    merged, _ = flashinfer.merge_state(shared, shared_lse, own.reshape(n * k, h, d), own_lse)
    return merged.view(n, k, h, d), state


def flashinfer_cascade_prepare(inputs: Inputs) -> Call:
    """FlashInfer's two-level cascade over pages of one token; plan and candidates' pages are made ahead, untimed."""
    import flashinfer

    n, k, h, d = inputs.context_query.shape
    m, device = len(inputs.key), inputs.key.device

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def steps(stop: int, step: int = 1, start: int = 0) -> Tensor:
        return torch.arange(start, stop, step, dtype=torch.int32, device=device)

    pages = inputs.key.new_empty(m + n * k, 2, 1, h, d)
    pages[m:, 0, 0], pages[m:, 1, 0] = (t.reshape(n * k, h, d) for t in (inputs.context_key, inputs.context_value))
    workspace = torch.empty(512 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    own_indptr = steps(n * k + 1, k)
    wrapper.plan(
        [integers(0, n * k), own_indptr],
        [integers(0, m), own_indptr],
        [steps(m), steps(m + n * k, start=m)],
        [integers(1), torch.ones(n, dtype=torch.int32, device=device)],
        h,
        h,
        d,
        1,
        q_data_type=inputs.key.dtype,
    )

    def run() -> Result:
        pages[:m, 0, 0], pages[:m, 1, 0] = inputs.key, inputs.value
        context = wrapper.run(inputs.context_query.reshape(n * k, h, d), pages)
        state = flashinfer.single_prefill_with_kv_cache(inputs.state_query, inputs.key, inputs.value)
        return context.view(n, k, h, d), state

    return run


# -- contenders --------------------------------------------------------------------------------------------------------


Prepare = Callable[[Inputs], Call]
"""Makes the timed call for one set of inputs, untimed itself. Raises `UnavailableError`."""


def compiled(function: Callable[[Inputs], Result]) -> Prepare:
    """Compile a formulation with torch.compile, for one shape."""
    run = torch.compile(lambda *tensors: function(Inputs(*tensors)), dynamic=False, fullgraph=True)
    return lambda inputs: partial(run, *vars(inputs).values())


def eager_rivals(*, most_expanded_bytes: int = 24 * 10**9) -> dict[str, Prepare]:
    """Rivals that need no compiler."""
    functions: dict[str, Callable[[Inputs], Result]] = {
        "sdpa-expanded": sdpa_expanded,
        "einsum-concatenated": einsum_concatenated,
        "two-pass": partial(two_pass, attend=fused_attention, fused_own=True),
        "two-pass-products": partial(two_pass, attend=fused_attention, fused_own=False),
        "two-pass-cudnn": partial(two_pass, attend=cudnn_attention, fused_own=False),
    }
    rivals: dict[str, Prepare] = {name: partial(partial, function) for name, function in functions.items()}
    rivals["sdpa-pre-expanded"] = partial(sdpa_pre_expanded, most_bytes=most_expanded_bytes)
    return rivals


def compiled_rivals() -> dict[str, Prepare]:
    """Rivals under torch.compile, and FlashInfer; call it again for every shape."""
    return {
        "einsum-compiled": compiled(einsum_concatenated),
        "two-pass-compiled": compiled(partial(two_pass, attend=fused_attention, fused_own=False)),
        "two-pass-cudnn-compiled": compiled(partial(two_pass, attend=cudnn_attention, fused_own=False)),
        "flex-compiled": _flex_compiled(),
        "flashinfer-merge": _with_flashinfer(partial(partial, flashinfer_merge)),
        "flashinfer-cascade": _with_flashinfer(flashinfer_cascade_prepare),
    }


def _flex_compiled() -> Prepare:
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # all sets of inputs have one shape and share a mask
    mask = cache(flex_block_mask)

    def prepare(inputs: Inputs) -> Call:
        n, k = inputs.context_query.shape[:2]
        layout = flex_layout(n, k, len(inputs.key))
        return flex_prepare(attend, mask(layout, inputs.key.device), layout, inputs)

    return prepare


def _with_flashinfer(prepare: Prepare) -> Prepare:
    def checked(inputs: Inputs) -> Call:
        if reason := flashinfer_unavailable():
            raise UnavailableError(reason)
        return prepare(inputs)

    return checked


# -- a training step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Random inputs of B queries that share a pool: like `Inputs`, with keys and values (B, m, H, D)."""

    context_query: Tensor
    context_key: Tensor
    context_value: Tensor
    state_query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(
        cls, batch: int, n: int, k: int, m: int, h: int, d: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> "Batch":
        """Draw differentiable leaves, from a separate generator."""
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(n, k, h, d)] * 3 + [(n, h, d)] + [(batch, m, h, d)] * 2
        drawn = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
        return cls(*(tensor.requires_grad_() for tensor in drawn))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the six tensors."""
        return tuple(vars(self).values())


def ours_batch(*tensors: Tensor, backend: str) -> Result:
    """This library's operator over a pool: contexts (B, N, k, H, D) and states (B, N, H, D)."""
    result = candidate_attention(*tensors, backend=backend)
    return result.context, result.state


def sdpa_expanded_batch(*tensors: Tensor) -> Result:
    """SDPA with one batch entry for every pair of query and candidate."""
    batch = Batch(*tensors)
    (b, m), (n, k, h, d) = batch.key.shape[:2], batch.context_query.shape

    def joined(shared: Tensor, own: Tensor) -> Tensor:
        pairs = [shared.unsqueeze(1).expand(b, n, m, h, d), own.expand(b, n, k, h, d)]
        return torch.cat(pairs, dim=2).flatten(0, 1).transpose(1, 2)

    key, value = joined(batch.key, batch.context_key), joined(batch.value, batch.context_value)
    rows = batch.context_query.expand(b, n, k, h, d).flatten(0, 1).transpose(1, 2)
    context = F.scaled_dot_product_attention(rows, key, value)
    states = batch.state_query.expand(b, n, h, d).flatten(0, 1).unsqueeze(2)
    state = F.scaled_dot_product_attention(states, key[:, :, :m], value[:, :, :m])
    return context.transpose(1, 2).unflatten(0, (b, n)), state.squeeze(2).unflatten(0, (b, n))


def einsum_batch(*tensors: Tensor) -> Result:
    """No expansion: shared and own scores by einsum, concatenated under one softmax."""
    batch = Batch(*tensors)
    b, m, _, d = batch.key.shape
    scale = 1 / sqrt(d)
    shared = torch.einsum("nkhd,bmhd->bnkhm", batch.context_query, batch.key)
    own = torch.einsum("nkhd,nlhd->nkhl", batch.context_query, batch.context_key)
    probs = (torch.cat([shared, own.expand(b, *own.shape)], dim=-1) * scale).softmax(dim=-1)
    context = torch.einsum("bnkhm,bmhd->bnkhd", probs[..., :m], batch.value)
    context = context + torch.einsum("bnkhl,nlhd->bnkhd", probs[..., m:], batch.context_value)
    state = (torch.einsum("nhd,bmhd->bnhm", batch.state_query, batch.key) * scale).softmax(dim=-1)
    return context, torch.einsum("bnhm,bmhd->bnhd", state, batch.value)


BATCH_RIVALS: Mapping[str, Callable[..., Result]] = {
    "sdpa-expanded": sdpa_expanded_batch,
    "einsum-concatenated": einsum_batch,
}
"""Differentiable rivals of a training step; the benchmark makes "einsum-compiled"."""
