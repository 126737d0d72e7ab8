"""Records of the GPU benchmark, and the targets of design.md section 7.

A record is a dictionary that is written as JSON; it always has `RECORD_KEYS`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measuring.gpu_timing import Timing
from benchmarks.measuring.provenance import Record, clocks, commit, versions
from mixkernels.devices import device_peaks, measured_gpu_peaks
from mixkernels.roofline import Cost, Peaks

RECORD_KEYS = (
    "operator",
    "backend",
    "shape",
    "dtype",
    "device",
    "bytes",
    "flops",
    "exps",
    "seconds",
    "spread",
    "samples",
    "host_seconds",
    "tflops",
    "bound",
    "fraction_of_limit",
    "memory_fraction",
    "fraction_of_measured",
    "peak_bytes",
    "output_bytes",
    "error",
    "rival",
    "ratio",
    "ratios",
    "versions",
    "commit",
    "provenance",
)


class Machine(NamedTuple):
    """The device of a run, its peak rates, and the provenance of the run."""

    device: torch.device
    name: str
    peaks: Callable[[torch.dtype], tuple[Peaks, str]]
    """Takes a dtype; returns peaks of the data sheet, and where they come from."""
    measured: Peaks
    """Peaks measured with a large product in bfloat16 and a large copy."""
    versions: dict[str, str]
    commit: str
    provenance: dict[str, str]


def provenance(arguments: Sequence[str]) -> dict[str, str]:
    """Command and time of a run."""
    return {
        "command": " ".join(["python -m benchmarks.gpu", *arguments]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "timing": "CUDA events, device ahead of host, rotating inputs, medians of interleaved rounds",
    }


def machine_at_hand(arguments: Sequence[str], at_commit: str | None) -> Machine:
    """Describe the current GPU, warmed up by measuring its peaks."""
    device = torch.device("cuda", torch.cuda.current_device())
    measured = measured_gpu_peaks(device.index, torch.bfloat16)
    # at the clocks of a busy GPU
    found = ", ".join(f"{name} {value}" for name, value in clocks().items())
    return Machine(
        device,
        torch.cuda.get_device_name(device),
        lambda dtype: device_peaks(device, dtype),
        measured,
        versions(),
        at_commit or commit(),
        provenance(arguments) | {"clocks": found or "unknown"},
    )


def group_records(
    machine: Machine,
    timings: Mapping[str, Timing],
    *,
    operator: str,
    own: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    cost: Cost,
    peaks_of: Mapping[str, int],
    output_bytes: int,
    errors: Mapping[str, float],
) -> list[Record]:
    """Make one record for every contender of a group, timed at one shape in one run.

    Args:
        machine: the device of the run.
        timings: of every contender.
        operator: what was computed.
        own: name of this library's contender; all others are rivals.
        shape, dtype, cost: of the group.
        peaks_of: peak of allocated bytes by contender.
        output_bytes: of the result.
        errors: relative distance from the float64 reference, by contender.
    """
    peaks, source = machine.peaks(dtype)
    measured = peaks._replace(bytes=machine.measured.bytes)
    if dtype in (torch.bfloat16, torch.float16):
        measured = measured._replace(flops=machine.measured.flops)
    rivals = {name: timing.seconds for name, timing in timings.items() if name != own}
    rival = min(rivals, key=rivals.__getitem__) if rivals else None
    records = []
    for name, timing in timings.items():
        seconds = timing.seconds
        values = (
            operator,
            name,
            shape,
            str(dtype).removeprefix("torch."),
            machine.name,
            cost.bytes,
            cost.flops,
            cost.exps,
            seconds,
            round(timing.spread, 4),
            timing.samples,
            timing.host_seconds,
            cost.flops / seconds / 1e12,
            cost.bound(peaks),
            cost.seconds(peaks) / seconds,
            cost.bytes / peaks.bytes / seconds,
            cost.seconds(measured) / seconds,
            peaks_of.get(name),
            output_bytes,
            errors.get(name),
            rival,
            rivals[rival] / seconds if rival else None,
            {other: time / seconds for other, time in rivals.items()} if name == own else {},
            machine.versions,
            machine.commit,
            machine.provenance | {"peaks": source},
        )
        records.append(dict(zip(RECORD_KEYS, values, strict=True)))
    return records


def read_records(folder: Path) -> list[Record]:
    """All records of a folder of results."""
    return [
        record
        for path in sorted(folder.glob("gpu_*.json"))
        for record in json.loads(path.read_text(encoding="utf-8")).get("records", [])
    ]


# -- targets -----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """One claim of design.md section 7, and what was measured."""

    claim: str
    goal: float
    stretch: float | None
    value: float | None
    """The worst measured value, None if there is none."""
    unit: str
    where: str
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Say whether the target is reached."""
        if self.value is None:
            return "not measured"

        def met(bound: float) -> bool:
            return self.value <= bound if self.at_most else self.value >= bound

        if not met(self.goal):
            return "MISSED"
        return "reached, stretch too" if self.stretch is not None and met(self.stretch) else "reached"


