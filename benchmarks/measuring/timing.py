"""Timing side by side: interleaved rounds, and the peak of allocated tensors."""

import os
import time
from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

_SLOW = 1.0
"""Seconds; a call that takes longer has `slow_most` rounds and no warm-up."""


def interleaved_samples(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.3,
    least: int = 5,
    most: int = 40,
    slow_most: int = 2,
) -> dict[str, list[float]]:
    """Time each call several times. Calls take turns in rounds, so that a machine that slows down slows all of them.

    In its turn each call runs twice and the second run is timed: the first one refills caches and the allocator after
    the call before, which may have used hundreds of megabytes. A call of over a second runs once, since it hardly
    matters there.

    Args:
        calls: what to time.
        seconds: rough time to spend on each call.
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
    """Return the most bytes that a call had allocated at once, results included."""
    # otherwise the profiler logs its own starts and stops
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
