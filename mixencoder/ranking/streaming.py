"""Rank stored candidates: read them chunk by chunk, score them piece by piece, keep the top k.

Memory does not grow with the number of candidates N, only with top_k and the number of queries. Candidates are read
once for all queries. Python code runs for each chunk and piece, never for each candidate.

`mixencoder.ranking.index_ranker` is the caller: it reads the candidates of an index. Pieces are collected and scored
in `mixencoder.ranking.candidate_buffer`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mixencoder.base.inputs import positive_integer_or_none
from mixencoder.base.scores import check_finite
from mixencoder.errors import InputError
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.candidate_buffer import CandidateBuffer, Rows
from mixencoder.ranking.interaction import Query, prepare_layers
from mixencoder.ranking.piece_sizes import PieceSizes
from mixencoder.ranking.plan import PIECE, Plan, plan_for
from mixencoder.ranking.record_format import RecordFormat
from mixkernels import TopK
from mixkernels.packed_keys import EMPTY_KEY, LARGEST_ID, pack_keys, unpack_keys

PRODUCTS = ("native", "auto", "bfloat16", "int8")
"""What matrix products compute in: the model's dtype; for "auto" bfloat16, if the model is float32 and the device
multiplies bfloat16 faster, else the model's dtype; bfloat16, where the device multiplies it natively; or int8, on a
CPU. bfloat16 and int8 are faster and change scores a little."""

_WAITING = 8192
"""Scores of a query that are collected before they are merged into the top k."""


class RowSource(Iterable[Rows]):
    """Candidates that can be read several times, all in order or some by position."""

    @abstractmethod
    def select(self, positions: Tensor) -> Iterable[Rows]:
        """Return the rows at the given positions (P,), which are distinct and ascending, in that order."""


class StreamRanker:
    """Ranks stored candidates of a model. Safe to use from several threads.

    A model that is trained, cast or moved needs a new ranker: weights may be copied here, in the dtype of the products.

    Args:
        model: the model, in inference mode, with a ranking head.
        record_format: how the candidates are stored.
        products: one of `PRODUCTS`.
        plan: how to cut and score candidates; None takes the plan for the model's device.

    Raises:
        InputError: products is unknown or cannot run on the device, or the model has no ranking head.
    """

    def __init__(
        self,
        model: MixEncoderModel,
        record_format: RecordFormat,
        *,
        products: str = "native",
        plan: Plan | None = None,
    ) -> None:
        if products not in PRODUCTS:
            raise InputError(f"products is {products!r}; expected one of {', '.join(PRODUCTS)}")
        model.check_head("ranking")
        self.record_format = record_format
        self._layers = prepare_layers(model, products)
        self._has_dual = model.config.dual_term
        self._plan = plan_for(self._layers.device, self._layers.dtype) if plan is None else plan
        # buffers that no thread is using
        self._free: list[CandidateBuffer] = []
        self._sizes = PieceSizes(
            self._layers, self._plan, lambda: CandidateBuffer(self._layers, record_format, self._plan)
        )

    @torch.inference_mode()
    def rank(
        self,
        query_state: QueryState | Sequence[QueryState],
        candidates: Iterable[Rows],
        top_k: int | None = None,
        *,
        score: str = "full",
        prefilter: int | None = None,
        repeats: bool = False,
    ) -> TopK:
        """Rank candidates for B queries.

        A score's bits do not depend on the other candidates, their number, order or chunks, nor on the other queries;
        they may depend on the machine, the number of threads and the products.

        Args:
            query_state: from `MixEncoder.encode_query`; or several such states, whose queries are ranked together.
            candidates: chunks of stored rows, of any size, with positions from 0 to 2^32 - 1. A chunk's memory may be
                used again as soon as the next chunk is requested. With prefilter, candidates are read twice: the second
                time by position from a `RowSource`; from another iterable all of them, once for every query. An
                iterator, which can only be read once, is rejected.
            top_k: how many candidates to return. None returns all.
            score: "full", "interaction" or "dual", as in `MixEncoder.rank`.
            prefilter: for each query, fully score only this many candidates, the best by dual score. None scores all.
            repeats: whether a position may occur in several rows; its score is then that of its best row.

        Returns:
            TopK(scores (B, n) float32, positions (B, n) int64), on the CPU, best first; of equal scores, the lower
            position first.

        Raises:
            InputError: an argument is out of range, the score or prefilter needs a dual term that the model lacks,
                or a chunk lacks a field.
            NonFiniteError: a score is NaN or infinite.
        """
        top_k = positive_integer_or_none(top_k, "top_k")
        prefilter = positive_integer_or_none(prefilter, "prefilter")
        self._check(candidates, score, prefilter)
        states = [query_state] if isinstance(query_state, QueryState) else query_state
        queries = [self._layers.query(state, number) for state in states for number in range(len(state))]
        if prefilter is None:
            return self._stream(queries, candidates, top_k, score, repeats)
        kept = self._stream(queries, candidates, prefilter, "dual", repeats).ids.sort(dim=1).values
        rankings = self._stream_selected(queries, candidates, kept, top_k, score, repeats)
        return TopK(*(torch.cat(parts) for parts in zip(*rankings, strict=True)))

    @torch.inference_mode()
    def rank_chosen(
        self,
        query_states: Sequence[QueryState],
        candidates: RowSource,
        choose: Callable[[Tensor], Sequence[Tensor]],
        top_k: int | None = None,
        *,
        score: str = "full",
        repeats: bool = False,
    ) -> list[TopK]:
        """Rank for each query the candidates that are chosen by the vector with which its dual term compares.

        Args:
            query_states, candidates, top_k, score, repeats: as in `rank`.
            choose: gets vectors (B, d) float32 on the CPU, of length 1, whose inner product with a candidate's vector
                orders candidates as the dual score does; returns for each query distinct positions, ascending.

        Returns:
            A ranking (1, n) for each query, of at most the candidates chosen for it; otherwise as `rank`.

        Raises:
            InputError, NonFiniteError: as `rank`.
        """
        top_k = positive_integer_or_none(top_k, "top_k")
        self._check(candidates, score, None)
        queries = [self._layers.query(state, number) for state in query_states for number in range(len(state))]
        vectors = torch.stack([query.direction for query in queries]).float().cpu()
        # with a negative scale the best by dual score have the least cosines
        chosen = choose(vectors if float(self._layers.model.dual_scale) >= 0 else -vectors)
        return self._stream_selected(queries, candidates, chosen, top_k, score, repeats)

    def _check(self, candidates: Iterable[Rows], score: str, prefilter: int | None) -> None:
        if score not in ("full", "interaction", "dual"):
            raise InputError(f"score is {score!r}; expected one of full, interaction, dual")
        if not self._has_dual and (score == "dual" or prefilter is not None):
            what = 'score is "dual"' if score == "dual" else "prefilter ranks by the dual score"
            raise InputError(f"{what}, but this model has no dual term (dual_term=False)")
        if prefilter is not None and isinstance(candidates, Iterator):
            raise InputError(
                "candidates is an iterator, which can be read only once; prefilter needs a list or RowSource"
            )

    def _stream_selected(
        self,
        queries: list[Query],
        candidates: Iterable[Rows],
        selected: Iterable[Tensor],
        top_k: int | None,
        score: str,
        repeats: bool,
    ) -> list[TopK]:
        """Rank for each query the candidates at its own positions, which are ascending."""
        return [
            self._stream([query], _selected(candidates, positions), top_k, score, repeats)
            for query, positions in zip(queries, selected, strict=True)
        ]

    def _stream(
        self, queries: list[Query], candidates: Iterable[Rows], top_k: int | None, score: str, repeats: bool
    ) -> TopK:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = CandidateBuffer(self._layers, self.record_format, self._plan, self._sizes)
        best = RunningBest(len(queries), top_k, repeats, self._layers.device, self._plan.piece)
        try:
            for positions, scores in buffer.score_pieces(candidates, queries, score):
                best.add(scores, positions)
        finally:
            self._free.append(buffer)
        return best.result()


class RunningBest:
    """The best candidates so far of every query, as keys that pack score and position (`mixkernels.packed_keys`).

    Scores are collected and merged many at a time, as merging after every piece would take longer.
    """

    def __init__(self, batch: int, top_k: int | None, repeats: bool, device: torch.device, piece: int = PIECE) -> None:
        self._top_k, self._repeats = top_k, repeats
        self._capacity = max(piece, min(_WAITING, _WAITING * 64 // max(batch, 1)))
        self._scores = torch.empty(batch, self._capacity, dtype=torch.float32, device=device)
        self._positions = torch.empty(self._capacity, dtype=torch.int64, device=device)
        self._count = 0
        self._merged: list[Tensor] = []

    def add(self, scores: Tensor, positions: Tensor) -> None:
        """Add scores (B, C) of candidates at positions (C,)."""
        parts = scores.split(self._capacity, dim=1), positions.split(self._capacity)
        for scores, positions in zip(*parts, strict=True):
            if self._count + len(positions) > self._capacity:
                self._merge()
            rows = slice(self._count, self._count + len(positions))
            self._scores[:, rows], self._positions[rows] = scores, positions
            self._count = rows.stop

    def result(self) -> TopK:
        """Return the best candidates, (B, n), on the CPU."""
        self._merge()
        keys = self._best(torch.cat(self._merged, dim=1), None)
        scores, positions = unpack_keys(keys.cpu())
        return TopK(scores, positions)

    def _merge(self) -> None:
        scores = check_finite(self._scores[:, : self._count], self._scores.dtype)
        self._merged.append(pack_keys(scores, self._positions[: self._count]))
        self._count = 0
        if self._top_k is not None:
            self._merged = [self._best(torch.cat(self._merged, dim=1), self._top_k)]

    def _best(self, keys: Tensor, count: int | None) -> Tensor:
        """The `count` largest of keys (B, n), largest first; only the largest key of each position if it repeats."""
        if self._repeats and keys.numel():
            keys = keys.sort(dim=1, descending=True).values
            positions, order = (LARGEST_ID - (keys & LARGEST_ID)).sort(dim=1, stable=True)
            repeated = torch.zeros_like(keys, dtype=torch.bool)
            repeated[:, 1:] = positions[:, 1:] == positions[:, :-1]
            keys = keys.gather(1, order).masked_fill_(repeated, EMPTY_KEY)
            # the number of distinct positions is the same for every query
            distinct = int((~repeated[0]).sum())
            count = distinct if count is None else min(count, distinct)
        count = keys.shape[1] if count is None else min(count, keys.shape[1])
        return keys.topk(count, dim=1, sorted=True).values


def _selected(candidates: Iterable[Rows], positions: Tensor) -> Iterable[Rows]:
    """Chunks with the candidates at the given positions (P,), which are ascending."""
    return candidates.select(positions) if isinstance(candidates, RowSource) else _filtered(candidates, positions)


def _filtered(candidates: Iterable[Rows], positions: Tensor) -> Iterator[Rows]:
    for chunk_positions, rows in candidates:
        nearest = torch.searchsorted(positions, chunk_positions).clamp_max_(max(len(positions) - 1, 0))
        kept = (positions[nearest] == chunk_positions).nonzero().flatten() if len(positions) else nearest[:0]
        if len(kept):
            yield chunk_positions[kept], {name: tensor[kept] for name, tensor in rows.items()}
