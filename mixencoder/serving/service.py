"""One model and perhaps one index behind a queue: what every endpoint uses, and nothing of HTTP but the request."""

import asyncio
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from starlette.requests import Request

from mixencoder.errors import MixEncoderError
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex
from mixencoder.serving.batching import SHARE, Batcher, Job
from mixencoder.serving.errors import RequestError, request_error
from mixencoder.serving.logs import log
from mixencoder.serving.metrics import Metrics
from mixencoder.serving.quotas import cpu_quota
from mixencoder.serving.ranking import Ranker, RankStored
from mixencoder.serving.settings import ServeConfig
from mixencoder.serving.work import Explained, Explaining, Ranked, Ranking, Task

DEFAULT_NAME = "mixencoder"
"""Name of the model if neither the settings nor the checkpoint gives one."""
CLIENT_GONE = 499
"""Status noted for a request whose client closed the connection."""


class Service:
    """Answers rankings and changes of the index, through a `Batcher`.

    Attributes:
        config: the settings.
        engine: the model.
        index: the index, or None.
        metrics: counts and times.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine: MixEncoder,
        index: CandidateIndex | None,
        rank_stored: RankStored | None = None,
    ) -> None:
        self.config, self.engine, self.index = config, engine, index
        self.names = config.names or (DEFAULT_NAME,)
        self._ranker = Ranker(engine, index, most_tokens=config.limits.tokens, rank_stored=rank_stored)
        self._batcher: Batcher[Ranking | Task] | None = None
        self.metrics = Metrics(self.waiting, self.candidates)

    def start(self) -> None:
        """Begin to answer; called in the event loop that serves."""
        threads = usable_threads(self.config.threads)
        # the default of threads that start later; the worker calls it too, as a thread may have its own number
        torch.set_num_threads(threads)
        self._batcher = Batcher(
            self._run,
            queue=self.config.limits.queue,
            gather_seconds=self.config.gather_seconds,
            observe=self.metrics.observe_pass,
            initialize=lambda: torch.set_num_threads(threads),
        )
        self._batcher.start()
        log("started", model=self.names[0], threads=threads, candidates=self.candidates())

    async def close(self) -> None:
        """Finish what waits, then stop."""
        if self._batcher is not None:
            await self._batcher.close()
        log("stopped")

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._batcher is not None and self._batcher.running

    @property
    def calibrated(self) -> bool:
        """Whether probabilities are calibrated; otherwise they are the sigmoid of the score."""
        return self._ranker.calibrated

    def waiting(self) -> int:
        """Return the number of waiting requests."""
        return 0 if self._batcher is None else len(self._batcher)

    def candidates(self) -> int:
        """Return the number of candidates in the index."""
        return 0 if self.index is None else len(self.index)

    def check_model(self, name: str | None) -> None:
        """Raise if a request names another model.

        Raises:
            RequestError: it does.
        """
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise RequestError(404, "not_found", f"the model {name[:80]!r} is not served here; expected {known}")

    def check_index(self, *, writing: bool = False) -> CandidateIndex:
        """Return the index.

        Raises:
            RequestError: there is none, or it may not be written.
        """
        if self.index is None:
            raise RequestError(404, "not_found", "this server has no index; start it with --index DIR")
        if writing and not self.config.allow_writes:
            raise RequestError(403, "forbidden", "this server is read-only; start it with --allow-writes")
        return self.index

    async def rank(self, request: Request, work: Ranking) -> Ranked:
        """Answer a ranking.

        Raises:
            RequestError: it exceeds a limit or cannot be used, the queue is full, or the client has gone.
        """
        work.check(self.config.limits)
        if work.uses_index:
            self.check_index()
        ranked: Ranked = await self._answer(request, work, work.weight)
        pairs = sum(map(len, ranked.rankings))
        self.metrics.pairs.inc(pairs)
        self.metrics.tokens.inc(ranked.tokens)
        self.metrics.cut.inc(ranked.cut)
        _note(request, queries=len(work.queries), results=pairs, tokens=ranked.tokens, cut=ranked.cut)
        return ranked

    async def explain(self, request: Request, work: Explaining) -> Explained:
        """Explain a score.

        Raises:
            RequestError: as `rank`.
        """
        work.check(self.config.limits)
        if work.uses_index:
            self.check_index()
        # not gathered with others, so few of them make a pass
        explained: Explained = await self._answer(request, lambda: self._ranker.explain(work), SHARE)
        found = explained.explanation
        tokens = len(found.query_tokens) + len(found.document_tokens)
        self.metrics.tokens.inc(tokens)
        _note(request, tokens=tokens)
        return explained

    async def change(self, request: Request, change: Task, weight: int) -> Any:
        """Change the index in the worker thread, and return the result once it is on disk.

        Raises:
            RequestError: the change cannot be made, the queue is full, or the client has gone before it began.
        """
        return await self._answer(request, change, weight)

    async def _answer(self, request: Request, work: Ranking | Task, weight: int) -> Any:
        if self._batcher is None or not self._batcher.running:
            raise RequestError(503, "unhealthy", "the server is starting or stopping", {"Retry-After": "1"})
        job = self._batcher.submit(work, weight)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({job.done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if job.done.done():
                return job.done.result()
            raise RequestError(CLIENT_GONE, "validation", "the client closed the connection")
        except MixEncoderError as error:
            known = request_error(error)
            if known is None:
                raise
            if known.status >= 500:
                log("index unusable", error=error, request=request.scope["state"]["request_id"])
            raise known from error
        finally:
            gone.cancel()
            if not job.done.done():
                self._batcher.abandon(job)
                self.metrics.abandoned.inc()

    def _run(self, jobs: Sequence[Job[Ranking | Task]]) -> list[Any]:
        """Run the jobs of a pass, in the worker thread: tasks first, in their order, then all rankings together."""
        results: list[Any] = [None] * len(jobs)
        rankings: dict[int, Any] = {}
        for number, job in enumerate(jobs):
            if isinstance(job.work, Ranking):
                rankings[number] = job
                continue
            try:
                results[number] = None if job.abandoned else job.work()
            except Exception as error:
                results[number] = error
        for number, result in zip(rankings, self._ranker.run(list(rankings.values())), strict=True):
            results[number] = result
        return results


def usable_threads(wanted: int | None) -> int:
    """Return the number of threads that compute: as wanted, or PyTorch's number, at most one per usable core.

    A CPU quota counts as that many cores, rounded down: threads beyond it would only be stopped in turns.
    """
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(torch.get_num_threads(), cores, cpu_quota() or math.inf)))


async def _disconnected(request: Request) -> None:
    """Return when the client has closed the connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _note(request: Request, **fields: Any) -> None:
    request.scope["state"]["log"] = fields
