"""Ranking the shards of an index in Ray actors: each holds one shard and a model, and ranks it alone.

The driver merges the rankings by score, ties to the lower position, as a single index does. Since a score does not
depend on what else is ranked (docs/determinism.md), the result is that of one index with the same documents, bit for
bit. Ray starts a lost actor again, which opens its shard again, and repeats its call.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixencoder.base.inputs import as_list, positive_integer
from mixencoder.base.results import RankResult
from mixencoder.distributed.ray_build import start_ray
from mixencoder.errors import InputError
from mixencoder.fast import MixEncoder
from mixencoder.index import ShardedIndex
from mixencoder.index.shard_list import shard_paths
from mixencoder.ranking.prefilter import check_prefilter, chosen_prefilter


class ShardRankings(NamedTuple):
    """Rankings of all shards that answered in time.

    Attributes:
        rankings: one list of results per query, best first; "corpus_id" is the position over all shards.
        missing: the paths of shards that did not answer before the deadline; their documents are in no ranking.
    """

    rankings: list[list[RankResult]]
    missing: list[str]

    @property
    def partial(self) -> bool:
        """Whether a shard is missing."""
        return bool(self.missing)


class RayShards:
    """The shards of an index, each in a Ray actor of its own that ranks it. Close it to free the actors.

    Args:
        engine: the model; a copy of it goes to every actor.
        path: a folder of shards or a list of the paths of indexes, as in `MixEncoder.open_index`; every machine must
            reach them.
        cpus, gpus: what each actor takes of its machine; cpus is also the number of its threads.
        address: of a running cluster, as in `mixencoder.distributed.ray_build.build_index`.

    Attributes:
        paths: of the shards, in order.
        documents: of each shard.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the path is that of a single index.
        IndexMismatchError: another encoder made the shards, or they differ.
        IndexStateError, IndexDamagedError: a shard cannot be opened.
    """

    def __init__(
        self,
        engine: MixEncoder,
        path: str | Path | Iterable[str | Path],
        *,
        cpus: int = 1,
        gpus: float = 0.0,
        address: str | None = None,
    ) -> None:
        found = shard_paths(path)
        if found is None:
            raise InputError(f"{path} is no folder of shards; expected one, or a list of the paths of indexes")
        self.paths = [str(each.resolve()) for each in found]
        # checks that the shards are of this encoder and alike
        with engine.open_index(self.paths, read_only=True) as index:
            assert isinstance(index, ShardedIndex), "a list of paths is opened as shards"
            self.documents = [len(shard) for shard in index.shards]
        self._starts = [0, *itertools.accumulate(self.documents)]
        self._has_dual = engine.config.dual_term
        self._ray = start_ray(address)
        actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Shard)
        held = [self._ray.put(engine)]
        self._actors = [actor.remote(held, each, threads=cpus, on_gpu=gpus > 0) for each in self.paths]

    def __len__(self) -> int:
        return self._starts[-1]

    def __enter__(self) -> "RayShards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rank(
        self,
        query: str | Iterable[str],
        top_k: int,
        *,
        prefilter: int | str | None = "auto",
        deadline: float | None = None,
        **options: Any,
    ) -> ShardRankings:
        """Rank the documents of all shards for queries, as `MixEncoder.rank` ranks a single index of them.

        Args:
            query: one text, or several.
            top_k: how many to return for each.
            prefilter: as in `MixEncoder.rank`, over the documents of all shards together.
            deadline: seconds after which shards that have not answered are left out; None waits for all.
            options: return_documents, score, return_probabilities and products, as in `MixEncoder.rank`.

        Raises:
            InputError: there is no query or no document, or an option is invalid.
            ray.exceptions.RayError: a shard failed otherwise than by being lost, or its error.
        """
        queries = [query] if isinstance(query, str) else as_list(query, "query")
        top_k = positive_integer(top_k, "top_k")
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline!r}; expected a positive number of seconds, or None")
        if not queries or not len(self):
            raise InputError(f"there are {len(queries)} queries and {len(self)} documents; expected some of both")
        score = options.get("score", "full")
        prefilter = check_prefilter(prefilter)
        kept = chosen_prefilter(prefilter, len(self), top_k, score=score, has_dual=self._has_dual)
        held = [number for number, count in enumerate(self.documents) if count]
        if kept is None or kept >= len(self):
            calls = dict.fromkeys(held, (queries, top_k, None, options))
            found, missing = self._called(calls, deadline)
            return ShardRankings([_best(found, query, top_k) for query in range(len(queries))], missing)
        # the best by dual score of all shards, then these alone in full, each in its shard
        found, missing = self._called({n: (queries, kept, None, {"score": "dual"}) for n in held}, deadline)
        chosen = [_best(found, query, kept) for query in range(len(queries))]
        calls = {}
        for number in held:
            first, last = self._starts[number], self._starts[number + 1]
            ids = [[entry["id"] for entry in best if first <= entry["corpus_id"] < last] for best in chosen]
            if any(ids):
                calls[number] = (queries, top_k, ids, options)
        found, late = self._called(calls, deadline)
        return ShardRankings([_best(found, query, top_k) for query in range(len(queries))], missing + late)

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def _called(
        self, calls: Mapping[int, tuple[Any, ...]], deadline: float | None
    ) -> tuple[list[list[list[RankResult]]], list[str]]:
        """Return the rankings of shards, with positions over all shards, and the paths of those that were late."""
        waiting = {self._actors[number].rank.remote(*given): number for number, given in calls.items()}
        done, late = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=deadline)
        for call in late:
            self._ray.cancel(call)
        found = []
        for call in done:
            start = self._starts[waiting[call]]
            rankings: list[list[RankResult]] = self._ray.get(call)
            for entry in itertools.chain.from_iterable(rankings):
                entry["corpus_id"] += start
            found.append(rankings)
        return found, sorted(self.paths[waiting[call]] for call in late)


def _best(found: Sequence[Sequence[Sequence[RankResult]]], query: int, count: int) -> list[RankResult]:
    """Merge the shards' rankings of a query."""
    entries = itertools.chain.from_iterable(rankings[query] for rankings in found)
    return sorted(entries, key=lambda entry: (-entry["score"], entry["corpus_id"]))[:count]


class _Shard:
    """The actor: one shard, opened by its path."""

    def __init__(self, engine: Sequence[Any], path: str, *, threads: int, on_gpu: bool) -> None:
        import ray

        torch.set_num_threads(threads)
        loaded: MixEncoder = ray.get(engine[0])
        self._engine = loaded.to("cuda") if on_gpu else loaded
        self._index = self._engine.open_index(path, read_only=True)

    def rank(
        self, queries: list[str], top_k: int, ids: list[list[str]] | None, options: Mapping[str, Any]
    ) -> list[list[RankResult]]:
        """Rank this shard, or documents of it by id; a query without any has an empty ranking."""
        if ids is None:
            return self._engine.rank(queries, self._index, top_k, prefilter=None, **options)
        asked = [number for number, names in enumerate(ids) if names]
        rankings: list[list[RankResult]] = [[] for _ in queries]
        some = self._engine.rank(
            [queries[number] for number in asked],
            self._index,
            top_k,
            ids=[ids[number] for number in asked],
            prefilter=None,
            **options,
        )
        for number, ranking in zip(asked, some, strict=True):
            rankings[number] = ranking
        return rankings
