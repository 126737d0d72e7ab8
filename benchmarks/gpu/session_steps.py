"""The steps of `benchmarks.gpu.session`: what is measured and checked in ten minutes, at real or tiny sizes."""

import importlib.util
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.__main__ import correctness
from benchmarks.gpu.attention import (
    BF16,
    FP16,
    FP32,
    LARGEST_ERROR,
    Bench,
    Group,
    Shape,
    Step,
    Workload,
    attention_workload,
    backward_alone,
    free,
    measure,
    random_step,
    reference_gradients,
    relative_error,
    training_workload,
)
from benchmarks.gpu.backward_rivals import one_call_rivals
from benchmarks.gpu.formulations import Batch, UnavailableError, compiled_rivals, ours_batch
from benchmarks.gpu.layer import LAYER_OPERATORS, host, layer_workload
from benchmarks.measuring.gpu_timing import interleaved_timings, reason
from benchmarks.measuring.provenance import ROOT, Record, write_json
from mixkernels import candidate_attention

_WORKERS = 14


class Sizes(NamedTuple):
    """Shapes of a session."""

    forward: tuple[Shape, ...]
    backward: tuple[Shape, ...]
    steps: tuple[Shape, ...]
    """Training steps."""
    waves: tuple[Shape, ...]
    """As many candidates in all, for other numbers of queries."""
    layer: tuple[int, int]
    host: Shape
    ranked: int
    elements: int
    """Of the arrays whose copy is measured."""


