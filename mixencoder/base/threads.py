"""Run work in parallel on a pool of threads in which each PyTorch operator uses one thread.

An operator that several threads share may round differently depending on where its work is cut. Its threads also wait
for one another several hundred times in a pass of the backbone, each time as long as another process holds a core.
Operators on one thread avoid both.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_in_order(function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int) -> Iterator[_Result]:
    """Apply a function to items on a pool of `threads` threads, and yield the results in the order of the items.

    At most about twice as many items as threads are in flight: no thread is idle, and memory stays small.
    """
    if not items:
        return
    pool = _pool(threads)
    in_flight: deque[Future[_Result]] = deque()
    try:
        for item in items:
            in_flight.append(pool.submit(function, item))
            if len(in_flight) > 2 * threads:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        for future in in_flight:
            future.cancel()


def on_one_thread(function: Callable[[], _Result]) -> _Result:
    """Call a function in a thread in which PyTorch's operators use one thread."""
    threads = torch.get_num_threads()
    return function() if threads == 1 else _pool(threads).submit(function).result()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return this process's pool of that many threads."""
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="mixencoder", initializer=_use_one_thread)
            # wait until all threads have run the initializer
            started = threading.Barrier(threads + 1)
            for _ in range(threads):
                pool.submit(started.wait)
            started.wait()
            # set_num_threads in a thread also changes the default of threads that start later: restore the default
            torch.set_num_threads(torch.get_num_threads())
            _pools[threads] = pool
        return _pools[threads]


def _use_one_thread() -> None:
    # the first get_num_threads in a thread resets its number to the default, so call it before setting the number
    torch.get_num_threads()
    torch.set_num_threads(1)


def _forget_pools() -> None:
    """Drop the pools in a forked child, which has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
