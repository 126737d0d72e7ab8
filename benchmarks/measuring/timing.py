"""Timing side by side: interleaved rounds, and the peak of allocated tensors."""

import os
import time
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

_SLOW = 1.0
"""Seconds of a call from which on it is timed twice alone."""


def interleaved_samples(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.3,
    least: int = 5,
    most: int = 40,
    slow_most: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each call, several times. Rounds take turns, so that a machine that slows down slows all of them.

    In its turn each call runs twice and the second run is timed: the first one pays for caches and an allocator that
    the call before, perhaps one of hundreds of megabytes, left behind. A call of over a second does not notice.

    Args:
        calls: what to time.
        seconds: time to spend on each call, about.
        least, most: bounds of the number of rounds of each call.
        slow_most: bound for one that takes over a second.
    """
    rounds, slow, times = {}, set(), {name: [] for name in calls}
    for name, call in calls.items():
        call()
        once = _seconds(call)
        rounds[name] = min(max(int(seconds / once), least), min(slow_most, most) if once > _SLOW else most)
        if once > _SLOW:
            slow.add(name)
    for turn in range(max(rounds.values())):
        for name, call in calls.items():
            if turn < rounds[name]:
                if name not in slow:
                    call()
                times[name].append(_seconds(call))
    return times


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call held in tensors of its own at once, results included."""
    # it reports its own starts and stops otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
