"""Score (query, candidate) pairs in chunks of fixed size, so that a pair's score does not depend on the other pairs.

Libraries may compute a row's bits differently in products of another shape or in another row (docs/determinism.md). So
all chunks have the same shape, and random candidates are scored first to find out which size of chunk gives equal rows
equal bits. Where a chunk's attention does not, every candidate attends in products of its own. On a CPU each chunk is
scored on one thread, several chunks in parallel. The texts are encoded before, in `mixencoder.base.encoder_passes`,
with the same guarantee.

`mixencoder.fast` is the caller.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.base.scores import Pairs, check_finite
from mixencoder.base.threads import on_one_thread, run_in_order
from mixencoder.modeling import MixEncoderModel, QueryState
from mixkernels import candidate_attention

CHUNK = 64
"""Pairs scored at once. Fixed, because products of other shapes may round differently."""
_CHUNK_IN_TWELVES = 96
"""Used if the bits in a chunk of 64 depend on the row: MKL's products for AVX2 work in tiles of 6 or 12 rows, and may
sum the rows left over in another order."""
_TRIED_LENGTH = 8
"""Query tokens of the trial that decides between the two."""

_SHIFT = 17
"""Rows by which candidates are moved in a trial: they get to another row of a tile, whatever the size of tiles."""


class _Segment(NamedTuple):
    """Consecutive rows of a chunk that belong to one query."""

    query: QueryState
    count: int
    together: bool
    """Whether the whole chunk attends to the query in one product, of which these rows are kept; else each row by
    itself."""


class PairScorer:
    """Scores pairs with a model. Safe to use from several threads.

    Remembers which sizes and ways keep a row's bits on this machine.

    Args:
        model: in inference mode.
    """

    def __init__(self, model: MixEncoderModel) -> None:
        self._model = model
        # results of trials; need no lock, as two threads that try at the same time find the same
        self._sizes: dict[torch.dtype, int] = {}
        self._together: dict[tuple[int, torch.dtype], bool] = {}
        self._all_threads: dict[tuple[int, int, torch.dtype], bool] = {}

    @torch.inference_mode()
    def score(self, query_state: QueryState, candidates: Tensor, pairs: Pairs, *, head: str, score: str) -> Tensor:
        """Score R pairs, sorted by query.

        Returns:
            (R,) float32 for the ranking head, (R, num_labels) for the classification head.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        device, total = candidates.device, len(pairs.query)
        if not total:
            return torch.empty(0, device=device, dtype=torch.float32)
        size = self._chunk_size()
        # repeat the last pair to fill the last chunk
        padded = -(-total // size) * size
        query_of = torch.cat([pairs.query, pairs.query[-1:].expand(padded - total)])
        candidate_of = torch.cat([pairs.candidate, pairs.candidate[-1:].expand(padded - total)]).to(device)
        apply_head = partial(self._apply_head, head, score)
        only_dual = score == "dual" and head == "ranking"

        def score_chunk(start: int) -> Tensor:
            numbers = query_of[start : start + size]
            rows = candidates[candidate_of[start : start + size]]
            pooled, first = (
                None if vectors is None else vectors[numbers.to(device)]
                for vectors in (query_state.pooled, query_state.first)
            )
            if only_dual:
                dual = self._model.dual_term(pooled, rows.mean(dim=-2))
                assert dual is not None, "the caller rejects a score that the model does not have"
                return dual
            with torch.inference_mode():
                return apply_head(*self._interact(self._segments(query_state, numbers), rows, first), pooled, rows)

        starts = range(0, padded, size)
        threads = torch.get_num_threads()
        if only_dual or threads == 1 or not self._on_cpu:
            parts = [score_chunk(start) for start in starts]
        else:
            lengths = query_state.lengths[query_of.unique()].unique().tolist()
            on_all = len(starts) == 1 and all(self._may_use_all_threads(length, threads) for length in lengths)
            parts = [score_chunk(0)] if on_all else list(run_in_order(score_chunk, starts, threads))
        return check_finite(torch.cat(parts)[:total].float(), candidates.dtype)

    @property
    def _on_cpu(self) -> bool:
        """Whether the model runs on PyTorch's CPU operators; elsewhere there are no trials and no parallel chunks."""
        return self._model.device.type == "cpu" and self._model.kernel_backend in ("auto", "torch")

    def _apply_head(
        self, head: str, score: str, h: Tensor, e: Tensor, pooled_query: Tensor | None, rows: Tensor
    ) -> Tensor:
        vectors = (h.view(len(rows), -1), e.view(len(rows), -1), pooled_query, rows.mean(dim=-2))
        if head == "ranking":
            return getattr(self._model.rank_head(*vectors), score)
        return self._model.classification_head(*vectors)

    def _segments(self, query_state: QueryState, numbers: Tensor) -> list[_Segment]:
        distinct, counts = torch.unique_consecutive(numbers, return_counts=True)
        parts = zip(distinct.tolist(), counts.tolist(), strict=True)
        states = [(query_state.select(number), count) for number, count in parts]
        return [_Segment(state, count, self._attends_together(int(state.lengths))) for state, count in states]

    def _interact(self, segments: list[_Segment], rows: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        attends = [
            partial(_attend_segments, segments, layer, self._model.kernel_backend)
            for layer in range(len(self._model.interaction))
        ]
        return self._model.run_interaction(rows, attends, first)

    def _chunk_size(self) -> int:
        """Number of pairs in a chunk."""
        if not self._on_cpu:
            return CHUNK
        if (dtype := self._model.dtype) not in self._sizes:
            sizes = (CHUNK, _CHUNK_IN_TWELVES)
            # the attention of a whole chunk is tried first: it is faster, and seldom at fault
            trials = (
                any(self._keeps_bits(_TRIED_LENGTH, size, together=together) for together in (True, False))
                for size in sizes
            )
            self._sizes[dtype] = next((size for size, keeps in zip(sizes, trials, strict=True) if keeps), CHUNK)
        return self._sizes[dtype]

    def _attends_together(self, length: int) -> bool:
        """Whether a whole chunk can attend to a query of `length` tokens in one product and keep each row's bits."""
        key = length, self._model.dtype
        if self._on_cpu and key not in self._together:
            self._together[key] = self._keeps_bits(length, self._chunk_size(), together=True)
        return self._together.get(key, True)

    def _keeps_bits(self, length: int, size: int, *, together: bool) -> bool:
        """Whether candidates keep the bits of their vectors when they move to other rows of a chunk."""
        trial = partial(self._random_vectors, length, size, together=together)
        before, after = on_one_thread(trial), on_one_thread(partial(trial, shift=_SHIFT))
        return torch.equal(before.roll(_SHIFT, dims=0), after)

    def _may_use_all_threads(self, length: int, threads: int) -> bool:
        """Whether a chunk gives the same bits on all threads as on one."""
        if self._model.dtype.itemsize < 4:
            # a narrow dtype rounds most differences away, so a trial would often miss them
            return False
        key = length, threads, self._model.dtype
        if key not in self._all_threads:
            trial = partial(self._random_vectors, length, self._chunk_size(), together=self._attends_together(length))
            self._all_threads[key] = torch.equal(on_one_thread(trial), trial())
        return self._all_threads[key]

    @torch.inference_mode()
    def _random_vectors(self, length: int, size: int, *, together: bool, shift: int = 0) -> Tensor:
        """Vectors h and e, (size, 2, d), of a chunk of random candidates, which are rotated by `shift` rows.

        The candidates and the query of `length` tokens are the same in every call.
        """
        model, generator = self._model, torch.Generator().manual_seed(length)
        heads, (k, d) = model.config.backbone_config.num_attention_heads, model.context_shape

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(model.dtype)

        layers = range(len(model.interaction))
        keys, values = (tuple(random(1, length, heads, d // heads) for _ in layers) for _ in range(2))
        query = QueryState(keys, values, torch.tensor([length], device="cpu"), pooled=None)
        rows = random(size, k, d).roll(shift, dims=0)
        first = None if model.config.state_row else random(1, d).expand(size, -1)
        h, e = self._interact([_Segment(query, size, together)], rows, first)
        return torch.stack([h.view(size, -1), e.view(size, -1)], dim=1)


def _attend_segments(
    segments: Sequence[_Segment],
    layer: int,
    backend: str,
    context_query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    state_query: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute a chunk's attention, segment by segment: results of contexts, and of states if the model has any."""
    contexts, states, start = [], [], 0
    for query, count, together in segments:
        kept = slice(start, start + count)
        rows = (context_query, context_key, context_value, state_query)
        attend = _attend_whole_chunk if together else _attend_each
        context, state = attend(rows, kept, query.keys[layer], query.values[layer], backend)
        contexts.append(context)
        if state is not None:
            states.append(state)
        start += count
    return _concatenated(contexts), _concatenated(states) if states else None


_Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""A chunk's context queries, keys and values, and state queries."""


def _attend_whole_chunk(
    rows: _Rows, kept: slice, key: Tensor, value: Tensor, backend: str
) -> tuple[Tensor, Tensor | None]:
    """All rows attend to one query, and the kept ones are returned: no product's shape depends on their number."""
    result = candidate_attention(*rows, key, value, backend=backend)
    return result.context[:, kept], None if result.state is None else result.state[:, kept]


def _attend_each(rows: _Rows, kept: slice, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """As `_attend_whole_chunk`, but with products for each row alone: slower, with the same bits in every row."""
    # C queries with one candidate each; the queries are one, expanded. Rows are (C, ...), or (1, C, ...) after layer 1
    query, context_key, context_value = (part.reshape(-1, 1, *part.shape[-3:]) for part in rows[:3])
    state = None if rows[3] is None else rows[3].reshape(-1, 1, *rows[3].shape[-2:])
    key, value = (part.expand(len(query), -1, -1, -1) for part in (key, value))
    result = candidate_attention(query, context_key, context_value, state, key, value, backend=backend)
    context, attended = result.context.transpose(0, 1), result.state
    return context[:, kept], None if attended is None else attended.transpose(0, 1)[:, kept]


def _concatenated(parts: list[Tensor]) -> Tensor:
    """Concatenate parts (1, count, ...) of a chunk; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
