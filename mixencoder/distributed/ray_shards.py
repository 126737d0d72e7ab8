"""Ranking the shards of an index in Ray actors: each holds one shard and a model, and ranks it alone.

The driver encodes the queries and merges the rankings by score, ties to the lower position, as a single index does.
Since a score does not depend on what else is ranked (docs/determinism.md), the result is that of one index with the
same documents, bit for bit.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixencoder.base.inputs import as_list, positive_integer, positive_integer_or_none
from mixencoder.base.results import RankResult, document_names
from mixencoder.distributed.ray_build import start_ray
from mixencoder.distributed.shard_actors import Ranked, ShardActors, ShardPath, on_cpu
from mixencoder.errors import DuplicateIdError, InputError, UnknownIdError
from mixencoder.fast import SCORES, MixEncoder
from mixencoder.index import ShardedIndex
from mixencoder.index.messages import quoted_ids
from mixencoder.index.shard_list import shard_paths
from mixencoder.modeling import QueryState
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
    """The shards of an index, each in Ray actors that rank it. Close it to free the actors.

    Shards must not change meanwhile. A pickled copy, in another process of the cluster, uses the same actors; it ranks
    by `rank_states` only, and its `close` does nothing. Safe to use from several threads.

    Args:
        engine: the model; a copy of it goes to every actor.
        path: a folder of shards or a list of the paths of indexes, as in `MixEncoder.open_index`; every machine must
            reach them.
        replicas: actors per shard. Calls go to the one with the fewest unanswered calls; while a lost one is started
            again, to the others.
        cpus, gpus: what each actor takes of its machine; cpus is also the number of its threads.
        address: of a running cluster, as in `mixencoder.distributed.ray_build.build_index`.

    Attributes:
        paths: of the shards, in order.
        documents: of each shard.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: the path is that of a single index, or replicas or cpus is not a positive integer.
        IndexMismatchError: another encoder made the shards, or they differ.
        IndexStateError, IndexDamagedError: a shard cannot be opened.
    """

    def __init__(
        self,
        engine: MixEncoder,
        path: str | Path | Iterable[str | Path],
        *,
        replicas: int = 1,
        cpus: int = 1,
        gpus: float = 0.0,
        address: str | None = None,
    ) -> None:
        replicas, cpus = positive_integer(replicas, "replicas"), positive_integer(cpus, "cpus")
        found = shard_paths(path)
        if found is None:
            raise InputError(f"{path} is no folder of shards; expected one, or a list of the paths of indexes")
        self.paths = [str(each.resolve()) for each in found]
        # checks that the shards are of this encoder and alike
        with engine.open_index(self.paths, read_only=True) as index:
            assert isinstance(index, ShardedIndex), "a list of paths is opened as shards"
            self.documents = [len(shard) for shard in index.shards]
        self._starts = [0, *itertools.accumulate(self.documents)]
        self._engine: MixEncoder | None = engine
        self._has_dual = engine.config.dual_term
        shards = [ShardPath(*shard) for shard in zip(self.paths, self.documents, strict=True)]
        self._ray = start_ray(address, held_cores=len(shards) * replicas * cpus)
        self._actors = ShardActors(self._ray, engine, shards, replicas=replicas, cpus=cpus, gpus=gpus)

    def __len__(self) -> int:
        return self._starts[-1]

    def __enter__(self) -> "RayShards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ray"} | {"_engine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import ray

        self.__dict__.update(state, _ray=ray)

    def rank(
        self,
        query: str | Iterable[str],
        top_k: int | None,
        *,
        prefilter: int | str | None = "auto",
        deadline: float | None = None,
        return_probabilities: bool = False,
        **options: Any,
    ) -> ShardRankings:
        """Rank the documents of all shards for queries, as `MixEncoder.rank` ranks a single index of them.

        Args:
            query: one text, or several.
            top_k: how many to return for each; None returns all.
            prefilter: as in `MixEncoder.rank`, over the documents of all shards together.
            deadline: seconds after which shards that have not answered are left out; None waits for all. With a
                prefilter shards are asked twice, and each time may take so long. Encoding the queries does not count.
            return_probabilities: as in `MixEncoder.rank`.
            options: ids, return_documents, score and products, as in `rank_states`.

        Raises:
            InputError: as `rank_states`, or this is a copy.
            UnknownIdError, DuplicateIdError, ray.exceptions.RayError: as `rank_states`.
        """
        if self._engine is None:
            raise InputError("a copy of RayShards has no model; encode the queries (query_states) and use rank_states")
        if return_probabilities and options.get("score", "full") != "full":
            raise InputError('return_probabilities needs full scores; expected score="full"')
        queries = [query] if isinstance(query, str) else as_list(query, "query")
        states = self._engine.query_states(queries) if queries else []
        found = self.rank_states(states, top_k, prefilter=prefilter, deadline=deadline, **options)
        if return_probabilities:
            for entry in itertools.chain.from_iterable(found.rankings):
                entry["probability"] = float(self._engine.probability(entry["score"]))
        return found

    def rank_states(
        self,
        states: Sequence[QueryState],
        top_k: int | None,
        *,
        ids: Iterable[str] | None = None,
        prefilter: int | str | None = "auto",
        deadline: float | None = None,
        return_documents: bool = False,
        score: str = "full",
        products: str = "native",
    ) -> ShardRankings:
        """Rank for encoded queries.

        Args:
            states: from `MixEncoder.query_states`, of the same model.
            top_k, prefilter, deadline: as in `rank`.
            ids: rank only these documents.
            return_documents, score, products: as in `MixEncoder.rank`.

        Raises:
            InputError: there is no query or no document, or an option is invalid.
            UnknownIdError: no shard holds one of the ids, and all shards answered.
            DuplicateIdError: an id is given twice.
            ray.exceptions.RayError: an actor raised an error, or can never run again.
        """
        top_k = positive_integer_or_none(top_k, "top_k")
        prefilter = check_prefilter(prefilter)
        names = None if ids is None else _distinct(document_names(ids))
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline is {deadline!r}; expected a positive number of seconds, or None")
        count = len(self) if names is None else len(names)
        if not states or not count:
            raise InputError(f"there are {len(states)} queries and {count} documents; expected some of both")
        if score not in SCORES or (score == "dual" and not self._has_dual):
            known = ", ".join(name for name in SCORES if name != "dual" or self._has_dual)
            raise InputError(f"score is {score!r}; expected one of {known}")
        queries = range(len(states))
        # by reference: every machine gets it once
        sent = self._ray.put(on_cpu(states))
        options = {"return_documents": return_documents, "score": score, "products": products}
        dual = {"return_documents": False, "score": "dual", "products": "native"}
        kept = chosen_prefilter(prefilter, count, top_k, score=score, has_dual=self._has_dual)
        first = (sent, top_k, names, options) if kept is None or kept >= count else (sent, kept, names, dual)
        held = [number for number, documents in enumerate(self.documents) if documents]
        found, missing = self._called(dict.fromkeys(held, first), deadline)
        if names is not None and not missing:
            known = set(itertools.chain.from_iterable(ranked.held for ranked in found))
            if unknown := [name for name in names if name not in known]:
                raise UnknownIdError(f"no document has the id {quoted_ids(unknown)}; expected ids that the shards hold")
        if first[3] is dual:
            # the best by dual score of all shards, then these alone in full, each in its shard
            chosen = [_best(found, query, kept) for query in queries]
            calls = {}
            for number in held:
                start, end = self._starts[number], self._starts[number + 1]
                wanted = [[entry["id"] for entry in best if start <= entry["corpus_id"] < end] for best in chosen]
                if any(wanted):
                    calls[number] = (sent, top_k, wanted, options)
            found, late = self._called(calls, deadline)
            missing = sorted({*missing, *late})
        rankings = [_best(found, query, top_k) for query in queries]
        return ShardRankings(rankings, [self.paths[number] for number in missing])

    def close(self) -> None:
        """End the actors."""
        self._actors.close()

    def _called(self, calls: Mapping[int, tuple[Any, ...]], deadline: float | None) -> tuple[list[Ranked], list[int]]:
        """Return the answers of shards, with positions over all shards, and the numbers of those that were late."""
        found, late = self._actors.call(calls, deadline)
        for number, ranked in found.items():
            for entry in itertools.chain.from_iterable(ranked.rankings):
                entry["corpus_id"] += self._starts[number]
        return list(found.values()), late


def _best(found: Sequence[Ranked], query: int, count: int | None) -> list[RankResult]:
    """Merge the shards' rankings of a query."""
    entries = itertools.chain.from_iterable(ranked.rankings[query] for ranked in found)
    return sorted(entries, key=lambda entry: (-entry["score"], entry["corpus_id"]))[:count]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]
        raise DuplicateIdError(f"ids names {quoted_ids(twice)} more than once; expected each document once")
    return names
