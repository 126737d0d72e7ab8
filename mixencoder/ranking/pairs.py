"""Scoring packed rows of (query, candidate): every chunk has one shape, whatever it holds.

That is half of the promise that a candidate's score does not depend on its neighbours (docs/determinism.md); the other
half, encoding, is in `mixencoder.base.encoder_passes`. On a CPU a chunk is scored on one thread, and chunks side by
side. Whether a chunk's products give a row the same bits wherever it stands is found by trying, and where attention
does not, every candidate attends on its own. `mixencoder.fast` calls this.
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
"""The same where a chunk of 64 gives a row other bits at other places: MKL's products for AVX2 work in tiles of 6 or 12
rows, and may sum otherwise in what is left over."""
_TRIED_LENGTH = 8
"""Query tokens of the trial that decides between the two."""

_MOVED = 17
"""Places that candidates move on in a trial: to another row of every product's tiles, whatever their size."""


class _Segment(NamedTuple):
    """Rows of a chunk that belong to one query."""

    query: QueryState
    count: int
    together: bool
    """Whether the whole chunk meets the query at once, and the query's rows are kept; else each row on its own."""


class PairScorer:
    """Scores pairs with a model, and knows which shapes keep a row's bits on this machine.

    Args:
        model: in inference mode; its weights are read where they are.
    """

    def __init__(self, model: MixEncoderModel) -> None:
        self._model = model
        # what was found by trying: two threads that try at once find the same
        self._sizes: dict[torch.dtype, int] = {}
        self._together: dict[tuple[int, torch.dtype], bool] = {}
        self._shared: dict[tuple[int, int, torch.dtype], bool] = {}

    @torch.inference_mode()
    def score(self, query_state: QueryState, candidates: Tensor, pairs: Pairs, *, head: str, score: str) -> Tensor:
        """Score rows of (query, candidate), sorted by query.

        Returns (R,) float32 for the ranking head, (R, num_labels) for the classification head.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        device, total = candidates.device, len(pairs.query)
        if not total:
            return torch.empty(0, device=device, dtype=torch.float32)
        size = self._size()
        filled = -(-total // size) * size
        query_of = torch.cat([pairs.query, pairs.query[-1:].expand(filled - total)])
        candidate_of = torch.cat([pairs.candidate, pairs.candidate[-1:].expand(filled - total)]).to(device)
        apply_head = partial(self._apply_head, head, score)
        only_dual = score == "dual" and head == "ranking"

        def scored(start: int) -> Tensor:
            numbers = query_of[start : start + size]
            rows = candidates[candidate_of[start : start + size]]
            pooled, first = (
                None if vectors is None else vectors[numbers.to(device)]
                for vectors in (query_state.pooled, query_state.first)
            )
            if only_dual:
                dual = self._model.dual_term(pooled, rows.mean(dim=-2))
                assert dual is not None, "the caller refuses a score that the model does not have"
                return dual
            with torch.inference_mode():
                return apply_head(*self._interact(self._segments(query_state, numbers), rows, first), pooled, rows)

        starts = range(0, filled, size)
        threads = torch.get_num_threads()
        if only_dual or threads == 1 or not self._on_cpu:
            parts = [scored(start) for start in starts]
        else:
            lengths = query_state.lengths[query_of.unique()].unique().tolist()
            shared = len(starts) == 1 and all(self._may_be_shared(length, threads) for length in lengths)
            parts = [scored(0)] if shared else list(run_in_order(scored, starts, threads))
        return check_finite(torch.cat(parts)[:total].float(), candidates.dtype)

    @property
    def _on_cpu(self) -> bool:
        """Whether PyTorch's own operators run on a CPU; elsewhere nothing is tried and no thread is taken."""
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

    def _size(self) -> int:
        """Pairs of a chunk."""
        if not self._on_cpu:
            return CHUNK
        if (dtype := self._model.dtype) not in self._sizes:
            sizes = (CHUNK, _CHUNK_IN_TWELVES)
            trials = (self._no_place_differs(_TRIED_LENGTH, size, together=False) for size in sizes)
            self._sizes[dtype] = next((size for size, holds in zip(sizes, trials, strict=True) if holds), CHUNK)
        return self._sizes[dtype]

    def _attends_together(self, length: int) -> bool:
        """Whether a candidate has the same bits at every place of a chunk that meets a query of so many tokens."""
        key = length, self._model.dtype
        if self._on_cpu and key not in self._together:
            self._together[key] = self._no_place_differs(length, self._size(), together=True)
        return self._together.get(key, True)

    def _no_place_differs(self, length: int, size: int, *, together: bool) -> bool:
        """Whether candidates that move on by some places take their bits along."""
        trial = partial(self._trial, length, size, together=together)
        here, elsewhere = on_one_thread(trial), on_one_thread(partial(trial, moved=_MOVED))
        return torch.equal(here.roll(_MOVED, dims=0), elsewhere)

    def _may_be_shared(self, length: int, threads: int) -> bool:
        """Whether a chunk that all threads share gives the bits that it gives on one."""
        if self._model.dtype.itemsize < 4:
            # a narrow dtype rounds most differences away, so that a trial finds them too rarely to be trusted
            return False
        key = length, threads, self._model.dtype
        if key not in self._shared:
            trial = partial(self._trial, length, self._size(), together=self._attends_together(length))
            self._shared[key] = torch.equal(on_one_thread(trial), trial())
        return self._shared[key]

    @torch.inference_mode()
    def _trial(self, length: int, size: int, *, together: bool, moved: int = 0) -> Tensor:
        """What becomes of a chunk of random candidates, moved on by some places: (size, 2, d), h and e."""
        model, generator = self._model, torch.Generator().manual_seed(length)
        heads, (k, d) = model.config.backbone_config.num_attention_heads, model.context_shape

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(model.dtype)

        layers = range(len(model.interaction))
        keys, values = (tuple(random(1, length, heads, d // heads) for _ in layers) for _ in range(2))
        query = QueryState(keys, values, torch.tensor([length], device="cpu"), pooled=None)
        rows = random(size, k, d).roll(moved, dims=0)
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
    """Attend a chunk's rows, which belong to one query after the other; without state rows there is no state."""
    contexts, states, start = [], [], 0
    for query, count, together in segments:
        own = slice(start, start + count)
        rows = (context_query, context_key, context_value, state_query)
        attend = _attend_whole_chunk if together else _attend_each
        context, state = attend(rows, own, query.keys[layer], query.values[layer], backend)
        contexts.append(context)
        if state is not None:
            states.append(state)
        start += count
    return _joined(contexts), _joined(states) if states else None


_Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""A chunk's context queries, keys and values, and state queries."""


def _attend_whole_chunk(
    rows: _Rows, own: slice, key: Tensor, value: Tensor, backend: str
) -> tuple[Tensor, Tensor | None]:
    """The query meets the whole chunk, so that no product's shape depends on the neighbours, and keeps its own rows."""
    result = candidate_attention(*rows, key, value, backend=backend)
    return result.context[:, own], None if result.state is None else result.state[:, own]


def _attend_each(rows: _Rows, own: slice, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """As `_attend_whole_chunk`, but every row in products of its own: slower, and the same wherever it stands."""
    # candidates (C, ...), after the first layer (1, C, ...), of as many queries, which are one in the same memory
    query, context_key, context_value = (part.reshape(-1, 1, *part.shape[-3:]) for part in rows[:3])
    state = None if rows[3] is None else rows[3].reshape(-1, 1, *rows[3].shape[-2:])
    key, value = (part.expand(len(query), -1, -1, -1) for part in (key, value))
    result = candidate_attention(query, context_key, context_value, state, key, value, backend=backend)
    context, attended = result.context.transpose(0, 1), result.state
    return context[:, own], None if attended is None else attended.transpose(0, 1)[:, own]


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate parts (1, count, ...) of a chunk; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