_ROUNDING = 2 * 2**20
"""Bytes by which the allocator may round up all outputs of a call together."""


def targets(records: Iterable[Record]) -> list[Target]:
    """Section 7's targets for an H100, each with the worst record that it covers.

    Targets cover this library's bfloat16 records at k = 1; of `candidate_attention`, those with N of 1e5 or more.
    """
    everything = list(records)
    own = [
        record
        for record in everything
        if record["backend"] == "triton" and record["dtype"] == "bfloat16" and record["shape"].get("k", 1) == 1
    ]
    large = [r for r in own if r["operator"] == "candidate_attention" and r["shape"]["N"] >= 100_000]
    wide = [r for r in large if r["shape"]["D"] == 64]
    short = [r for r in wide if r["shape"]["m"] <= 128]
    long = [r for r in wide if r["shape"]["m"] == 512]
    narrow = [r for r in large if r["shape"]["D"] == 32 and r["shape"]["m"] == 128]
    backward = [r for r in own if r["operator"] == "candidate_attention backward" and r["shape"]["m"] == 512]
    host = [r for r in own if r["operator"] == "host: candidate_attention"]
    graph_replay = [r for r in own if r["operator"] == "host: replayed graph"]

    def ratio_to(belongs: Callable[[str], bool]) -> Callable[[Record], float | None]:
        return lambda record: min((r for name, r in record["ratios"].items() if belongs(name)), default=None)

    def is_compiled(name: str) -> bool:
        return name.endswith("-compiled") or name.startswith("flashinfer")

    def is_eager_two_pass(name: str) -> bool:
        return name.startswith("two-pass") and not is_compiled(name)

    def workspace(record: Record) -> float | None:
        if record["peak_bytes"] is None:
            return None
        return max(record["peak_bytes"] - record["output_bytes"] - _ROUNDING, 0) / 2**20

    def memory(record: Record) -> float:
        return record["memory_fraction"]

    def speed(record: Record) -> float:
        return record["tflops"]

    def microseconds(record: Record) -> float:
        return record["host_seconds"] * 1e6

    return [
        _worst("of memory peak, D=64, m<=128, N>=1e5", 0.8, None, "", short, memory),
        _worst("of memory peak, D=32, m=128, N>=1e5", 0.6, None, "", narrow, memory),
        _worst("forward at m=512, D=64", 340, 400, "TFLOP/s", long, speed),
        _worst("backward at m=512, D=64", 200, 280, "TFLOP/s", backward, speed),
        _worst("times the best compiled rival, D=64", 1.3, None, "x", wide, ratio_to(is_compiled)),
        _worst("times the best eager two-pass, D=64", 3, None, "x", wide, ratio_to(is_eager_two_pass)),
        _worst("times SDPA expanded, D=64", 20, None, "x", wide, ratio_to(lambda name: name == "sdpa-expanded")),
        _worst("forward workspace", 0, None, "MiB", large, workspace, at_most=True),
        _worst("host cost of one operator call", 30, 15, "us", host, microseconds, at_most=True),
        _worst("host cost of a replayed graph", 5, None, "us", graph_replay, microseconds, at_most=True),
    ]


def _worst(
    claim: str,
    goal: float,
    stretch: float | None,
    unit: str,
    records: list[Record],
    measure: Callable[[Record], float | None],
    *,
    at_most: bool = False,
) -> Target:
    measured = [(value, record["shape"]) for record in records if (value := measure(record)) is not None]
    if not measured:
        return Target(claim, goal, stretch, None, unit, "", at_most)
    value, shape = (max if at_most else min)(measured, key=lambda pair: pair[0])
    where = " ".join(f"{name}={size}" for name, size in shape.items() if name in ("N", "m", "D"))
    return Target(claim, goal, stretch, value, unit, where, at_most)


def target_table(found: Sequence[Target]) -> list[str]:
    """Lines of the table of targets."""
    cells = [("target", "goal", "stretch", "worst", "at", "verdict")]
    for target in found:
        sign = "<=" if target.at_most else ">="

        def shown(number: float | None, unit: str = target.unit) -> str:
            return "-" if number is None else f"{number:.3g} {unit}".strip()

        cells.append(
            (
                target.claim,
                f"{sign} {shown(target.goal)}",
                shown(target.stretch),
                shown(target.value),
                target.where or "-",
                target.verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
