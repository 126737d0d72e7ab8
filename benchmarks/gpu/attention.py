"""Measuring for the GPU benchmark, and its groups of candidate attention: attention, grid and training.

A group takes a `Bench` and rewrites its file after every shape, so that an interrupted run loses one shape at most. A
contender that is wrong, unsupported or out of memory is recorded as skipped, with the reason. For tests everything also
runs on a CPU, at tiny shapes.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.backward_rivals import one_call_rivals, training_rivals
from benchmarks.gpu.formulations import (
    BATCH_RIVALS,
    GRID_LIMIT,
    Batch,
    Call,
    Prepare,
    UnavailableError,
    compiled_rivals,
    eager_rivals,
    einsum_batch,
    expanded_bytes,
    ours,
    ours_batch,
)
from benchmarks.gpu.records import Machine, group_records
from benchmarks.measuring.formulations import Inputs
from benchmarks.measuring.gpu_timing import Timing, interleaved_timings, peak_bytes_of, reason
from benchmarks.measuring.noise import measure_until_quiet, noise
from benchmarks.measuring.provenance import Record, write_json
from mixkernels.profile import input_sets
from mixkernels.roofline import (
    Cost,
    candidate_attention_backward_cost,
    candidate_attention_cost,
)

HEADS = 12
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative distance from the float64 reference beyond which a contender counts as wrong and is not timed."""

_CHECKED = 64
LONGEST_EXPANSION = {"attention": 0.6, "grid": 0.25}
"""By group: if a call over expanded keys takes more seconds than this by a lower bound, it is left out."""
LARGEST_SPREAD = 0.25
"""Largest spread of a record; on a quiet H200 it is 0.013 at most."""
EAGER_SECONDS, COMPILED_SECONDS = 15.0, 75.0
"""Seconds that must be left to begin a shape, without and with compiled contenders."""


class Shape(NamedTuple):
    """Sizes of one attention call."""

    n: int
    k: int
    m: int
    d: int
    h: int = HEADS
    batch: int = 1

    def names(self) -> dict[str, int]:
        """Return the sizes as a record names them."""
        return {"B": self.batch, "N": self.n, "k": self.k, "m": self.m, "H": self.h, "D": self.d}

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.names().items())


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

KEY_SHAPES: tuple[tuple[Shape, torch.dtype], ...] = (
    (Shape(100_000, 1, 64, 64), BF16),
    (Shape(100_000, 1, 128, 64), BF16),
    (Shape(100_000, 1, 512, 64), BF16),
    (Shape(100_000, 1, 128, 32), BF16),
    (Shape(1_000_000, 1, 64, 64), BF16),
    (Shape(100_000, 1, 16, 64), BF16),
    (Shape(1000, 1, 64, 64), BF16),
    (Shape(100_000, 3, 64, 64), BF16),
    (Shape(100_000, 1, 64, 64), FP16),
    (Shape(100_000, 1, 64, 64), FP32),
    (Shape(10_000, 1, 64, 64), BF16),
    (Shape(100_000, 10, 64, 64), BF16),
    (Shape(1_000_000, 1, 128, 64), BF16),
    (Shape(100_000, 1, 64, 32), BF16),
    (Shape(1_000_000, 1, 512, 64), BF16),
    (Shape(1000, 1, 64, 64), FP32),
)
"""Shapes compared with every rival, compiled ones too; the most important first."""

QUICK = 4
"""Key shapes of a quick run."""

GRID = tuple(
    Shape(n, k, m, d) for n, d, k, m in product((10**5, 10**6, 10**3, 10**4), (64, 32), (1, 3, 10), (16, 64, 128, 512))
)
"""Every shape of design.md section 7; the run of the grid leaves out those in `KEY_SHAPES`."""


