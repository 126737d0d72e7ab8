"""Launch arguments of the attention kernels: strides, constants, number of tiles, and metadata for profilers."""

from typing import Any

from torch import Tensor

from mixkernels.attention.checks import Call
from mixkernels.roofline import Cost, candidate_attention_cost
from mixkernels.triton_common.runtime import INTERPRET

STRIDE_NAMES = (
    *("cq_b", "cq_n", "cq_c", "cq_h", "ck_b", "ck_n", "ck_c", "ck_h", "cv_b", "cv_n", "cv_c", "cv_h"),
    *("sq_b", "sq_n", "sq_h", "k_b", "k_m", "k_h", "v_b", "v_m", "v_h", "ol_b", "ol_n", "ol_r", "ol_c", "ol_h"),
)
"""Names of the strides in the order of `strides_of` and of the kernels' arguments: tensor, then b query, n candidate, c
context embedding, m token, h head; ol are the own logits with r row and c own key."""


def dense(call: Call) -> Call:
    """Return the call with its index tensors and scales contiguous, as the kernels read them."""
    names = ("key_lengths", "candidate_ids", "candidate_offsets", "query_scale", "key_scale", "value_scale")
    return call._replace(**{name: t.contiguous() for name in names if (t := getattr(call, name)) is not None})


def strides_of(call: Call) -> tuple[int, ...]:
    """Strides in elements in the order of `STRIDE_NAMES`; a pool has stride 0 over queries."""
    pool = call.context_query.dim() == 4
    strides: list[int] = []
    for tensor, count in (
        (call.context_query, 4),
        (call.context_key, 4),
        (call.context_value, 4),
        (call.state_query, 3),
    ):
        strides += _per_candidate(tensor, count, pool=pool)
    strides += [*call.key.stride()[:3], *call.value.stride()[:3]]
    # of own logits the last dimension, the head, has a stride too
    logits = call.own_logits
    strides += [0] * 5 if logits is None else [*([0] if pool else []), *logits.stride()]
    return tuple(strides)


def _per_candidate(tensor: Tensor | None, count: int, *, pool: bool) -> list[int]:
    if tensor is None:
        return [0] * count
    return [*([0] if pool else []), *tensor.stride()[:-1]]


def out_strides_of(call: Call, out: tuple[Tensor | None, Tensor | None]) -> tuple[int, int, int]:
    """Distances between candidates and contexts of the context output, and between states; constants of a kernel.

    Args:
        call: the call.
        out: where context and state are to be written; None: contiguous memory of their own.

    Raises:
        ValueError: a kernel cannot write there (`written_in_place` says so before).
    """
    k, heads, head_dim = call.context_query.shape[-3:]
    row = heads * head_dim
    context, state = out
    if context is None:
        return k * row, row, row
    lead = len(context.shape) - 3
    return (
        context.stride(lead - 1),
        context.stride(lead) if k > 1 else row,
        row if state is None else state.stride(lead - 1),
    )


def written_in_place(out: tuple[Tensor | None, ...]) -> bool:
    """Whether a kernel can write context and state into these tensors: (..., k, H, D) and (..., H, D) with dense heads.

    Distances between rows are constants of a kernel, so they must not depend on the number of candidates.
    """
    for tensor, inner in zip(out, (3, 2), strict=True):
        if tensor is None:
            continue
        lead, strides = tensor.shape[:-inner], tensor.stride()
        candidates = strides[len(lead) - 1]
        if (
            strides[-1] != 1
            or strides[-2] != tensor.shape[-1]
            # queries follow each other like candidates
            or (len(lead) == 2 and lead[0] > 1 and strides[0] != lead[1] * candidates)
            or (inner == 3 and tensor.shape[-3] > 1 and strides[-3] > candidates)
            or candidates >= 2**31
        ):
            return False
    return True


def constants_of(call: Call) -> dict[str, Any]:
    """Constexpr arguments that follow from the shapes and the form of a call."""
    return {
        "H": call.key.shape[2],
        "K": call.context_query.shape[-3],
        "D": call.key.shape[3],
        "HAS_STATE": call.state_query is not None,
        "HAS_LENGTHS": call.key_lengths is not None,
        "HAS_IDS": call.candidate_ids is not None,
        "RAGGED": call.candidate_offsets is not None,
        "HAS_OWN_LOGITS": call.own_logits is not None,
        "INTERPRET": INTERPRET,
    }


def num_tiles(call: Call, candidates: int) -> int:
    """Tiles of `candidates` for all queries; ragged rows take one more per query (see `triton_tiles.locate_query`)."""
    batch = call.key.shape[0]
    if call.candidate_offsets is not None:
        return call.lead[0] // candidates + batch
    return -(-call.lead[1] // candidates) * batch


def forward_metadata(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Name, FLOPs and bytes of a launch, so that Triton's profiler can print rates and fractions."""
    cost = _forward_cost(args, args["context_ptr"])
    return _described(metadata, args, flops=cost.flops, size=cost.bytes)


def candidates_backward_metadata(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """As `forward_metadata`: three products (P and dP again, dQ); results and their gradients are read, not written."""
    cost = _forward_cost(args, args["grad_context_ptr"])
    return _described(metadata, args, flops=cost.flops * 3 // 2, size=cost.bytes * 2)


def shared_backward_metadata(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """As `forward_metadata`: four products (P and dP again, dK and dV); queries and gradients are read."""
    cost = _forward_cost(args, args["grad_context_ptr"])
    return _described(metadata, args, flops=cost.flops * 2, size=cost.bytes)


def fused_backward_metadata(grid: tuple[int, ...], metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    """As `forward_metadata`: five products (P and dP again, dQ, dK and dV); rows and their gradients, each once."""
    args = {**args, "K": 1, "HAS_STATE": True}
    cost = _forward_cost(args, args["grad_context_ptr"])
    return _described(metadata, args, flops=cost.flops * 5 // 2, size=cost.bytes * 2)


def _forward_cost(args: dict[str, Any], contexts: Tensor) -> Cost:
    batch = int(args["batch"])
    rows = contexts.numel() // (args["K"] * args["H"] * args["D"])
    return candidate_attention_cost(
        rows // batch,
        args["K"],
        int(args["num_keys"]),
        args["H"],
        args["D"],
        contexts.dtype,
        batch=batch,
        has_state=args["HAS_STATE"],
    )


def _described(metadata: Any, args: dict[str, Any], *, flops: int, size: int) -> dict[str, Any]:
    name = f"{metadata.name} k={args['K']} D={args['D']} m={int(args['num_keys'])}"
    return {"name": name, f"flops{8 * args['key_ptr'].element_size()}": flops, "bytes": size}
