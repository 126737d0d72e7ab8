"""Cache of encoded queries, so that a repeated query needs no pass of the backbone."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mixencoder.base.weights_version import version_in_call
from mixencoder.modeling import QueryState


class QueryStateCache:
    """States of single queries by their token ids; drops the least recently used ones first. Safe to use from threads.

    All states are dropped when the model's weights change (`mixencoder.base.weights_version`). A copy of the cache,
    by `copy` or `pickle`, starts empty.

    Args:
        max_bytes: limit for all states together; 0 keeps none.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        """Bytes of the states held."""
        self._states: OrderedDict[tuple[int, ...], QueryState] = OrderedDict()
        self._version: int | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

    def fetch(
        self, model: nn.Module, rows: Sequence[Sequence[int]], encode: Callable[[list[tuple[int, ...]]], QueryState]
    ) -> list[QueryState]:
        """Return a state for every query, B = 1, cut to the query's length.

        Args:
            model: the model that encodes queries.
            rows: token ids of the queries; may contain repeats.
            encode: encodes distinct queries into one state; called at most once, with the queries that are not cached.
        """
        keys = [tuple(row) for row in rows]
        version = version_in_call(model)
        with self._lock:
            if version != self._version:
                self._states.clear()
                self.nbytes, self._version = 0, version
            found = {key: self._states[key] for key in keys if key in self._states}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            encoded = encode(missing)
            # copied, as a view would keep the states of the whole batch in memory
            found |= {key: _copied(encoded.select(number)) for number, key in enumerate(missing)}
        with self._lock:
            if version == self._version:
                for key in dict.fromkeys(keys):
                    self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: tuple[int, ...], state: QueryState) -> None:
        if key not in self._states:
            self._states[key] = state
            self.nbytes += _nbytes(state)
        self._states.move_to_end(key)
        while self.nbytes > self.max_bytes:
            _, dropped = self._states.popitem(last=False)
            self.nbytes -= _nbytes(dropped)


def _tensors(state: QueryState) -> list[Tensor]:
    vectors = [vector for vector in (state.pooled, state.first) if vector is not None]
    return [*state.keys, *state.values, state.lengths, *vectors]


def _nbytes(state: QueryState) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))


def _copied(state: QueryState) -> QueryState:
    return QueryState(
        tuple(key.clone() for key in state.keys),
        tuple(value.clone() for value in state.values),
        state.lengths.clone(),
        None if state.pooled is None else state.pooled.clone(),
        None if state.first is None else state.first.clone(),
    )
