"""Time launch configurations, to fill a GPU's file of `mixkernels/attention/launch_tables`.

For every `Kind`, all of `launch.alternatives` and taller tiles, which the shipped rule avoids, are timed in interleaved
rounds; the best by the geometric mean over shapes is printed. Several processes compile ahead and share Triton's cache
on disk.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.attention import (
    LARGEST_ERROR,
    Bench,
    Shape,
    Step,
    backward_alone,
    free,
    random_step,
    relative_error,
)
from benchmarks.gpu.formulations import Call, ours_batch
from benchmarks.measuring.gpu_timing import interleaved_timings, reason
from benchmarks.measuring.provenance import write_json
from mixkernels import plans
from mixkernels.attention import triton_launch as launch
from mixkernels.attention.triton_launch import (
    CANDIDATES,
    FORWARD,
    FUSED,
    SHARED,
    SHORT,
    STREAMED,
    Kind,
    LaunchConfig,
    slots_of,
)

_WORKERS = 14
_COMPILED_CANDIDATES = 256
_KIND_SECONDS = 60.0


class Trial(NamedTuple):
    """A kind of kernel, and the shapes at which its configurations are timed."""

    kind: Kind
    shapes: tuple[Shape, ...]


def _trial(kernel: str, k: int, d: int, shapes: Sequence[tuple[int, int, int]]) -> Trial:
    """Make a trial in 16 bits; shapes are (B, N, m)."""
    kind = Kind(kernel, k, slots_of(kernel, k, has_state=True), d, 2, descriptors=kernel == SHORT and k <= 2)
    return Trial(kind, tuple(Shape(n, k, m, d, batch=batch) for batch, n, m in shapes))


_SHORT = ((1, 100_000, 64), (1, 100_000, 128), (1, 100_000, 16))
_LONG = ((1, 100_000, 256), (1, 100_000, 512))
_BACKWARD = ((1, 100_000, 512), (64, 64, 64))
TRIALS = (
    _trial(SHORT, 1, 64, _SHORT),
    _trial(STREAMED, 1, 64, _LONG),
    _trial(CANDIDATES, 1, 64, _BACKWARD),
    _trial(SHARED, 1, 64, _BACKWARD),
    _trial(FUSED, 1, 64, ((1, 100_000, 128),)),
    _trial(SHORT, 1, 32, _SHORT),
    _trial(STREAMED, 1, 32, _LONG),
    _trial(SHORT, 3, 64, _SHORT),
    _trial(STREAMED, 10, 64, _SHORT),
)
"""The most important first."""


def candidates(kind: Kind) -> list[LaunchConfig]:
    """Configurations to try: those of `launch.alternatives`, the rule first, and the same with tiles twice as tall."""
    known = launch.alternatives(kind)
    return known + [config._replace(block_m=2 * config.block_m) for config in known]


@contextmanager
def configured(gpu: str, kind: Kind, config: LaunchConfig) -> Iterator[None]:
    """Inside the block, launch one kind of kernel with one configuration."""
    before = launch.table_of
    launch.table_of = lambda name: before(name) | ({kind: config} if name == gpu else {})
    # plans hold configurations
    plans.clear()
    try:
        yield
    finally:
        launch.table_of = before
        plans.clear()


def call_of(kind: Kind, step: Step, backend: str) -> Call:
    """Return the call that launches the kind's kernel: forward, or backward alone."""
    if kind.kernel not in FORWARD:
        return backward_alone(lambda *tensors: ours_batch(*tensors, backend=backend), step)
    tensors = tuple(tensor.detach() for tensor in step.tensors)
    return lambda: ours_batch(*tensors, backend=backend)


def with_config(call: Call, gpu: str, kind: Kind, config: LaunchConfig) -> Call:
    """Return the call under one launch configuration."""

    def run() -> Any:
        with configured(gpu, kind, config):
            return call()

    return run


def compile_once(kind: Kind, shape: Shape, config: LaunchConfig) -> None:
    """Compile what a trial will launch, in a process of a pool; the result is in Triton's cache on disk."""
    small = shape._replace(n=min(shape.n, _COMPILED_CANDIDATES))
    # a configuration that does not fit fails again when it is timed, and is recorded there
    with suppress(Exception):
        call = call_of(kind, random_step(small, torch.bfloat16, "cuda"), "triton")
        with_config(call, torch.cuda.get_device_name(), kind, config)()