REAL = Sizes(
    forward=(*(Shape(100_000, 1, m, 64) for m in (64, 128, 512)), Shape(100_000, 1, 128, 32)),
    backward=(Shape(100_000, 1, 512, 64), Shape(100_000, 1, 128, 64)),
    steps=(Shape(64, 1, 64, 64, batch=64),),
    waves=tuple(Shape(96_000 // batch, 1, 64, 64, batch=batch) for batch in (1, 8, 3)),
    layer=(1_000_000, 384),
    host=Shape(64, 1, 16, 64),
    ranked=1_000_000,
    elements=2**29,
)
TINY = Sizes(
    forward=(Shape(6, 1, 5, 16, h=2),),
    backward=(Shape(5, 1, 5, 16, h=2),),
    steps=(Shape(3, 1, 4, 16, h=2, batch=2),),
    waves=(Shape(4, 1, 4, 16, h=2), Shape(2, 1, 4, 16, h=2, batch=2)),
    layer=(12, 32),
    host=Shape(12, 1, 3, 16, h=2),
    ranked=0,
    elements=2**12,
)


@dataclass
class Session:
    """A run of all steps."""

    bench: Bench
    sizes: Sizes
    real: bool
    """On a GPU; False: a rehearsal."""
    deadline: float
    steps: list[dict[str, Any]] = field(default_factory=list)

    def group(self, name: str) -> Group:
        """Return a file of records of a step."""
        return Group(f"session_{name}", self.bench)

    def save(self, *, complete: bool) -> None:
        """Write what is known."""
        machine = self.bench.machine
        document = {"group": "session", "device": machine.name, "complete": complete, "steps": self.steps}
        document |= {"versions": machine.versions, "commit": machine.commit, "provenance": machine.provenance}
        write_json(self.bench.folder / "gpu_session.json", document)


def machine(session: Session) -> dict[str, float]:
    """Measure rates: a copy, two reads for a write, a product, and on a GPU exponentials."""
    device, elements = session.bench.device, session.sizes.elements
    one, two, out = (torch.zeros(elements, dtype=BF16, device=device) for _ in range(3))
    side = 8192 if session.real else 64
    left, right = (torch.randn(side, side, device=device).to(BF16) for _ in range(2))
    calls = {
        "copy bytes/s": (lambda: out.copy_(one), 4 * elements),
        "two reads a write bytes/s": (lambda: torch.add(one, two, out=out), 6 * elements),
        "product FLOP/s": (lambda: torch.mm(left, right), 2 * side**3),
    }
    if session.real:
        from benchmarks.gpu.exponentials import EXPONENTIALS, exponentials

        calls["exp2/s"] = (lambda: exponentials(device), EXPONENTIALS)
    timings, failures = interleaved_timings({name: [call] for name, (call, _) in calls.items()}, device, seconds=0.3)
    rates = {name: work / timings[name].seconds for name, (_, work) in calls.items() if name in timings}
    return rates | failures


def compile_ahead(session: Session) -> dict[str, Any]:
    """Compile what later steps launch, in many processes that share Triton's cache on disk."""
    sizes = session.sizes
    jobs = [(shape, False) for shape in (*sizes.forward, *sizes.waves)]
    jobs += [(shape, True) for shape in (*sizes.backward, *sizes.steps)]
    if not session.real:
        for job in jobs:
            compile_one(*job, str(session.bench.device), session.bench.backend)
        return {"jobs": len(jobs), "processes": 0}
    failed = []
    pool = ProcessPoolExecutor(_WORKERS, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_one, *job, "cuda", "triton") for job in jobs]
    for job, future in zip(jobs, futures, strict=True):
        try:
            future.result(timeout=max(session.bench.left(), 1.0))
        except Exception as error:
            failed.append(f"{job[0]}: {reason(error)}")
    pool.shutdown(wait=False, cancel_futures=True)
    return {"jobs": len(jobs), "processes": _WORKERS, "failed": failed}


def compile_one(shape: Shape, backward: bool, device: str, backend: str) -> None:
    """Launch all kernels of a shape once; backward kernels split sums by the number of candidates, which is kept."""
    step = random_step(shape if backward else shape._replace(n=min(shape.n, 512)), BF16, device)
    if backward:
        torch.autograd.grad(ours_batch(*step.tensors, backend=backend), step.tensors, step.grads)
    else:
        with torch.no_grad():
            ours_batch(*step.tensors, backend=backend)


def checks(session: Session) -> dict[str, Any]:
    """Compare forms, lengths, dtypes, gradients and `out` with the reference in float64."""
    errors: dict[str, float | str] = {}
    for name, check, allowed in _checks(session):
        if session.bench.left() < 1:
            errors[name] = "no time was left"
            continue
        try:
            error = check()
        except Exception as failure:
            errors[name] = reason(failure)
            continue
        # NaN counts as wrong
        errors[name] = error if error <= allowed else f"wrong: off by {error:.2g}, allowed are {allowed:.2g}"
    failed = {name: error for name, error in errors.items() if isinstance(error, str)}
    return {"errors": errors, "failed": failed}


def _checks(session: Session) -> Iterator[tuple[str, Callable[[], float], float]]:
    """Name, function that returns the relative error, and the largest that is right."""
    device, backend = str(session.bench.device), session.bench.backend
    n, lengths = (300, (5, 64, 128, 129, 512)) if session.real else (5, (5,))
    dims = (16, 32, 64, 128) if session.real else (16,)

    def forward(shape: Shape, dtype: torch.dtype, form: str) -> float:
        tensors = [tensor.detach() for tensor in random_step(shape, dtype, device).tensors]
        options: dict[str, Any] = {"return_lse": form == "lse"}
        if form == "lengths":
            options["key_lengths"] = torch.arange(shape.batch, device=device) % shape.m + 1
        elif form == "ids":
            generator = torch.Generator(device).manual_seed(2)
            options["candidate_ids"] = torch.randint(
                0, shape.n, (shape.batch, shape.n), generator=generator, device=device
            )
        elif form == "ragged":
            cuts = torch.linspace(0, shape.n, shape.batch + 1, device=device).long()
            options["candidate_offsets"] = cuts
        want = candidate_attention(*(tensor.double() for tensor in tensors), **options, backend="reference")
        if form == "out":
            room = torch.empty(shape.batch, shape.n, shape.k + 1, shape.h, shape.d, dtype=dtype, device=device)
            options["out"] = (room[:, :, : shape.k], room[:, :, shape.k])
        # the second call of a form is launched directly
        for _ in range(2):
            found = candidate_attention(*tensors, **options, backend=backend)
        pairs = [(got, exact) for got, exact in zip(found, want, strict=True) if got is not None]
        return relative_error([got for got, _ in pairs], [exact for _, exact in pairs])

    def backward(shape: Shape, dtype: torch.dtype) -> float:
        step = random_step(shape, dtype, device)
        found = torch.autograd.grad(ours_batch(*step.tensors, backend=backend), step.tensors, step.grads)
        return relative_error(found, reference_gradients(step))

    heads = 4 if session.real else 2
    cases = [(Shape(n, 1, m, 64 if session.real else 16, h=heads), BF16, "pool") for m in lengths]
    cases += [(Shape(n, 2, lengths[0], d, h=heads, batch=2), BF16, "lengths") for d in dims]
    base = Shape(n, 1, lengths[-1], dims[-1], h=heads, batch=3)
    cases += [(base._replace(m=m), BF16, form) for m in lengths[:2] for form in ("lse", "ids", "ragged", "out")]
    cases += [(base._replace(k=3, d=dims[0]), FP16, "pool"), (base._replace(k=10, d=dims[0]), FP32, "pool")]
    for shape, dtype, form in cases:
        yield f"{form} {shape} {dtype}", partial(forward, shape, dtype, form), LARGEST_ERROR[dtype]
    # several queries of a pool, one query (the fused kernel), several contexts
    one = base._replace(m=lengths[0], d=dims[0], batch=1)
    for shape, dtype in ((base, BF16), (one, BF16), (one._replace(k=3, batch=3), FP32)):
        yield f"gradients {shape} {dtype}", partial(backward, shape, dtype), 2 * LARGEST_ERROR[dtype]
    for name in LAYER_OPERATORS:
        work = layer_workload(session.bench, name, n, 384 if session.real else 32, BF16, compile_too=False)
        call = work.contenders[backend](work.inputs[0])
        yield f"{name}", lambda work=work, call=call: work.error_of(call(), work.inputs[0]), LARGEST_ERROR[BF16]


def forward(session: Session) -> dict[str, Any]:
    """Time the forward pass alone."""
    return _each(
        session, "forward", session.sizes.forward, lambda shape: attention_workload(session.bench, shape, BF16, {})
    )


def backward(session: Session) -> dict[str, Any]:
    """Time the backward pass: two kernels for a long query, the fused one for a short one, the candidates' alone."""
    bench = session.bench
    found = _each(
        session,
        "backward",
        session.sizes.backward,
        lambda shape: training_workload(bench, shape, BF16, forward_too=False, compile_too=False, rivals=False),
    )
    for shape in session.sizes.backward:
        step = random_step(shape, BF16, str(bench.device))
        *candidates, key, value = step.tensors
        frozen = Step((*candidates, key.detach(), value.detach()), step.grads)
        outputs = ours_batch(*frozen.tensors, backend=bench.backend)
        call = partial(torch.autograd.grad, outputs, frozen.tensors[:4], frozen.grads, retain_graph=True)
        whole = backward_alone(partial(ours_batch, backend=bench.backend), step)
        timings, failures = interleaved_timings({"candidates": [call], "both": [whole]}, bench.device, seconds=0.3)
        found[f"kernels {shape}"] = {name: timing.seconds for name, timing in timings.items()} | failures
        free()
    return found


def counters(session: Session) -> dict[str, Any]:
    """Let Nsight Compute look at three kernels.

    Raises:
        UnavailableError: ncu is not installed, or this is a rehearsal.
    """
    if shutil.which("ncu") is None or not session.real:
        raise UnavailableError("ncu is not installed" if session.real else "a rehearsal has no GPU")
    output = session.bench.folder / "ncu.csv"
    sections = ("SpeedOfLight", "WarpStateStats", "InstructionStats", "Occupancy")
    command = ["ncu", "--clock-control", "none", "--csv", "--log-file", str(output), "--target-processes", "all"]
    command += [part for section in sections for part in ("--section", section)]
    command += ["--kernel-name", "regex:candidate_attention", "--launch-count", "6", sys.executable, "-m"]
    seconds = max(session.bench.left(), 1.0)
    done = subprocess.run(
        [*command, "benchmarks.gpu.session", "--one-pass"], cwd=ROOT, capture_output=True, timeout=seconds, check=False
    )
    return {"file": output.name, "exit_status": done.returncode, "message": done.stderr.decode()[-300:]}


def one_pass(sizes: Sizes) -> None:
    """Run forward and backward once at the sizes that matter, for a profiler."""
    for shape in (*sizes.forward[1:3], sizes.backward[0]):
        compile_one(shape, shape in sizes.backward, "cuda", "triton")


def rivals(session: Session) -> dict[str, Any]:
    """Time the strongest rivals, forward and backward; contexts and states in one call where there is one."""
    bench, real = session.bench, session.real

    def forward(shape: Shape) -> Workload:
        torch.compiler.reset()
        names = ("two-pass-cudnn-compiled", "flex-compiled")
        every = {name: rival for name, rival in compiled_rivals().items() if name in names} | one_call_rivals()
        return attention_workload(bench, shape, BF16, every if real else {"one-call-flash3": every["one-call-flash3"]})

    def backward(shape: Shape) -> Workload:
        torch.compiler.reset()
        return training_workload(bench, shape, BF16, forward_too=shape.batch > 1, compile_too=real)

    found = _each(session, "rivals", [*reversed(session.sizes.forward[:3])], forward)
    with torch._functorch.config.patch(donated_buffer=False):
        shapes = (session.sizes.backward[0], *session.sizes.steps)
        return found | _each(session, "training_rivals", shapes, backward)


def host_times(session: Session) -> dict[str, Any]:
    """Time the host beside PyTorch's own attention."""
    # a rehearsal has no streams to capture
    records = host(session.bench, session.sizes.host, calls=200 if session.real else 2)
    return {f"{record['operator']} {record['backend']}": record["host_seconds"] for record in records}


def layer(session: Session) -> dict[str, Any]:
    """Time the rest of the layer, and as many candidates for several queries as for one."""
    bench = session.bench
    n, d = session.sizes.layer
    found = _each(
        session,
        "layer",
        list(LAYER_OPERATORS),
        lambda name: layer_workload(bench, name, n, d, BF16, compile_too=False),
    )
    calls = {}
    for shape in session.sizes.waves:
        batch = Batch.random(shape.batch, *shape[:3], shape.h, shape.d, BF16, str(bench.device))
        tensors = [tensor.detach() for tensor in batch.tensors()]
        calls[f"B={shape.batch}"] = [partial(_without_gradients, tensors, bench.backend)]
    timings, failures = interleaved_timings(calls, bench.device, seconds=0.3)
    return found | {"waves": {name: timing.seconds for name, timing in timings.items()} | failures}


def _without_gradients(tensors: Sequence[Tensor], backend: str) -> None:
    with torch.no_grad():
        ours_batch(*tensors, backend=backend)


def ranking(session: Session) -> dict[str, Any]:
    """Rank a million candidates, in a process of its own.

    Raises:
        UnavailableError: this is a rehearsal, or transformers is not installed.
    """
    if not session.real or importlib.util.find_spec("transformers") is None:
        raise UnavailableError("transformers is not installed" if session.real else "a rehearsal has no GPU")
    command = [sys.executable, "-m", "benchmarks.gpu.ranking", "--output", str(session.bench.folder)]
    command += ["--count", str(session.sizes.ranked), "--commit", session.bench.machine.commit]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(session.bench.left(), 1.0), check=False
    )
    return {"exit_status": done.returncode, "output": (done.stdout + done.stderr)[-1500:]}


