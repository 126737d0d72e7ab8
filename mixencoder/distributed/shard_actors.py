"""Ray actors that each hold one shard of an index, in one or several replicas, and calls that survive lost ones.

Ray starts a lost actor again, which opens its shard again. Until then its calls go to the other replicas of the shard;
with a single replica they wait.
"""

import copy
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mixencoder.base.inference_context import inference_context
from mixencoder.base.results import RankResult
from mixencoder.errors import IndexStateError
from mixencoder.fast import MixEncoder
from mixencoder.modeling import QueryState
from mixencoder.ranking.index_ranker import IndexRanker

_FOREVER = -1


class ShardPath(NamedTuple):
    """Where a shard is, and its number of documents when it was opened first."""

    path: str
    documents: int


class Ranked(NamedTuple):
    """What an actor answers: a ranking per query with the positions of its shard, and the ids that it holds."""

    rankings: list[list[RankResult]]
    held: list[str]


class Home(NamedTuple):
    """Where an actor runs: the id of Ray's node, and that of its process there."""

    node: str
    process: int


class ShardActors:
    """The actors of all shards. Safe to use from several threads.

    A pickled copy, in another process of the cluster, calls the same actors. They end with the original's process.

    Args:
        ray: the module, connected to a cluster.
        engine: the model; a copy of it goes to every actor.
        shards: one entry each.
        replicas: actors per shard; on different machines, if there are as many with room.
        cpus, gpus: what each actor takes of its machine; cpus is also the number of its threads.
    """

    def __init__(
        self, ray: Any, engine: MixEncoder, shards: Sequence[ShardPath], *, replicas: int, cpus: int, gpus: float
    ) -> None:
        self._ray, self._lock, self._owner = ray, threading.Lock(), True
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": _FOREVER}
        # in a list, as Ray would replace an argument that is a reference by its value; kept for actors that start again
        self._held = [ray.put(engine if engine.device.type == "cpu" else copy.deepcopy(engine).to("cpu"))]
        self._groups: list[Any] = []
        self._replicas: list[list[_Replica]] = []
        for shard in shards:
            chosen: list[dict[str, Any]] = [{}]
            if replicas > 1:
                chosen = self._spread(replicas, {"CPU": cpus, "GPU": gpus})
            actors = [ray.remote(**options)(_Shard).options(**where) for where in chosen]
            self._replicas.append(
                [_Replica(actor.remote(self._held, shard, threads=cpus, on_gpu=gpus > 0)) for actor in actors]
            )

    def call(self, calls: Mapping[int, tuple[Any, ...]], deadline: float | None) -> tuple[dict[int, Ranked], list[int]]:
        """Call `_Shard.rank` of some shards, by number, and return the answers and the numbers of late shards.

        Args:
            calls: the arguments for each shard.
            deadline: seconds until a shard is late; None waits for all.

        Raises:
            ray.exceptions.RayError: an actor raised an error, or no replica of a shard can be started.
        """
        end = None if deadline is None else time.monotonic() + deadline
        waiting = dict(self._submit(number, given) for number, given in calls.items())
        found: dict[int, Ranked] = {}
        while waiting:
            left = None if end is None else max(0.0, end - time.monotonic())
            done, _ = self._ray.wait(list(waiting), timeout=left)
            if not done:
                break
            sent = waiting.pop(done[0])
            try:
                found[sent.shard] = self._ray.get(done[0])
            except self._ray.exceptions.RayActorError:
                if sent.waits:
                    raise
                with self._lock:
                    sent.replica.note_lost()
                call, again = self._submit(sent.shard, calls[sent.shard])
                waiting[call] = again
        for call in waiting:
            self._ray.cancel(call)
        return found, sorted(sent.shard for sent in waiting.values())

    def close(self) -> None:
        """End the actors; a copy leaves them to the original."""
        if self._owner:
            for replica in itertools.chain.from_iterable(self._replicas):
                self._ray.kill(replica.actor)
            for group in self._groups:
                self._ray.util.remove_placement_group(group)
        self._replicas, self._groups, self._held = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        return {"actors": [[replica.actor for replica in replicas] for replicas in self._replicas]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import ray

        self._ray, self._lock, self._owner, self._groups, self._held = ray, threading.Lock(), False, [], []
        self._replicas = [[_Replica(actor) for actor in actors] for actors in state["actors"]]

    def _spread(self, replicas: int, resources: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return options that put the replicas of a shard on different machines, as far as possible."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {name: count for name, count in resources.items() if count}
        group = self._ray.util.placement_group([bundle] * replicas, strategy="SPREAD")
        self._groups.append(group)
        strategies = [PlacementGroupSchedulingStrategy(group, number) for number in range(replicas)]
        return [{"scheduling_strategy": strategy} for strategy in strategies]

    def _submit(self, number: int, given: tuple[Any, ...]) -> tuple[Any, "_Sent"]:
        """Call the replica of a shard with the fewest unanswered calls, of those that run."""
        with self._lock:
            replicas = self._replicas[number]
            for replica in replicas:
                replica.update(self._ray)
            usable = [replica for replica in replicas if replica.error is None]
            if not usable:
                raise next(replica.error for replica in replicas if replica.error is not None)
            running = [replica for replica in usable if replica.starting is None]
            chosen = min(running or usable, key=lambda replica: (len(replica.calls), replica.used))
            # with another replica it is better to learn of a loss than to wait until the actor runs again
            waits = not running or len(usable) == 1
            call = chosen.actor.rank.options(max_task_retries=_FOREVER if waits else 0).remote(*given)
            chosen.calls.append(call)
            chosen.used += 1
            return call, _Sent(number, chosen, waits)


class _Replica:
    """What one process knows of an actor.

    Attributes:
        actor: its handle.
        calls: unanswered calls.
        used: number of calls.
        starting: of a lost actor, a call that is answered when it runs again.
        error: why it can never run again.
    """

    def __init__(self, actor: Any) -> None:
        self.actor, self.used = actor, 0
        self.calls: list[Any] = []
        self.starting: Any = None
        self.error: Exception | None = None

    def note_lost(self) -> None:
        """Note that the actor is lost; Ray starts it again."""
        if self.starting is None and self.error is None:
            self.starting = self.actor.ready.options(max_task_retries=_FOREVER).remote()

    def update(self, ray: Any) -> None:
        """Forget answered calls, and notice whether a lost actor runs again."""
        if self.calls:
            _, self.calls = ray.wait(self.calls, num_returns=len(self.calls), timeout=0)
        if self.starting is not None and ray.wait([self.starting], timeout=0)[0]:
            try:
                ray.get(self.starting)
            except ray.exceptions.RayActorError as error:
                self.error = error
            self.starting = None


class _Sent(NamedTuple):
    """Where a call went, and whether it waits for a lost actor to run again, or fails."""

    shard: int
    replica: _Replica
    waits: bool


class _Shard:
    """The actor: one shard, opened by its path."""

    def __init__(self, engine: Sequence[Any], shard: ShardPath, *, threads: int, on_gpu: bool) -> None:
        import ray

        torch.set_num_threads(threads)
        loaded: MixEncoder = ray.get(engine[0])
        self._engine = loaded.to("cuda") if on_gpu else loaded
        self._ranker = IndexRanker(self._engine.model, self._engine.identity)
        # one commit: positions must stay those that the driver counts with
        self._view = self._engine.open_index(shard.path, read_only=True).snapshot()
        if len(self._view) != shard.documents:
            raise IndexStateError(
                f"{shard.path} holds {len(self._view):,} documents; expected {shard.documents:,}, as when RayShards "
                "was made. Shards that are ranked must not change: make RayShards again"
            )

    def ready(self) -> "Home":
        """Return where this actor runs, as soon as it does."""
        import ray

        return Home(ray.get_runtime_context().get_node_id(), os.getpid())

    def rank(
        self,
        states: Sequence[QueryState],
        top_k: int | None,
        ids: list[str] | list[list[str]] | None,
        options: Mapping[str, Any],
    ) -> Ranked:
        """Rank this shard for encoded queries.

        Args:
            states: one for each query.
            top_k: how many to return.
            ids: None ranks all documents; a list of ids ranks those of them that this shard holds; a list of ids of
                this shard per query ranks these, and an empty one gives an empty ranking.
            options: score, products and return_documents of `MixEncoder.rank`.
        """
        held: list[str] = []
        if ids is not None and (not ids or isinstance(ids[0], str)):
            wanted = [name for name in ids if isinstance(name, str)]
            known = self._view.find(wanted)
            held = [name for name in wanted if name in known]
            ids = [held] * len(states)
        rankings: list[list[RankResult]] = [[] for _ in states]
        asked = [number for number in range(len(states)) if ids is None or ids[number]]
        if asked:
            names = None if ids is None else held or [ids[number] for number in asked]
            with inference_context(self._engine.model):
                some = self._ranker.rank(
                    [_moved(states[number], self._engine.device) for number in asked],
                    self._view,
                    top_k,
                    ids=names,
                    show_progress_bar=False,
                    prefilter=None,
                    first_stage=None,
                    activation_fn=None,
                    **options,
                )
            for number, ranking in zip(asked, some, strict=True):
                rankings[number] = ranking
        return Ranked(rankings, held)


def _moved(state: QueryState, device: torch.device) -> QueryState:
    """Return a query's state on a device."""

    def move(value: Any) -> Any:
        return tuple(map(move, value)) if isinstance(value, tuple) else None if value is None else value.to(device)

    return QueryState(*(move(getattr(state, field.name)) for field in dataclasses.fields(QueryState)))


def on_cpu(states: Sequence[QueryState]) -> list[QueryState]:
    """Return the states of queries in CPU memory, as processes exchange them."""
    return [_moved(state, torch.device("cpu")) for state in states]
