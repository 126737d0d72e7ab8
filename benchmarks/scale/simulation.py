"""Latency of a sharded index on many machines, with load and failures: a simulation.

    python -m benchmarks.scale.simulation --shards 100 --replicas 2 --documents 1000000 --rate 1

A query is encoded once, and goes to one machine of every shard twice: first for the best by dual score, then for the
full scores of these (`mixencoder.distributed.ray_shards`). A machine does one call after the other. It fails at random,
loses the calls that it has, and is back after a restart; a lost call is sent again. Everything is drawn from one seed.
"""

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.measuring.markdown import markdown
from benchmarks.scale.figures import read_figures

WARM_UP = 0.1
"""Share of the queries that are not counted: the first find empty queues."""
PERCENTILES = (50, 95, 99, 99.9)
SECONDS_OF_A_DAY = 86_400


@dataclass(frozen=True)
class Cluster:
    """Machines that hold an index: one shard each, every shard on as many machines as there are replicas.

    Attributes:
        shards: how many.
        replicas: machines for each shard.
        first_seconds: what the first call takes of a machine: dual scores of the whole shard.
        second_seconds: what the second call takes: full scores of the shard's documents among the best.
        spread: standard deviation of the logarithm of a call's time; the times above are medians.
        hop_seconds: on the network, for every call and its answer.
        failures_per_day: of one machine, on average.
        restart_seconds: from a failure until the machine answers again.
        retry_seconds: from a failure until lost calls are sent again.

    Raises:
        ValueError: a count is below 1, or a time or rate is negative.
    """

    shards: int
    first_seconds: float
    second_seconds: float
    replicas: int = 1
    query_seconds: float = 0.0
    spread: float = 0.2
    hop_seconds: float = 0.001
    failures_per_day: float = 0.0
    restart_seconds: float = 60.0
    retry_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.shards < 1 or self.replicas < 1:
            raise ValueError(f"shards is {self.shards}, replicas {self.replicas}; expected at least 1 of each")
        for name in (
            "first_seconds",
            "second_seconds",
            "query_seconds",
            "spread",
            "hop_seconds",
            "failures_per_day",
            "restart_seconds",
            "retry_seconds",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number from 0 on")

    @property
    def machines(self) -> int:
        """Machines in all."""
        return self.shards * self.replicas


class Outcome(NamedTuple):
    """What happened to the queries that count.

    Attributes:
        seconds: (Q,), from a query's arrival to its answer.
        missing: (Q,), calls that the deadline cut off; an answer with any is partial.
        busy: share of the time that machines work, lost calls included.
    """

    seconds: np.ndarray
    missing: np.ndarray
    busy: float

    def percentile(self, percent: float) -> float:
        """Seconds within which so many percent of the queries are answered."""
        return float(np.percentile(self.seconds, percent))

    @property
    def partial(self) -> float:
        """Share of the answers that lack a shard."""
        return float((self.missing > 0).mean())


def simulate(cluster: Cluster, rate: float, queries: int, *, deadline: float | None = None, seed: int = 0) -> Outcome:
    """Simulate queries that arrive at random (a Poisson process).

    Args:
        cluster: the machines.
        rate: queries in a second, on average.
        queries: how many, at least 10.
        deadline: seconds after which each of the two steps goes on without the calls that have not answered.
        seed: of all random numbers.

    Raises:
        ValueError: rate or deadline is not positive, or there are fewer than ten queries.
    """
    if not rate > 0 or (deadline is not None and not deadline > 0) or queries < 10:
        raise ValueError(
            f"rate is {rate}, deadline {deadline}, queries {queries}; expected a positive rate, a positive deadline or "
            "None, and at least 10 queries"
        )
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, queries))
    machines = _Machines(cluster, rng)
    ends, missing = np.zeros(queries), np.zeros(queries, dtype=np.int64)
    steps = [_Step(cluster, float("inf"), 0) for _ in range(queries)]
    # (when, tie, query, number of the step or None, the shards that are called): a heap, by time
    events: list[tuple[float, int, int, int | None, np.ndarray]] = []
    everything = np.arange(cluster.shards)
    for query, arrival in enumerate(arrivals + cluster.query_seconds):
        events.append((float(arrival), query, query, 0, everything))
    tie = queries
    while events:
        now, _, query, begun, shards = heapq.heappop(events)
        if begun is not None:
            steps[query] = _Step(cluster, float("inf") if deadline is None else now + deadline, begun)
        step = steps[query]
        answered, lost = machines.call(now, shards, step.number)
        step.answer(answered)
        for when in np.unique(lost[np.isfinite(lost)]):
            tie += 1
            again = (float(when) + cluster.retry_seconds, tie, query, None, shards[lost == when])
            if again[0] < step.limit:
                heapq.heappush(events, again)
            else:
                step.answer(np.full(len(again[4]), np.inf))
        if step.open:
            continue
        missing[query] += step.late
        if step.number == 0:
            tie += 1
            heapq.heappush(events, (step.end, tie, query, 1, everything))
        else:
            ends[query] = step.end
    counted = slice(int(queries * WARM_UP), None)
    return Outcome((ends - arrivals)[counted], missing[counted], machines.worked / (cluster.machines * ends.max()))