@dataclass
class Bench:
    """Settings of a run: machine, backend, time limits, and the folder for its files."""

    machine: Machine
    backend: str
    folder: Path
    deadline: float = float("inf")
    """End of the run, in seconds of time.monotonic."""
    seconds: float = 0.3
    """Rough time to spend on each contender of a shape."""
    quick: bool = False
    largest_spread: float = LARGEST_SPREAD

    @property
    def device(self) -> torch.device:
        """Return the device."""
        return self.machine.device

    def left(self) -> float:
        """Seconds until the run must end."""
        return self.deadline - time.monotonic()

    def sets(self, set_bytes: int) -> int:
        """Number of input sets to rotate so that none is in cache."""
        if self.device.type != "cuda":
            return 1
        return input_sets(set_bytes, torch.cuda.get_device_properties(self.device).L2_cache_size)


@dataclass
class Group:
    """Records of one file."""

    name: str
    bench: Bench
    records: list[Record] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, operator: str, shape: Mapping[str, int], dtype: torch.dtype, backend: str, why: str) -> None:
        """Add a contender that has no record, and why."""
        dtype_name = str(dtype).removeprefix("torch.")
        entry = {"operator": operator, "shape": dict(shape), "dtype": dtype_name, "backend": backend, "reason": why}
        self.skipped.append(entry)

    def save(self, *, complete: bool) -> None:
        """Write the file."""
        machine = self.bench.machine
        write_json(
            self.bench.folder / f"gpu_{self.name}.json",
            {
                "group": self.name,
                "device": machine.name,
                "complete": complete,
                "measured_peaks": machine.measured._asdict(),
                "versions": machine.versions,
                "commit": machine.commit,
                "provenance": machine.provenance,
                "records": self.records,
                "skipped": self.skipped,
            },
        )

    def has_time(self, seconds: float, operator: str, shape: Mapping[str, int], dtype: torch.dtype) -> bool:
        """Whether `seconds` are left; if not, record the shape as skipped."""
        if self.bench.left() >= seconds:
            return True
        self.skip(operator, shape, dtype, "all", "the run's time was over")
        return False


class Workload(NamedTuple):
    """One operator at one shape: contenders, inputs, cost and the check of results."""

    operator: str
    shape: dict[str, int]
    dtype: torch.dtype
    cost: Cost
    contenders: Mapping[str, Callable[[Any], Call]]
    """By name, a function that makes the timed call for one set of inputs."""
    inputs: Sequence[Any]
    """Sets of inputs."""
    error_of: Callable[[Any, Any], float]
    """Relative distance of a result for a set of inputs from the reference."""


def measure(group: Group, work: Workload) -> None:
    """Check every contender, time the correct ones side by side, and write the group's file."""
    bench = group.bench
    checked: dict[str, _Checked] = {}
    for name, prepare in work.contenders.items():
        try:
            checked[name] = _checked(work, prepare, bench.device)
        except UnavailableError as why:
            group.skip(work.operator, work.shape, work.dtype, name, str(why))
        except Exception as error:
            group.skip(work.operator, work.shape, work.dtype, name, reason(error))
        free()
    calls = {name: contender.calls for name, contender in checked.items()}
    peaks, _ = bench.machine.peaks(work.dtype)

    def noise_of(found: tuple[dict[str, Timing], dict[str, str]]) -> dict[str, str]:
        judged = {
            name: noise(timing.spread, work.cost.seconds(peaks) / timing.seconds, largest=bench.largest_spread)
            for name, timing in found[0].items()
        }
        return {name: why for name, why in judged.items() if why}

    (timings, failures), refused = measure_until_quiet(
        lambda: interleaved_timings(calls, bench.device, seconds=bench.seconds), noise_of
    )
    timings = {name: timing for name, timing in timings.items() if name not in refused}
    for name, why in (failures | refused).items():
        group.skip(work.operator, work.shape, work.dtype, name, why)
    if bench.backend in timings:
        found = group_records(
            bench.machine,
            timings,
            operator=work.operator,
            own=bench.backend,
            shape=work.shape,
            dtype=work.dtype,
            cost=work.cost,
            peaks_of={name: contender.peak_bytes for name, contender in checked.items()},
            output_bytes=checked[bench.backend].output_bytes,
            errors={name: contender.error for name, contender in checked.items()},
        )
        group.records += found
        print(_line(found, bench.backend), flush=True)
    else:
        why = next((entry["reason"] for entry in reversed(group.skipped) if entry["backend"] == bench.backend), "?")
        print(f"{work.operator} {_sizes(work.shape)}: {bench.backend} did not run: {why}", flush=True)
    group.save(complete=False)


