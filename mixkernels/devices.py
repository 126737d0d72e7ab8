"""Peak rates of a device: bytes, FLOPs and exponentials per second, from its data sheet or measured.

`mixkernels.roofline` compares the work of an operator with them. Data sheets come first, because a measured peak hides
what this machine's own libraries fail to reach; a device without a known data sheet is measured.
"""

import re
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from mixkernels.errors import DeviceError

_EXPS_PER_CLOCK = 16
"""Exponentials per multiprocessor and clock: NVIDIA since sm_70 (CUDA C++ Programming Guide, throughput of native
arithmetic instructions), and AMD's CDNA, whose 64 lanes take four clocks for a transcendental."""


class Peaks(NamedTuple):
    """Peak rates of a device, per second."""

    flops: float
    bytes: float
    exps: float


class DataSheet(NamedTuple):
    """Published figures of a GPU, dense (no structured sparsity)."""

    names: str
    """Regular expression that matches the whole result of `torch.cuda.get_device_name`."""
    bytes: float
    """Memory bandwidth in bytes per second."""
    low_precision: float
    """FLOP/s of bfloat16 and float16 products, float32 accumulation."""
    tf32: float
    """FLOP/s of float32 products that may round to TF32."""
    float32: float
    """FLOP/s of float32 products without TF32, outside the tensor cores."""
    exps: float
    """Exponentials per second: multiprocessors x `_EXPS_PER_CLOCK` x boost clock."""