def _compile_ahead(pool: ProcessPoolExecutor, trial: Trial, seconds: float) -> None:
    # backward kernels that split their sums write another dtype, so every shape is compiled
    shapes = trial.shapes[:1] if trial.kind.kernel in FORWARD else trial.shapes
    jobs = [(trial.kind, shape, config) for config in candidates(trial.kind) for shape in shapes]
    # what is not compiled here is compiled when it is timed
    with suppress(TimeoutError, BrokenExecutor):
        for future in [pool.submit(compile_once, *job) for job in jobs]:
            future.result(timeout=max(seconds, 1.0))


def _right_calls(
    bench: Bench, kind: Kind, step: Step, configs: Sequence[LaunchConfig]
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Calls by number of the configuration, and why some are left out: they fail, or differ from the rule's result."""
    plain = call_of(kind, step, bench.backend)
    wanted = with_config(plain, bench.machine.name, kind, configs[0])()
    calls, failures = {}, {}
    for number, config in enumerate(configs):
        call = with_config(plain, bench.machine.name, kind, config)
        try:
            error = relative_error(call(), wanted)
        except Exception as why:
            failures[str(number)] = reason(why)
            continue
        if error <= LARGEST_ERROR[torch.bfloat16]:
            calls[str(number)] = [call]
        else:
            failures[str(number)] = f"wrong: off by {error:.2g} from the rule's result"
    return calls, failures


def best(tried: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the configuration, timed at every shape, with the least geometric mean of its time over the rule's."""
    complete = [entry for entry in tried if entry["of_rule"] is not None]
    return min(complete, key=lambda entry: entry["of_rule"], default=None)


def timed(bench: Bench, trial: Trial) -> list[dict[str, Any]]:
    """Time every configuration at every shape of a trial; the first entry is the rule's."""
    configs = candidates(trial.kind)
    times: list[dict[str, float]] = []
    failures: dict[str, str] = {}
    for shape in trial.shapes:
        try:
            step = random_step(shape, torch.bfloat16, str(bench.device))
            calls, wrong = _right_calls(bench, trial.kind, step, configs)
            found, failed = interleaved_timings(calls, bench.device, seconds=bench.seconds / 10, least=10)
            failed |= wrong
        except torch.OutOfMemoryError as error:
            found, failed = {}, {str(number): reason(error) for number in range(len(configs))}
        times.append({name: timing.seconds for name, timing in found.items()})
        failures |= failed
        free()
    tried = []
    for number, config in enumerate(configs):
        seconds = [at.get(str(number)) for at in times]
        ratios = [
            None if taken is None or "0" not in at else taken / at["0"]
            for taken, at in zip(seconds, times, strict=True)
        ]
        whole = None not in ratios
        tried.append(
            {
                "kind": trial.kind._asdict(),
                "config": config._asdict(),
                "shapes": [shape.names() for shape in trial.shapes],
                "seconds": seconds,
                "of_rule": math.exp(sum(map(math.log, ratios)) / len(ratios)) if whole else None,
                "failure": failures.get(str(number)),
            }
        )
    return tried


def tuning(bench: Bench, trials: Sequence[Trial] = TRIALS) -> list[dict[str, Any]]:
    """Time the configurations of every kind; write all, and the table of the best."""
    everything, chosen, skipped = [], [], []
    workers = min(_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for trial in trials[:1] if bench.quick else trials:
            if bench.left() < _KIND_SECONDS:
                skipped.append({"kind": trial.kind._asdict(), "reason": "the run's time was over"})
                continue
            _compile_ahead(pool, trial, bench.left())
            tried = timed(bench, trial)
            everything += tried
            if (fastest := best(tried)) is not None:
                chosen.append(fastest)
                print(f"{_literal(fastest)}  # {fastest['of_rule']:.3f} of the rule's time", flush=True)
            machine = bench.machine
            write_json(
                bench.folder / "gpu_tuning.json",
                {
                    "group": "tuning",
                    "device": machine.name,
                    "versions": machine.versions,
                    "commit": machine.commit,
                    "provenance": machine.provenance,
                    "best": chosen,
                    "tried": everything,
                    "skipped": skipped,
                },
            )
    print("\n".join(["for mixkernels/attention/launch_tables:", *table_lines(bench.machine.name, chosen)]), flush=True)
    return chosen


def table_lines(gpu: str, chosen: Sequence[dict[str, Any]], *, least_gain: float = 0.03) -> list[str]:
    """Entries of a launch table: the configurations that beat the rule by more than noise."""
    rows = [_literal(entry) for entry in chosen if entry["of_rule"] <= 1 - least_gain]
    return rows or [f"nothing beats the rule on {gpu}"]


def _literal(entry: dict[str, Any]) -> str:
    return json.dumps({"kind": entry["kind"], "config": entry["config"]})
