"""Gather concurrent requests into passes that one worker thread runs; bound the queue; drop abandoned requests.

A large request takes several passes, and others have their turn in between.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from mixencoder.serving.errors import overloaded

PASS_WEIGHT = 512
"""Most texts of a pass."""
SHARE = 128
"""Most texts of one request in a pass."""
UNFINISHED = object()
"""What a pass returns for a job that needs another pass."""

T = TypeVar("T")


class Job(Generic[T]):
    """A request in the queue or in a pass.

    Attributes:
        work: what to do.
        weight: about how many texts it holds.
        state: what the passes that ran it leave for the next one; None before the first.
        abandoned: whether its client has gone; set by the event loop, read by the worker.
        started: whether a pass has run it.
    """

    def __init__(self, work: T, weight: int) -> None:
        self.work, self.weight, self.abandoned, self.started = work, weight, False, False
        self.state: Any = None
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Batcher(Generic[T]):
    """Runs jobs in passes on one thread. Used from one event loop, between `start` and `close`.

    A pass starts when the worker is free and the first waiting job has waited `gather_seconds`. While a pass runs,
    jobs gather without further delay.

    Args:
        run: runs the jobs of a pass in the worker thread; returns for each a result, an exception or `UNFINISHED`.
        queue: most jobs that wait.
        gather_seconds: see above.
        observe: called after each pass with its number of jobs and its seconds.
        initialize: called once in the worker thread, before the first pass.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job[T]]], Sequence[Any]],
        *,
        queue: int,
        gather_seconds: float,
        observe: Callable[[int, float], None] = lambda jobs, seconds: None,
        initialize: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._limit, self._gather_seconds, self._observe = run, queue, gather_seconds, observe
        self._waiting: deque[Job[T]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mixencoder-serve", initializer=initialize)
        self._arrived = asyncio.Event()
        self._closing = False
        self._pass_seconds = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run jobs."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    def __len__(self) -> int:
        """Return the number of jobs that wait for their first pass."""
        return sum(not job.started for job in self._waiting)

    @property
    def running(self) -> bool:
        """Whether jobs are taken."""
        return self._task is not None and not self._task.done() and not self._closing

    def submit(self, work: T, weight: int) -> Job[T]:
        """Queue work; await the job's `done` for its result.

        Raises:
            RequestError: 429, the queue is full.
        """
        if len(self) >= self._limit:
            raise overloaded(f"{len(self)} requests are waiting; try again later", self._retry_after())
        job = Job(work, weight)
        self._waiting.append(job)
        self._arrived.set()
        return job

    def abandon(self, job: Job[T]) -> None:
        """Drop a job; if a pass runs it now, the result of this pass is thrown away."""
        job.abandoned = True
        job.done.cancel()
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)

    async def close(self) -> None:
        """Run all waiting jobs, then end the worker thread."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._pool.shutdown)

    async def _work(self) -> None:
        while await self._wait_for_jobs():
            jobs = self._take()
            if not jobs:
                continue
            start = time.perf_counter()
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._pool, self._run, jobs)
            except Exception as error:
                # every caller learns of it and logs it
                results = [error] * len(jobs)
            seconds = time.perf_counter() - start
            self._pass_seconds += 0.2 * (seconds - self._pass_seconds)
            self._observe(len(jobs), seconds)
            for job, result in zip(jobs, results, strict=True):
                job.started = True
                if job.done.done():
                    continue
                if result is UNFINISHED:
                    self._waiting.append(job)
                else:
                    job.done.set_exception(result) if isinstance(result, Exception) else job.done.set_result(result)

    async def _wait_for_jobs(self) -> bool:
        """Wait for a pass's jobs; return False when closing and none is left."""
        while not self._waiting:
            if self._closing:
                return False
            self._arrived.clear()
            await self._arrived.wait()
            if self._waiting and not self._closing and self._gather_seconds:
                await asyncio.sleep(self._gather_seconds)
        return True

    def _take(self) -> list[Job[T]]:
        jobs, weight = [], 0
        while self._waiting and weight + min(self._waiting[0].weight, SHARE) <= PASS_WEIGHT:
            jobs.append(self._waiting.popleft())
            weight += min(jobs[-1].weight, SHARE)
        return jobs

    def _retry_after(self) -> int:
        """Return about how many seconds the waiting jobs take, from 1 to 60."""
        passes = 1 + sum(job.weight for job in self._waiting) // PASS_WEIGHT
        return min(60, max(1, round(passes * self._pass_seconds)))