class _Checked(NamedTuple):
    """A contender whose result is correct."""

    calls: list[Call]
    error: float
    output_bytes: int
    peak_bytes: int


def _checked(work: Workload, prepare: Callable[[Any], Call], device: torch.device) -> _Checked:
    """Prepare a contender and compare it with the reference."""
    calls = [prepare(inputs) for inputs in work.inputs]
    result = calls[0]()
    error, output_bytes = work.error_of(result, work.inputs[0]), _bytes_of(result)
    # written so that NaN counts as wrong
    if not error <= LARGEST_ERROR[work.dtype]:
        raise UnavailableError(f"wrong: off by {error:.2g}, allowed are {LARGEST_ERROR[work.dtype]:.2g}")
    del result
    return _Checked(calls, error, output_bytes, peak_bytes_of(calls[0], device))


def _bytes_of(result: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (result if isinstance(result, tuple) else (result,)))


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sizes(shape: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def _line(records: Sequence[Record], own: str) -> str:
    record = next(record for record in records if record["backend"] == own)
    best = f"{record['ratio']:.2f}x {record['rival']}" if record["rival"] else "no rival"
    return (
        f"{record['operator']} {_sizes(record['shape'])} {record['dtype']}: {record['seconds'] * 1e6:.1f} us, "
        f"{record['fraction_of_measured']:.0%} of the measured limit ({record['bound']}), "
        f"{record['tflops']:.1f} TFLOP/s, {best}"
    )


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative Frobenius distance over pairs of tensors."""
    distances = [
        ((got.double() - want.double()).norm() / want.double().norm()).item()
        for got, want in zip(found, wanted, strict=True)
    ]
    # max would ignore a NaN that does not come first
    return max(distances) if all(distance == distance for distance in distances) else float("nan")


# -- candidate attention -----------------------------------------------------------------------------------------------


def attention_error(result: tuple[Tensor, Tensor], inputs: Inputs) -> float:
    """Distance of a result's first and last candidates from the float64 reference."""
    n = len(inputs.context_query)
    parts = [(0, min(_CHECKED, n)), (max(n - _CHECKED, 0), n)]
    errors = []
    for start, stop in parts:
        exact = Inputs(*(tensor.double() for tensor in vars(inputs.rows(start, stop)).values()))
        errors.append(relative_error([part[start:stop] for part in result], ours(exact, "reference")))
    return max(errors) if errors[0] == errors[0] and errors[1] == errors[1] else float("nan")


def attention_workload(bench: Bench, shape: Shape, dtype: torch.dtype, rivals: Mapping[str, Prepare]) -> Workload:
    """Candidate attention of one query against rivals."""
    cost = candidate_attention_cost(shape.n, shape.k, shape.m, shape.h, shape.d, dtype)
    count = bench.sets(cost.bytes)
    inputs = [
        Inputs.random(shape.n, shape.k, shape.m, shape.h, shape.d, dtype, str(bench.device)) for _ in range(count)
    ]
    own: dict[str, Prepare] = {bench.backend: lambda one_set: partial(ours, one_set, bench.backend)}
    return Workload("candidate_attention", shape.names(), dtype, cost, own | dict(rivals), inputs, attention_error)


def attention(bench: Bench, shapes: Sequence[tuple[Shape, torch.dtype]] = KEY_SHAPES) -> list[Record]:
    """Time the key shapes against every rival, compiled ones too."""
    group = Group("attention", bench)
    for shape, dtype in shapes[:QUICK] if bench.quick else shapes:
        if group.has_time(COMPILED_SECONDS, "candidate_attention", shape.names(), dtype):
            # compile again for every shape: after a few recompilations dynamo falls back to eager silently
            torch.compiler.reset()
            _attention_shape(group, shape, dtype, _all_rivals())
    group.save(complete=True)
    return group.records


def _all_rivals() -> dict[str, Prepare]:
    return _affordable(eager_rivals(), "attention") | compiled_rivals() | one_call_rivals()


def grid(bench: Bench, shapes: Sequence[Shape] = GRID) -> list[Record]:
    """Time all other shapes of section 7 in bfloat16 against rivals that need no compiler."""
    group = Group("grid", bench)
    known = {shape for shape, dtype in KEY_SHAPES if dtype == BF16}
    rivals = _affordable(eager_rivals(), "grid")
    del rivals["sdpa-pre-expanded"]
    for shape in shapes:
        if shape not in known and group.has_time(EAGER_SECONDS, "candidate_attention", shape.names(), BF16):
            _attention_shape(group, shape, BF16, rivals)
    group.save(complete=True)
    return group.records


def _attention_shape(group: Group, shape: Shape, dtype: torch.dtype, rivals: Mapping[str, Prepare]) -> None:
    with torch.no_grad():
        try:
            work = attention_workload(group.bench, shape, dtype, rivals)
        except torch.OutOfMemoryError as error:
            group.skip("candidate_attention", shape.names(), dtype, "all", f"inputs: {reason(error)}")
            free()
            return
        measure(group, work)


def _affordable(rivals: dict[str, Prepare], group: str) -> dict[str, Prepare]:
    """Return the rivals with a check that an expansion does not take too long to be repeated."""
    prepare, most = rivals["sdpa-expanded"], LONGEST_EXPANSION[group]

    def checked(inputs: Inputs) -> Call:
        # written, then read; 3 TB/s is about the best rate of a copy
        seconds = 2 * expanded_bytes(inputs) / 3e12
        if seconds > most:
            raise UnavailableError(f"would take {seconds:.1f} s a call at least")
        return prepare(inputs)

    return rivals | {"sdpa-expanded": checked}


# -- training ----------------------------------------------------------------------------------------------------------

TRAINING_SHAPES = (Shape(64, 1, 64, 64, batch=64), Shape(64, 1, 64, 32, batch=64), Shape(64, 3, 64, 64, batch=64))
BACKWARD_SHAPES = (Shape(100_000, 1, 512, 64), Shape(100_000, 1, 64, 64))


class Step(NamedTuple):
    """One set of inputs of a training step."""

    tensors: tuple[Tensor, ...]
    grads: tuple[Tensor, Tensor]


def gradients(forward: Callable[..., tuple[Tensor, Tensor]], step: Step) -> tuple[Tensor, ...]:
    """Forward and backward pass: gradients of all six inputs."""
    return torch.autograd.grad(forward(*step.tensors), step.tensors, step.grads)


def backward_alone(forward: Callable[..., tuple[Tensor, Tensor]], step: Step) -> Call:
    """Run the forward pass now, and return a call of its backward pass."""
    outputs = forward(*step.tensors)
    return lambda: torch.autograd.grad(outputs, step.tensors, step.grads, retain_graph=True)


def reference_gradients(step: Step, *, chunk: int = 4096) -> tuple[Tensor, ...]:
    """Gradients by the reference in float64, in chunks of candidates; those of shared keys and values are summed."""
    *candidates, key, value = step.tensors
    by_candidate, shared = [], [torch.zeros_like(t, dtype=torch.float64) for t in (key, value)]
    for start in range(0, len(candidates[0]), chunk):
        parts = [t.detach()[start : start + chunk] for t in candidates] + [key.detach(), value.detach()]
        exact = [part.double().requires_grad_() for part in parts]
        outputs = ours_batch(*exact, backend="reference")
        found = torch.autograd.grad(outputs, exact, [g[:, start : start + chunk].double() for g in step.grads])
        by_candidate.append(found[:4])
        shared = [total + part for total, part in zip(shared, found[4:], strict=True)]
    return (*(torch.cat(parts) for parts in zip(*by_candidate, strict=True)), *shared)


def training_workload(
    bench: Bench, shape: Shape, dtype: torch.dtype, *, forward_too: bool, compile_too: bool, rivals: bool = True
) -> Workload:
    """One training step, or only its backward pass, of a pool that all queries share; without rivals ours alone."""
    arguments = (shape.n, shape.k, shape.m, shape.h, shape.d, dtype)
    cost = candidate_attention_backward_cost(*arguments, batch=shape.batch)
    if forward_too:
        cost = candidate_attention_cost(*arguments, batch=shape.batch, return_lse=True).and_then(cost)
    forwards: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        bench.backend: partial(ours_batch, backend=bench.backend),
        **(BATCH_RIVALS | training_rivals(compile_too=compile_too) if rivals else {}),
    }
    if compile_too and rivals:
        forwards["einsum-compiled"] = torch.compile(einsum_batch, dynamic=False, fullgraph=True)
    make = _whole_step if forward_too else backward_alone
    too_large = {"sdpa-expanded": _beyond_the_grid} if rivals and shape.batch * shape.n > GRID_LIMIT else {}
    inputs = [random_step(shape, dtype, str(bench.device))]
    set_bytes = sum(tensor.nbytes for tensor in (*inputs[0].tensors, *inputs[0].grads))
    inputs += [random_step(shape, dtype, str(bench.device)) for _ in range(bench.sets(set_bytes) - 1)]
    exact = reference_gradients(inputs[0])
    return Workload(
        f"candidate_attention {'training step' if forward_too else 'backward'}",
        shape.names(),
        dtype,
        cost,
        {name: partial(make, forward) for name, forward in forwards.items()} | too_large,
        inputs,
        lambda result, _: relative_error(result, exact),
    )


