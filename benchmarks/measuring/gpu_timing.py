"""Timing on a GPU: interleaved rounds between events, inputs that rotate past the cache, host time, peak memory.

On a CPU the same functions read the host's clock, so that the benchmark's logic can be tested without a GPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.measuring.noise import spread
from benchmarks.measuring.timing import peak_bytes

Call = Callable[[], object]

ROUNDS = 5
"""Rounds, in which contenders take turns, so that drift of clocks and temperature affects all alike."""

_SLOW, _LEAST_SLOW = 0.1, 5
_CYCLES = 2e9
"""Clock cycles per second, at most, of any GPU: a spin of this many cycles lasts one second at least."""
_LONGEST_LEAD = 0.02


class Timing(NamedTuple):
    """Medians of one contender."""

    seconds: float
    """On the device."""
    spread: float
    """Distance of the quartiles divided by the median."""
    host_seconds: float
    """Time for which the call kept the host busy."""
    samples: int


def interleaved_timings(
    contenders: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 0.3,
    least: int = 20,
    most: int = 100,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time contenders in turns; also return why some could not be timed.

    In its turn a contender runs once untimed, then several times timed, each time on the next of its inputs. The device
    spins before each timed call while the host runs ahead, so that the device never waits for the host in between.

    Args:
        contenders: for each, one call per set of inputs, with enough sets that none is in cache.
        device: where they run.
        seconds: to spend on each contender, about.
        least, most: bounds of the samples of each; a call of over 0.1 s needs only 5.
    """
    failures: dict[str, str] = {}
    samples: dict[str, list[tuple[float, float]]] = {}
    counts, leads, turns = {}, {}, {}
    for name, calls in contenders.items():
        try:
            for call in calls[:2]:
                call()
            (estimate, host), *_ = _timed([calls[0]], device, 0.0)
        except Exception as error:
            failures[name] = reason(error)
            continue
        floor = least if estimate < _SLOW else _LEAST_SLOW
        counts[name] = -(-min(max(int(seconds / max(estimate, 1e-9)), floor), most) // ROUNDS)
        leads[name] = min(1.5 * host + 5e-5, _LONGEST_LEAD)
        turns[name], samples[name] = 0, []
    for _ in range(ROUNDS):
        for name, calls in contenders.items():
            if name in failures:
                continue
            first = turns[name]
            turn = [calls[(first + step) % len(calls)] for step in range(counts[name] + 1)]
            turns[name] += len(turn)
            try:
                turn[0]()
                samples[name] += _timed(turn[1:], device, leads[name])
            except Exception as error:
                failures[name] = reason(error)
    return {name: _summary(values) for name, values in samples.items() if name not in failures}, failures


def _timed(calls: Sequence[Call], device: torch.device, lead: float) -> list[tuple[float, float]]:
    """Seconds on the device and on the host of every call."""
    hosts, events = [], []
    for call in calls:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(lead * _CYCLES))
            start.record()
        begin = time.perf_counter()
        call()
        hosts.append(time.perf_counter() - begin)
        if device.type == "cuda":
            end.record()
            events.append((start, end))
    if device.type != "cuda":
        return [(host, host) for host in hosts]
    torch.cuda.synchronize(device)
    # elapsed_time is in milliseconds
    return [(start.elapsed_time(end) * 1e-3, host) for (start, end), host in zip(events, hosts, strict=True)]


def _summary(samples: list[tuple[float, float]]) -> Timing:
    taken = [seconds for seconds, _ in samples]
    return Timing(median(taken), spread(taken), median(host for _, host in samples), len(samples))


def reason(error: Exception) -> str:
    """Return the first line of an error, shortened."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def peak_bytes_of(call: Call, device: torch.device) -> int:
    """Most bytes that a call had allocated at once, results included."""
    if device.type != "cuda":
        return peak_bytes(call)
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - held


def host_seconds_of(call: Call, device: torch.device, *, calls: int = 200, batches: int = 25) -> float:
    """Median host time of a call whose device work is shorter, over batches of calls without synchronisation."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    means = []
    for _ in range(batches + 1):
        synchronise()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - begin) / calls)
    synchronise()
    # the first batch warms up
    return median(means[1:])


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """Capture one call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
