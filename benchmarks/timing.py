"""Timing side by side: interleaved rounds, medians, and the peak of allocated tensors."""

import time
from collections.abc import Callable, Mapping
from statistics import median

from torch.profiler import ProfilerActivity, profile


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 0.3, least: int = 5, most: int = 40
) -> dict[str, float]:
    """Median seconds of each call. Rounds take turns, so that a machine that slows down slows all of them.

    In its turn each call runs twice and the second run is timed: the first one pays for caches and an allocator that
    the call before, perhaps one of hundreds of megabytes, left behind.

    Args:
        calls: what to time.
        seconds: time to spend on each call, about.
        least, most: bounds of the number of rounds of each call; one that takes over a second gets two at most.
    """
    rounds, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        rounds[name] = min(2, most) if once > 1.0 else min(max(int(seconds / once), least), most)
    for turn in range(max(rounds.values())):
        for name, call in calls.items():
            if turn < rounds[name]:
                call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call held in tensors of its own at once, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
