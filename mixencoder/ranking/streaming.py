"""From stored candidates to a ranking: streamed in pieces of fixed shape through the interaction to a running top-k.

Memory is that of a piece and of top_k, whatever N; any number of queries shares one reading of the candidates. Nothing
is done for a single candidate in Python. `mixencoder.fast` makes a `StreamRanker` of a model and ranks an index with
it; where candidates come from is the business of whoever hands them over.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mixencoder.base.inputs import positive_integer_or_none
from mixencoder.base.scores import check_finite
from mixencoder.errors import InputError
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.candidate_buffer import CandidateBuffer, Rows
from mixencoder.ranking.interaction import Query, prepared
from mixencoder.ranking.piece_sizes import PieceSizes
from mixencoder.ranking.plan import PIECE, Plan, plan_for
from mixencoder.ranking.record_format import RecordFormat
from mixkernels import TopK
from mixkernels.packed_keys import EMPTY_KEY, LARGEST_ID, pack_keys, unpack_keys

PRODUCTS = ("native", "bfloat16", "int8")
"""Products: in the model's precision; in bfloat16, where the device multiplies that itself; or of int8 numbers, on a
CPU. The latter two are faster and move scores a little."""

_WAITING = 8192
"""Scores that wait to be merged into the running top-k."""


class RowSource(Iterable[Rows]):
    """Candidates that can be read in order, as often as asked for, or by position."""

    @abstractmethod
    def select(self, positions: Tensor) -> Iterable[Rows]:
        """Return the rows at some positions (P,), which rise and are distinct, in that order."""


class StreamRanker:
    """Ranks stored candidates of a model. Safe to use from several threads.

    Weights are read where the model has them, unless the products run in another precision: a model that is trained
    on, cast or moved needs a new ranker.

    Args:
        model: the model, in inference mode, with a ranking head.
        record_format: how the candidates are stored.
        products: of `PRODUCTS`.
        plan: how to cut and score; None takes what suits the model's device.

    Raises:
        InputError: there are no such products, the device has none, or the model has no ranking head.
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
        self._layers = prepared(model, products)
        self._has_dual = model.config.dual_term
        self._plan = plan_for(self._layers.device) if plan is None else plan
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

        A score has the same bits whatever N, the order and the chunks in which candidates come, what stands beside
        them and how many queries there are; per machine, number of threads and precision.

        Args:
            query_state: of `MixEncoder.encode_query`, or several states, whose queries are ranked for together.
            candidates: chunks of stored rows, of any size; positions from 0 to 2^32 - 1. With prefilter what it keeps
                is read again: from a `RowSource` by position, else by going through all of them for every query, so
                an iterator will not do. What a chunk holds is not kept beyond its turn.
            top_k: how many to return. None returns all.
            score: "full", "interaction" or "dual", as in `MixEncoder.rank`.
            prefilter: keep so many with the best dual score for every query, and interact with those alone.
            repeats: whether positions may occur more than once, which the best of their rows then stands for.

        Returns:
            TopK(scores (B, n) float32, positions (B, n) int64), on the CPU, best first, ties to the lower position.

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
        rankings = [
            self._stream([query], _selected(candidates, positions), top_k, score, repeats)
            for query, positions in zip(queries, kept, strict=True)
        ]
        return TopK(*(torch.cat(parts) for parts in zip(*rankings, strict=True)))

    def _check(self, candidates: Iterable[Rows], score: str, prefilter: int | None) -> None:
        if score not in ("full", "interaction", "dual"):
            raise InputError(f"score is {score!r}; expected one of full, interaction, dual")
        if not self._has_dual and (score == "dual" or prefilter is not None):
            what = 'score is "dual"' if score == "dual" else "prefilter ranks by the dual score"
            raise InputError(f"{what}, but this model has no dual term (dual_term=False)")
        if prefilter is not None and isinstance(candidates, Iterator):
            raise InputError("candidates is an iterator, which ends after one pass; prefilter needs an iterable")

    def _stream(
        self, queries: list[Query], candidates: Iterable[Rows], top_k: int | None, score: str, repeats: bool
    ) -> TopK:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = CandidateBuffer(self._layers, self.record_format, self._plan, self._sizes)
        best = RunningBest(len(queries), top_k, repeats, self._layers.device, self._plan.piece)
        try:
            for positions, scores in buffer.scored(candidates, queries, score):
                best.add(scores, positions)
        finally:
            self._free.append(buffer)
        return best.result()


class RunningBest:
    """The best candidates so far of every query, as packed keys; scores wait until merging them is worth it."""

    def __init__(self, batch: int, top_k: int | None, repeats: bool, device: torch.device, piece: int = PIECE) -> None:
        self._top_k, self._repeats = top_k, repeats
        self._waiting = max(piece, min(_WAITING, _WAITING * 64 // max(batch, 1)))
        self._scores = torch.empty(batch, self._waiting, dtype=torch.float32, device=device)
        self._positions = torch.empty(self._waiting, dtype=torch.int64, device=device)
        self._count = 0
        self._merged: list[Tensor] = []

    def add(self, scores: Tensor, positions: Tensor) -> None:
        """Take scores (B, C) of candidates at positions (C,)."""
        if self._count + len(positions) > self._waiting:
            self._merge()
        rows = slice(self._count, self._count + len(positions))
        self._scores[:, rows], self._positions[rows] = scores, positions
        self._count = rows.stop

    def result(self) -> TopK:
        """The best, (B, n), on the CPU."""
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
        """The `count` largest of keys (B, n), falling; of several at one position the largest."""
        if self._repeats and keys.numel():
            keys = keys.sort(dim=1, descending=True).values
            positions, order = (LARGEST_ID - (keys & LARGEST_ID)).sort(dim=1, stable=True)
            again = torch.zeros_like(keys, dtype=torch.bool)
            again[:, 1:] = positions[:, 1:] == positions[:, :-1]
            keys = keys.gather(1, order).masked_fill_(again, EMPTY_KEY)
            # as many distinct positions for every query
            distinct = int((~again[0]).sum())
            count = distinct if count is None else min(count, distinct)
        count = keys.shape[1] if count is None else min(count, keys.shape[1])
        return keys.topk(count, dim=1, sorted=True).values


def _selected(candidates: Iterable[Rows], positions: Tensor) -> Iterable[Rows]:
    """Chunks with the candidates at the given positions (P,), which rise."""
    return candidates.select(positions) if isinstance(candidates, RowSource) else _only(candidates, positions)


def _only(candidates: Iterable[Rows], positions: Tensor) -> Iterator[Rows]:
    for chunk_positions, rows in candidates:
        place = torch.searchsorted(positions, chunk_positions).clamp_max_(max(len(positions) - 1, 0))
        kept = (positions[place] == chunk_positions).nonzero().flatten() if len(positions) else place[:0]
        if len(kept):
            yield chunk_positions[kept], {name: tensor[kept] for name, tensor in rows.items()}