def _whole_step(forward: Callable[..., tuple[Tensor, Tensor]], step: Step) -> Call:
    return partial(gradients, forward, step)


def _beyond_the_grid(step: Step) -> Call:
    raise UnavailableError(f"more than {GRID_LIMIT} pairs of query and candidate exceed the grid of fused attention")


def random_step(shape: Shape, dtype: torch.dtype, device: str) -> Step:
    tensors = Batch.random(shape.batch, shape.n, shape.k, shape.m, shape.h, shape.d, dtype, device).tensors()
    generator = torch.Generator(device).manual_seed(1)
    sizes = [(shape.batch, *tensors[0].shape), (shape.batch, *tensors[3].shape)]
    grads = (torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)
    return Step(tensors, tuple(grads))


def training(
    bench: Bench,
    step_shapes: Sequence[Shape] = TRAINING_SHAPES,
    backward_shapes: Sequence[Shape] = BACKWARD_SHAPES,
    dtype: torch.dtype = BF16,
    *,
    compile_too: bool = True,
) -> list[Record]:
    """Time training steps, forward and backward, and the backward pass at a size that fills a GPU."""
    group = Group("training", bench)
    cases = [(shape, False) for shape in backward_shapes[:1]] + [(shape, True) for shape in step_shapes]
    cases += [(shape, False) for shape in backward_shapes[1:]]
    for shape, forward_too in cases[: 2 if bench.quick else None]:
        operator = f"candidate_attention {'training step' if forward_too else 'backward'}"
        if not group.has_time(COMPILED_SECONDS, operator, shape.names(), dtype):
            continue
        torch.compiler.reset()
        # a compiled backward pass that runs again needs the buffers that it would donate
        with torch._functorch.config.patch(donated_buffer=False):
            try:
                work = training_workload(bench, shape, dtype, forward_too=forward_too, compile_too=compile_too)
            except torch.OutOfMemoryError as error:
                group.skip(operator, shape.names(), dtype, "all", f"inputs: {reason(error)}")
                free()
                continue
            measure(group, work)
            del work
    group.save(complete=True)
    return group.records
