"""Profile one operator call: the time of each part, and how close it comes to the device's limit.

    python -m mixkernels.profile candidate_attention --n 100000 --k 1 --m 64 --trace trace.json

On a CPU PyTorch's profiler times the ATen operators in the call, each with the bytes and FLOPs of its arguments; on a
GPU it times the kernels, on inputs that rotate so that none is in cache. The whole call is timed without a profiler and
compared with `mixkernels.roofline`. Also prints the commands that run NVIDIA's and Triton's profilers on the same call.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

import mixkernels
from mixkernels.devices import Peaks, device_peaks
from mixkernels.dispatch import BACKENDS, select_backend
from mixkernels.errors import MixKernelsError
from mixkernels.explanation import duration, quantity
from mixkernels.roofline import (
    Cost,
    candidate_attention_backward_cost,
    candidate_attention_cost,
    gate_layer_norm_cost,
    residual_layer_norm_cost,
    score_candidates_cost,
)
from mixkernels.work_counter import Work, WorkCounter

OPERATORS = ("candidate_attention", "residual_layer_norm", "gate_layer_norm", "score_candidates")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_CANDIDATES = {"cpu": 1000, "cuda": 100_000}

_MARK = "mixkernels.profile: one call"
_MOST_INPUT_SETS = 64
_ROWS_SHOWN = 12


class Workload(NamedTuple):
    """One operator call of a given size, ready to run."""

    inputs: list[tuple[Tensor, ...]]
    """Sets of inputs of the same shapes; calls take them in turn."""
    run: Callable[..., object]
    """Makes the call on one set of inputs."""
    cost: Cost
    kernel_costs: dict[str, Cost]
    """Least work of single kernels, by the beginning of the kernel's name."""
    backend: str
    description: str


class Row(NamedTuple):
    """One line of the table, for one call of the operator."""

    name: str
    calls: float
    seconds: float
    bytes: int | None
    flops: int | None

    def fraction_of_limit(self, peaks: Peaks) -> float | None:
        """Least time for these bytes and FLOPs divided by the time taken; None if neither is known."""
        if not self.seconds or (not self.bytes and not self.flops):
            return None
        return max((self.bytes or 0) / peaks.bytes, (self.flops or 0) / peaks.flops) / self.seconds


# -- the call ----------------------------------------------------------------------------------------------------------


def _workload(options: argparse.Namespace, device: torch.device) -> Workload:
    """Build the call that the command line asks for, on random inputs."""
    n, k, m, heads, dim, batch = (getattr(options, name) for name in ("n", "k", "m", "heads", "head_dim", "batch"))
    dtype, width = DTYPES[options.dtype], heads * dim
    sizes = f"B={batch} N={n} k={k}"
    # shapes of the floating inputs, in the order of the operator's arguments
    if options.operator == "candidate_attention":
        context, keys = (n, k, heads, dim), (batch, m, heads, dim)
        shapes = [context, context, context, (n, heads, dim), keys, keys]
        sizes += f" m={m} H={heads} D={dim}"
        arguments = (n, k, m, heads, dim, dtype)
        # a forward pass before a backward pass also writes its log-sum-exps
        cost = candidate_attention_cost(*arguments, batch=batch, return_lse=options.backward)
        kernel_costs = {"candidate_attention_fwd": cost}
        if options.backward:
            cost = cost.and_then(candidate_attention_backward_cost(*arguments, batch=batch))
    else:
        rows = (batch, n * (k + 1), width)
        shapes = {
            "residual_layer_norm": [rows, rows],
            "gate_layer_norm": [(batch, n, width)] * 3,
            "score_candidates": [(batch, n, k, width)] * 2 + [(batch, n, width)] * 2,
        }[options.operator]
        shapes += [(width,), (width,)]
        sizes += f" d={width}"
        if options.operator == "residual_layer_norm":
            cost = residual_layer_norm_cost(batch * n * (k + 1), width, dtype)
        elif options.operator == "gate_layer_norm":
            cost = gate_layer_norm_cost(batch * n, width, dtype)
        else:
            cost = score_candidates_cost(n, k, width, dtype, batch=batch, top_k=options.top_k)
        kernel_costs = {f"{options.operator}_fwd": cost}
    operator = getattr(mixkernels, options.operator)
    keywords: dict[str, Any] = {"backend": options.backend}
    if options.operator == "score_candidates":
        keywords["top_k"] = options.top_k
        sizes += "" if options.top_k is None else f" top_k={options.top_k}"

    one_set = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    sets = 1
    if device.type == "cuda":
        # at least twice the last-level cache is read before a set comes round again
        sets = input_sets(one_set, torch.cuda.get_device_properties(device).L2_cache_size)
    torch.manual_seed(0)
    inputs = [
        tuple(torch.randn(shape, device=device, dtype=dtype).requires_grad_(options.backward) for shape in shapes)
        for _ in range(sets)
    ]
    backend = select_backend(options.backend, *inputs[0], operator=options.operator)

    def forward(*tensors: Tensor) -> object:
        return operator(*tensors, **keywords)

    if not options.backward:
        run = forward
    else:
        gradients = [torch.randn_like(out) for out in _floating(forward(*inputs[0]))]

        def run(*tensors: Tensor) -> object:
            return torch.autograd.grad(_floating(forward(*tensors)), tensors, gradients)

    description = f"{options.operator}{', forward and backward' if options.backward else ''}, {sizes}, {options.dtype}"
    return Workload(inputs, run, cost, kernel_costs, backend, description)