class _Step:
    """One step of one query: the calls to all shards, until the last has answered or the limit has passed."""

    def __init__(self, cluster: Cluster, limit: float, number: int) -> None:
        self.number, self.limit = number, limit
        self.open, self.late, self.end = cluster.shards, 0, 0.0

    def answer(self, times: np.ndarray) -> None:
        """Take in when calls answered."""
        late = int((times > self.limit).sum())
        self.open -= len(times)
        self.late += late
        if len(times):
            self.end = max(self.end, self.limit if late else float(times.max()))


class _Machines:
    """All machines: when each has done what it was given, and when it fails next."""

    def __init__(self, cluster: Cluster, rng: np.random.Generator) -> None:
        self._cluster, self._rng = cluster, rng
        shape = (cluster.shards, cluster.replicas)
        self._free = np.zeros(shape)
        self._days = SECONDS_OF_A_DAY / cluster.failures_per_day if cluster.failures_per_day else float("inf")
        self._fails = self._lives(shape)
        self.worked = 0.0

    def _lives(self, shape: int | tuple[int, ...]) -> np.ndarray:
        """Draw times until the next failure."""
        return self._rng.exponential(self._days, shape) if np.isfinite(self._days) else np.full(shape, np.inf)

    def call(self, now: float, shards: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Give each of some shards a call, on the replica that is free first.

        Returns:
            When the calls that are not lost answer, and for every call when it is lost (infinite: it is not).
        """
        cluster = self._cluster
        self._restart(now)
        replicas = np.maximum(self._free[shards], now).argmin(axis=1)
        median = cluster.second_seconds if step else cluster.first_seconds
        service = median * np.exp(cluster.spread * self._rng.standard_normal(len(shards)))
        end = np.maximum(self._free[shards, replicas], now) + service
        fails = self._fails[shards, replicas]
        lost = np.where(end > fails, fails, np.inf)
        self.worked += float(service.sum())
        # what comes later waits behind a call that will be lost, and is lost with it
        self._free[shards, replicas] = end
        return end[np.isinf(lost)] + cluster.hop_seconds, lost

    def _restart(self, now: float) -> None:
        """Drop the calls of machines that have failed until now; they are free again after their restart."""
        while (failed := self._fails <= now).any():
            self._free[failed] = self._fails[failed] + self._cluster.restart_seconds
            self._fails[failed] = self._free[failed] + self._lives(int(failed.sum()))


def table(rows: Sequence[tuple[str, Cluster, Outcome]]) -> str:
    """Return outcomes as a Markdown table."""
    header = ["", "machines", *(f"p{percent:g}" for percent in PERCENTILES), "partial answers", "busy"]
    lines = [header, ["---"] * len(header)]
    for name, cluster, outcome in rows:
        times = [f"{outcome.percentile(percent) * 1000:,.0f} ms" for percent in PERCENTILES]
        lines.append([name, f"{cluster.machines:,}", *times, f"{outcome.partial:.2%}", f"{outcome.busy:.0%}"])
    return markdown(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.simulation", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--documents", type=int, required=True, help="of each shard; a machine holds one")
    parser.add_argument("--replicas", type=int, default=1, help="machines for each shard")
    parser.add_argument("--rate", type=float, default=1.0, help="queries in a second")
    parser.add_argument("--first-stage", type=float, help="seconds of a vector index, instead of reading all documents")
    parser.add_argument("--failures", type=float, default=0.0, help="of a machine in a day")
    parser.add_argument("--restart", type=float, default=60.0, help="seconds until a failed machine answers again")
    parser.add_argument("--retry", type=float, default=1.0, help="seconds until a lost call is sent again")
    parser.add_argument("--spread", type=float, default=0.2, help="standard deviation of the log of a call's time")
    parser.add_argument("--deadline", type=float, help="seconds for each of the two steps")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    figures = read_figures()
    stage = options.first_stage
    first = options.documents * figures.dual_per_document if stage is None else stage
    try:
        cluster = Cluster(
            options.shards,
            first,
            figures.interaction,
            replicas=options.replicas,
            query_seconds=figures.query,
            spread=options.spread,
            failures_per_day=options.failures,
            restart_seconds=options.restart,
            retry_seconds=options.retry,
        )
        outcome = simulate(cluster, options.rate, options.queries, deadline=options.deadline, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    print(table([(f"{options.shards} shards of {options.documents:,}, {options.rate:g} a second", cluster, outcome)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