# NVIDIA's data sheets of the H100, H200 and A100. Smaller models (PCIe, NVL, 40 GB) have other figures and other
# names; they are measured.
KNOWN_GPUS = {
    "H100 SXM": DataSheet(r"NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 495e12, 67e12, 132 * _EXPS_PER_CLOCK * 1.83e9),
    "H200": DataSheet(r"NVIDIA H200", 4.8e12, 989e12, 495e12, 67e12, 132 * _EXPS_PER_CLOCK * 1.83e9),
    "A100 80GB": DataSheet(r"NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 156e12, 19.5e12, 108 * _EXPS_PER_CLOCK * 1.41e9),
}


def known_peaks(name: str, dtype: torch.dtype, *, tf32: bool = False) -> Peaks | None:
    """Published peaks of a GPU, or None if it is not listed (or has no published rate for this dtype here).

    Args:
        name: what `torch.cuda.get_device_name` returns, or a key of `KNOWN_GPUS`.
        dtype: of the products; for int8 candidates that is the shared keys' dtype.
        tf32: whether float32 products may round to TF32.
    """
    sheet = KNOWN_GPUS.get(name) or next((s for s in KNOWN_GPUS.values() if re.fullmatch(s.names, name)), None)
    if sheet is None:
        return None
    rates = {torch.bfloat16: sheet.low_precision, torch.float16: sheet.low_precision}
    rates[torch.float32] = sheet.tf32 if tf32 else sheet.float32
    return Peaks(rates[dtype], sheet.bytes, sheet.exps) if dtype in rates else None


def device_peaks(
    device: torch.device | str, dtype: torch.dtype, *, tf32: bool = False, measured: bool = False
) -> tuple[Peaks, str]:
    """Peaks of a device, and one line that says where they come from.

    Args:
        device: "cpu", "cuda", "cuda:1", a key of `KNOWN_GPUS` for one that is not here, or a torch.device.
        dtype: of the products.
        tf32: whether float32 products may round to TF32.
        measured: measure the device even if its data sheet is known.

    Raises:
        DeviceError: the device is not known and not on this machine, so it cannot be measured.
    """
    if device in KNOWN_GPUS:
        sheet_peaks = None if measured else known_peaks(str(device), dtype, tf32=tf32)
        if sheet_peaks is None:
            raise DeviceError(
                f"no peaks of {device} for {dtype}: not in its data sheet, and it cannot be measured here"
            )
        return sheet_peaks, f"{device}, data sheet"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise DeviceError(
            f"device {str(device)!r} is neither a device of this machine (cpu, cuda, cuda:1) nor a known one: "
            f"{', '.join(KNOWN_GPUS)}"
        ) from None
    if device.type == "cpu":
        # emulated products are slower than float32 products of widened inputs, so float32 is the limit
        peaks = measured_cpu_peaks(dtype if multiplies_natively(dtype) else torch.float32)
        return peaks, f"CPU, measured with {torch.get_num_threads()} thread(s)"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise DeviceError(
            f"device {device} is not on this machine and cannot be measured; known devices are {', '.join(KNOWN_GPUS)}"
        )
    name = torch.cuda.get_device_name(device)
    sheet_peaks = None if measured else known_peaks(name, dtype, tf32=tf32)
    if sheet_peaks is not None:
        return sheet_peaks, f"{name}, data sheet"
    index = torch.cuda.current_device() if device.index is None else device.index
    return measured_gpu_peaks(index, dtype), f"{name}, measured"


def multiplies_natively(dtype: torch.dtype, device: str | torch.device = "cpu") -> bool:
    """Whether a device has instructions for products in dtype; emulated ones are no faster than float32."""
    if torch.device(device).type != "cpu":
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


_WORTH_IT = 0.8
"""Share of float32's time from which on another dtype is worth its rounding."""


@cache
def multiplies_faster(dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether a device's products in dtype take clearly less time than in float32; measured once on a CPU, in 20 ms.

    Instructions alone do not decide it: Intel's AVX-512 multiplies bfloat16 no faster than float32, its AMX several
    times as fast, and virtual machines often hide AMX.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False) if dtype == torch.bfloat16 else True
    if device_type != "cpu" or not multiplies_natively(dtype):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(512, 512, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    narrow_rows, narrow_weight = rows.to(dtype), weight.to(dtype)
    with torch.inference_mode():
        wide = _best_seconds(lambda: torch.mm(rows, weight), repeats=10)
        return _best_seconds(lambda: torch.mm(narrow_rows, narrow_weight), repeats=10) <= _WORTH_IT * wide


@cache
def measured_cpu_peaks(dtype: torch.dtype = torch.float32) -> Peaks:
    """Measure this CPU with PyTorch's own operators and current number of threads, in about a second; cached.

    A large product for FLOPs, a copy larger than most caches for bytes (read and written counted), exp within the cache
    for exponentials.
    """
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    source = torch.randn(16 * 2**20)
    target = torch.empty_like(source)
    logits = torch.randn(2**16)
    out = torch.empty_like(logits)
    return Peaks(
        flops=2 * 1024**3 / _best_seconds(lambda: torch.mm(a, b)),
        bytes=2 * source.nbytes / _best_seconds(lambda: target.copy_(source)),
        exps=logits.numel() / _best_seconds(lambda: torch.exp(logits, out=out)),
    )


@cache
def measured_gpu_peaks(index: int, dtype: torch.dtype = torch.bfloat16) -> Peaks:
    """Measure a GPU: a product of 8192 x 8192 matrices for FLOPs, a copy of 1 GiB for bytes (read and written counted).

    Exponentials are computed, not measured: multiprocessors times `_EXPS_PER_CLOCK` times the clock that the driver
    reports. PyTorch's exp waits for memory on a GPU and would understate them.
    """
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return Peaks(
            flops=2 * 8192**3 / _best_seconds(lambda: torch.mm(a, b, out=product), on_gpu=True),
            bytes=2 * source.nbytes / _best_seconds(lambda: target.copy_(source), on_gpu=True),
            # the clock is in kilohertz
            exps=properties.multi_processor_count * _EXPS_PER_CLOCK * properties.clock_rate * 1e3,
        )


def _best_seconds(call: Callable[[], object], *, repeats: int = 15, on_gpu: bool = False) -> float:
    """Least time of `repeats` calls; stops early, after 3 at least, once they have taken 0.3 s together."""
    call()
    best, first = float("inf"), time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - first > 0.3:
            break
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            # elapsed_time is in milliseconds
            best = min(best, start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best