def input_sets(set_bytes: int, cache_bytes: int) -> int:
    """Number of input sets to rotate so that none is still in a cache; one is enough if it is large."""
    if set_bytes >= 2 * cache_bytes:
        return 1
    return min(_MOST_INPUT_SETS, 1 + -(-2 * cache_bytes // set_bytes))


def _floating(result: object) -> list[Tensor]:
    """Return the differentiable tensors of a result."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, Tensor) and part.requires_grad]


# -- timing ------------------------------------------------------------------------------------------------------------


def median_seconds(workload: Workload, device: torch.device, repeats: int) -> float:
    """Median time of the call without a profiler; on a GPU between events, on rotating inputs."""
    times = []
    for turn in range(repeats + 1):
        tensors = workload.inputs[turn % len(workload.inputs)]
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            workload.run(*tensors)
            end.record()
            end.synchronize()
            # elapsed_time is in milliseconds
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            workload.run(*tensors)
            times.append(time.perf_counter() - begin)
    # the first call compiles and warms up
    return median(times[1:])


def profiled(workload: Workload, device: torch.device, repeats: int) -> torch.profiler.profile:
    """Profile `repeats` calls, each under its own mark."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for turn in range(repeats):
            with record_function(_MARK):
                workload.run(*workload.inputs[turn % len(workload.inputs)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profiler


# -- rows of the table -------------------------------------------------------------------------------------------------


def operator_rows(events: Iterable[Any], work: dict[str, Work]) -> list[Row]:
    """Rows of a CPU profile: the time of each ATen operator within a call, longest first.

    An operator in `work` gets the time of everything it calls; any other gets only its own time, without bytes and
    FLOPs. So the rows add up to the call.
    """
    calls = [event for event in events if event.name == _MARK]
    times, runs = defaultdict(lambda: [0.0] * len(calls)), defaultdict(int)

    def visit(event: Any, number: int) -> None:
        known = event.name in work
        # the profiler's times are in microseconds
        times[event.name][number] += (event.cpu_time_total if known else event.self_cpu_time_total) * 1e-6
        runs[event.name] += 1
        for child in () if known else event.cpu_children:
            visit(child, number)

    for number, call in enumerate(calls):
        times["(Python)"][number] += call.self_cpu_time_total * 1e-6
        runs["(Python)"] += 1
        for child in call.cpu_children:
            visit(child, number)
    unknown = Work(0, None)
    rows = [
        Row(name, runs[name] / len(calls), median(taken), *work.get(name, unknown)) for name, taken in times.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def kernel_rows(kernels: Iterable[tuple[str, float]], repeats: int, costs: dict[str, Cost]) -> list[Row]:
    """Rows of a GPU profile, longest first.

    Args:
        kernels: (name, seconds) of every kernel launch of all repeats, in the order of their starts.
        repeats: how often the call was made.
        costs: least work of kernels, by the beginning of their names.
    """
    times = defaultdict(list)
    for name, seconds in kernels:
        times[name].append(seconds)
    rows = []
    for name, taken in times.items():
        share, rest = divmod(len(taken), repeats)
        # launches that do not divide by the calls cannot be assigned to them: take the mean
        seconds = (
            sum(taken) / repeats if rest else median(sum(taken[i * share : (i + 1) * share]) for i in range(repeats))
        )
        cost = next((cost for start, cost in costs.items() if name.startswith(start)), None)
        figures = (None, None) if cost is None else (cost.bytes, cost.flops)
        rows.append(Row(name, len(taken) / repeats, seconds, *figures))
    return sorted(rows, key=lambda row: -row.seconds)


def _kernels(profiler: torch.profiler.profile) -> list[tuple[str, float]]:
    """Kernels and copies of a GPU profile in the order of their starts, in seconds."""
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != _MARK
    ]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() * 1e-6) for event in events]


# -- output ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], peaks: Peaks) -> list[str]:
    """Lines of the table; rows after the longest few are summed in one line."""
    shown, rest = list(rows[:_ROWS_SHOWN]), rows[_ROWS_SHOWN:]
    if rest:
        names = f"({len(rest)} more)"
        shown.append(Row(names, sum(r.calls for r in rest), sum(r.seconds for r in rest), None, None))
    cells = [("operator or kernel", "runs", "time", "bytes", "FLOPs", "of limit")]
    for row in shown:
        fraction = row.fraction_of_limit(peaks)
        cells.append(
            (
                row.name if len(row.name) <= 60 else row.name[:57] + "...",
                f"{row.calls:.3g}",
                duration(row.seconds),
                quantity(row.bytes, "B") if row.bytes else "-",
                quantity(row.flops, "FLOP") if row.flops else "-",
                "-" if fraction is None else f"{fraction:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace, whole or not at all; a name that ends in .gz is compressed."""
    suffix = ".json.gz" if path.suffix == ".gz" else ".json"
    handle, name = tempfile.mkstemp(prefix=".trace-", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        profiler.export_chrome_trace(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def foreign_commands(options: argparse.Namespace) -> list[str]:
    """Command lines that run NVIDIA's Nsight Compute and Triton's proton on the same call, on a GPU."""
    arguments = [options.operator]
    for name in ("n", "k", "m", "heads", "head_dim", "dtype", "batch", "top_k"):
        value = getattr(options, name)
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    arguments += ["--device", "cuda", "--backend", options.backend, "--repeats", "3", "--bare"]
    arguments += ["--backward"] if options.backward else []
    line = shlex.join(arguments)
    # proton runs a file by its path
    file = "\"$(python -c 'import mixkernels.profile as p; print(p.__file__)')\""
    return [
        f"ncu --set full --kernel-name regex:{options.operator} --launch-skip 1 --launch-count 3 -o {options.operator} "
        f"python -m mixkernels.profile {line}",
        f"python -m triton.profiler.proton --name {options.operator} --hook triton {file} {line}",
        f"proton-viewer --metrics time/us,gbyte/s {options.operator}.hatchet",
    ]


# -- command line ------------------------------------------------------------------------------------------------------


def positive_integer(text: str) -> int:
    """Read an argument that must be 1 or more; argparse shows this function's name in errors."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixkernels.profile",
        description="Profile one operator call: time, bytes, FLOPs and the fraction of the device's limit.",
    )
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--n", type=positive_integer, help="candidates (default: 1000 on a CPU, 100000 on a GPU)")
    parser.add_argument("--k", type=positive_integer, default=1, help="context embeddings a candidate (default: 1)")
    parser.add_argument(
        "--m", type=positive_integer, default=64, help="tokens of the query, only for candidate_attention (default: 64)"
    )
    parser.add_argument("--heads", type=positive_integer, default=12, help="heads; d is heads x head-dim (default: 12)")
    parser.add_argument("--head-dim", type=positive_integer, default=64, help="(default: 64)")
    parser.add_argument("--batch", type=positive_integer, default=1, help="queries (default: 1)")
    parser.add_argument(
        "--top-k", type=positive_integer, help="only for score_candidates: how many to keep (default: all scores)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER (default: auto)")
    parser.add_argument("--backend", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--backward", action="store_true", help="only for candidate_attention: gradients too")
    parser.add_argument(
        "--repeats", type=positive_integer, default=20, help="timed calls; the median is shown (default: 20)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace, .json or .json.gz")
    parser.add_argument(
        "--measured-peaks", action="store_true", help="measure the device's peaks even if its data sheet is known"
    )
    parser.add_argument("--bare", action="store_true", help="only make the calls, for an external profiler")
    return parser


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device {name} is not auto, cpu, cuda or cuda:NUMBER")
    if device.type not in DEFAULT_CANDIDATES:
        parser.error(f"--device {name} is not auto, cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s) that PyTorch sees")
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0; exits with 2 and a message if the call cannot be made."""
    # otherwise PyTorch's profiler logs its own starts and stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    parser = _parser()
    options = parser.parse_args(arguments)
    device = _device(parser, options.device)
    options.n = options.n or DEFAULT_CANDIDATES[device.type]
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if options.backward and options.operator != "candidate_attention":
        parser.error("--backward is for candidate_attention")
    if options.top_k is not None and options.operator != "score_candidates":
        parser.error("--top-k is for score_candidates")
    if options.trace is not None and not options.trace.parent.is_dir():
        parser.error(f"--trace {options.trace}: there is no folder {options.trace.parent}")
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if not options.backward:
            stack.enter_context(torch.inference_mode())
        try:
            workload = _workload(options, device)
            seconds = median_seconds(workload, device, options.repeats)
        except MixKernelsError as error:
            parser.error(str(error))
        except torch.OutOfMemoryError:
            parser.error(f"--n {options.n}: the call does not fit in the memory of {device}")
        if options.bare:
            return 0
        tf32 = workload.backend != "triton" and torch.get_float32_matmul_precision() != "highest"
        peaks, source = device_peaks(device, DTYPES[options.dtype], tf32=tf32, measured=options.measured_peaks)
        profiler = profiled(workload, device, options.repeats)
        if device.type == "cuda":
            rows = kernel_rows(_kernels(profiler), options.repeats, workload.kernel_costs)
        else:
            with WorkCounter() as counter:
                workload.run(*workload.inputs[0])
            rows = operator_rows(profiler.events() or (), counter.work)
    cost = workload.cost
    print(f"{workload.description}, backend {workload.backend}")
    print(f"on {source}: {_rates(peaks)}\n")
    print("\n".join(table(rows, peaks)))
    if any((row.fraction_of_limit(peaks) or 0.0) > 1.0 for row in rows):
        print("above 100%: the operator found its data in cache; the limit counts memory")
    least = cost.seconds(peaks)
    print(
        f"\nwhole call {duration(seconds)}, unprofiled median of {options.repeats}: {least / seconds:.0%} of the limit"
    )
    work = f"{quantity(cost.bytes, 'B')} and compute {quantity(cost.flops, 'FLOP')} and {quantity(cost.exps, 'exp')}"
    print(f"it must move {work},")
    print(f"which takes at least {duration(least)}, bound by {cost.bound(peaks)}")
    if options.trace is not None:
        write_trace(profiler, options.trace)
        print(f"\ntrace in {options.trace}; open it at https://ui.perfetto.dev or chrome://tracing")
    print("\nthe same call under other profilers, on a GPU:")
    for command in foreign_commands(options):
        print(f"  {command}")
    return 0


def _rates(peaks: Peaks) -> str:
    return f"{quantity(peaks.bytes, 'B/s')}, {quantity(peaks.flops, 'FLOP/s')}, {quantity(peaks.exps, 'exp/s')}"


if __name__ == "__main__":
    sys.exit(main())
