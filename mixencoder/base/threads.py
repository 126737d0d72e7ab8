"""Work side by side on threads that give PyTorch's operators one thread each.

An operator that is shared out between threads may round by where the share ends, and its threads wait for one another
several hundred times a pass, each time for as long as another process holds a core. Work of one thread does neither.
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
    """Apply a function to items on so many threads, and yield the results in the order of the items.

    A few items run ahead of the one that is asked for, so that no thread waits and memory is that of a few.
    """
    if not items:
        return
    pool = _pool(threads)
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def on_one_thread(function: Callable[[], _Result]) -> _Result:
    """Call a function where PyTorch's operators have one thread, whatever they have here."""
    threads = torch.get_num_threads()
    return function() if threads == 1 else _pool(threads).submit(function).result()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the process's pool of so many threads."""
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="mixencoder", initializer=_take_one_thread)
            started = threading.Barrier(threads + 1)
            for _ in range(threads):
                pool.submit(started.wait)
            started.wait()
            # a thread that sets its own number also sets that of threads which start later: back to what it was
            torch.set_num_threads(torch.get_num_threads())
            _pools[threads] = pool
        return _pools[threads]


def _take_one_thread() -> None:
    # asking first: PyTorch gives a thread its default at the first question, which would undo what is set before
    torch.get_num_threads()
    torch.set_num_threads(1)


def _forget_pools() -> None:
    """Start anew in a forked child, which has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