def tests(session: Session) -> dict[str, Any]:
    """Run the operators' tests with compiled kernels.

    Raises:
        UnavailableError: this is a rehearsal.
    """
    if not session.real:
        raise UnavailableError("a rehearsal has no GPU")
    outcome = correctness(session.bench.folder, max(session.bench.left(), 1.0))
    return {name: outcome[name] for name in ("passed", "tests", "skipped", "seconds")}


def _each(session: Session, name: str, items: Sequence[Any], work_of: Callable[[Any], Workload]) -> dict[str, Any]:
    """Measure a workload for every item while the step has time; return seconds by item."""
    group = session.group(name)
    for item in items:
        if session.bench.left() < 3:
            group.skip(name, {}, BF16, "all", f"{item}: the step's time was over")
            continue
        try:
            with torch.set_grad_enabled(name in ("backward", "training_rivals")):
                measure(group, work_of(item))
        except Exception as error:
            group.skip(name, {}, BF16, "all", f"{item}: {reason(error)}")
        free()
    group.save(complete=True)
    own = [record for record in group.records if record["backend"] == session.bench.backend]
    return {"measured": [_short(record) for record in own], "skipped": [entry["reason"] for entry in group.skipped]}


def _short(record: Record) -> dict[str, Any]:
    kept = ("operator", "shape", "seconds", "fraction_of_measured", "tflops", "ratios")
    return {name: record[name] for name in kept}
