"""`mixkernels.explain`: what a call of `mixkernels.candidate_attention` would do here, without doing it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixkernels.attention.checks import Call, checked_call
from mixkernels.devices import device_peaks
from mixkernels.dispatch import BACKENDS, not_supported_reasons, select_backend
from mixkernels.roofline import Cost, Form, candidate_attention_cost


@dataclass(frozen=True)
class Explanation:
    """The backend, cost and least time of a call; `print` it to read it."""

    call: str
    """The call in words: form, sizes, dtype."""
    backend: str
    """The backend that would run it."""
    reasons: dict[str, tuple[str, ...]]
    """Why each other backend would not run it; empty for one that could run it but is not chosen."""
    bound: str
    """What limits the call: "memory", "matrix units" or "exponentials"."""
    bytes: int
    """Bytes that must be moved, everything read and written once."""
    flops: int
    exps: int
    """Exponentials, one per logit."""
    seconds: float
    """Least possible time: the largest of `limits`, as if all overlapped. No implementation is faster."""
    limits: dict[str, float]
    """Least seconds that each bound alone allows."""
    device: str
    """The device whose peaks were used, and where they come from."""

    def __str__(self) -> str:
        lines = [f"candidate_attention, {self.call}", f"  backend    {self.backend}"]
        for name, why in self.reasons.items():
            no_reason = (
                "can run it, but is not chosen" if name != "reference" else "can run it, but is never chosen by auto"
            )
            lines.append(f"  not        {name}: {'; '.join(why) or no_reason}")
        lines += [
            f"  moves      {quantity(self.bytes, 'B')}",
            f"  computes   {quantity(self.flops, 'FLOP')}, {quantity(self.exps, 'exp')}",
            f"  limits     {', '.join(f'{name} {duration(time)}' for name, time in self.limits.items())}",
            f"  bound by   {self.bound}, at least {duration(self.seconds)}",
            f"  device     {self.device}",
        ]
        return "\n".join(lines)


def explain(
    context_query: Tensor,
    context_key: Tensor | None,
    context_value: Tensor,
    state_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    candidate_offsets: Tensor | None = None,
    own_logits: Tensor | None = None,
    context_scales: tuple[Tensor, Tensor | None, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    device: str | None = None,
) -> Explanation:
    """Say which backend would run `mixkernels.candidate_attention` on these arguments, what limits it, and how fast.

    Nothing is computed, but a CPU or a GPU without a known data sheet is measured once, for about a second. All m
    tokens count, whatever key_lengths says. Tensors on the device "meta" work too, to plan a call without its data.

    Args:
        context_query, context_key, context_value, state_query, key, value, key_lengths, candidate_ids,
            candidate_offsets, own_logits, context_scales, scale, return_lse, backend: as for the operator.
        device: predict for this device instead of the tensors' own: a name of `mixkernels.devices.KNOWN_GPUS`, such as
            "H100 SXM". The backend is still the one that would run here.

    Example:
        >>> context, tokens = torch.randn(1000, 1, 12, 64), torch.randn(1, 64, 12, 64)
        >>> print(mixkernels.explain(context, context, context, context[:, 0], tokens, tokens, device="H100 SXM"))

    Raises:
        ShapeError, DtypeError, DeviceError: as the operator would; DeviceError also for an unknown `device`.
        BackendError: the chosen backend, or every backend, cannot run the call.
    """
    call = checked_call(
        context_query,
        context_key,
        context_value,
        state_query,
        key,
        value,
        key_lengths,
        candidate_ids,
        candidate_offsets,
        own_logits,
        context_scales=context_scales,
    )
    tensors = [tensor for tensor in call if tensor is not None]
    chosen = select_backend(backend, *tensors)
    # the kernels never round float32 to TF32; PyTorch's own products do where it was allowed
    tf32 = chosen != "triton" and torch.get_float32_matmul_precision() != "highest"
    peaks, source = device_peaks(call.key.device if device is None else device, call.key.dtype, tf32=tf32)
    cost = cost_of(call, return_lse=return_lse)
    return Explanation(
        call=_in_words(call),
        backend=chosen,
        reasons={name: tuple(not_supported_reasons(name, *tensors)) for name in BACKENDS if name != chosen},
        bound=cost.bound(peaks),
        bytes=cost.bytes,
        flops=cost.flops,
        exps=cost.exps,
        seconds=cost.seconds(peaks),
        limits=cost.limits(peaks),
        device=source,
    )


def form_of(call: Call) -> Form:
    """Return the form in which a call gives its candidates."""
    if call.candidate_offsets is not None:
        return "ragged" if call.candidate_ids is None else "ragged_gather"
    if call.candidate_ids is not None:
        return "gathered"
    return "pool" if call.context_query.dim() == 4 else "per_query"


def cost_of(call: Call, *, return_lse: bool = False) -> Cost:
    """Cost of a checked call."""
    batch, num_keys, heads, head_dim = call.key.shape
    ids = call.candidate_ids
    return candidate_attention_cost(
        call.context_query.shape[-4] if ids is None else ids.shape[-1],
        call.context_query.shape[-3],
        num_keys,
        heads,
        head_dim,
        call.key.dtype,
        batch=batch,
        has_state=call.state_query is not None,
        form=form_of(call),
        pool_size=None if ids is None else call.context_query.shape[0],
        own_logits=call.own_logits is not None,
        int8=call.context_query.dtype == torch.int8,
        return_lse=return_lse,
    )


def _in_words(call: Call) -> str:
    batch, num_keys, heads, head_dim = call.key.shape
    num_candidates, num_context = call.context_query.shape[-4:-2]
    words: list[str] = [form_of(call).replace("_", " ")]
    sizes = {"B": batch, "N": num_candidates, "k": num_context, "m": num_keys, "H": heads, "D": head_dim}
    if call.candidate_ids is not None:
        sizes["ids"] = call.candidate_ids.numel()
    words.append(" ".join(f"{name}={size}" for name, size in sizes.items()))
    words.append(str(call.key.dtype).removeprefix("torch."))
    if call.context_query.dtype == torch.int8:
        words.append("int8 candidates")
    if call.own_logits is not None:
        words.append("own logits given")
    if call.state_query is None:
        words.append("no state")
    return ", ".join(words)


def quantity(amount: float, unit: str) -> str:
    """Write an amount with a decimal prefix: 9.2e9 and "B" are "9.20 GB"."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.2f} {prefix}{unit}"
    return f"{amount:.0f} {unit}"


def duration(seconds: float) -> str:
    """Write a time in s, ms or us."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3f} {unit}"
    return f"{seconds / 1e-6:.1f} us"
