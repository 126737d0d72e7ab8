"""Find the sizes of pieces in which a candidate's score has the same bits, in every row and every size.

Libraries choose a matrix product's routine by its shape. A smaller product, or the last rows of a product, may sum in
another order (docs/determinism.md). So sizes are tried with random candidates before they are used, once for every
number of threads and every width of the attention's products.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixencoder.base.threads import on_one_thread
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.interaction import Layers, Query
from mixencoder.ranking.plan import Plan, padded_length

_PIECE_COST = 64
"""What a piece costs besides its candidates, in candidates: some sixty calls of operators."""
_SHIFT = 17
"""Rows by which candidates are moved in a trial: they get to another row of a tile, whatever the size of tiles."""


class PieceSize(NamedTuple):
    """A size that pieces may have."""

    candidates: int
    one_thread: bool = False
    """Whether the candidates keep their bits only if every operator uses one thread."""


class TrialBuffer(Protocol):
    """What a trial uses of a `mixencoder.ranking.candidate_buffer.CandidateBuffer`."""

    def fill_randomly(self, count: int, shift: int = 0) -> None:
        """As `CandidateBuffer.fill_randomly`."""

    def vectors(self, query: Query, count: int) -> Tensor:
        """As `CandidateBuffer.vectors`."""


class PieceSizes:
    """Finds the sizes that pieces may have for a query, and remembers them. Safe to use from several threads.

    Args:
        layers: compute the scores.
        plan: the largest and the smallest size, and whether queries are padded for CUDA graphs.
        new_buffer: makes a buffer for trials.
    """

    def __init__(self, layers: Layers, plan: Plan, new_buffer: Callable[[], TrialBuffer]) -> None:
        self._layers, self._plan, self._new_buffer = layers, plan, new_buffer
        # needs no lock: two threads that try at the same time find the same sizes
        self._found: dict[tuple[int, int], tuple[PieceSize, ...]] = {}

    def for_queries(self, queries: Sequence[Query]) -> list[tuple[tuple[PieceSize, ...], list[int]]]:
        """Return groups of queries, each with the sizes, falling, in which candidates keep their bits for all of them.

        A group is given by the queries' numbers. There is one group if any size suits all queries.
        """
        width = padded_length if self._plan.replayed else self._layers.width
        suited = [self.for_width(width(query.length)) for query in queries]
        common = tuple(size for size in suited[0] if all(size in sizes for sizes in suited))
        if common:
            return [(common, list(range(len(queries))))]
        groups: dict[tuple[PieceSize, ...], list[int]] = {}
        for number, sizes in enumerate(suited):
            groups.setdefault(sizes, []).append(number)
        return list(groups.items())

    def cut(self, count: int, sizes: tuple[PieceSize, ...]) -> list[PieceSize]:
        """Return sizes of pieces for `count` candidates; their sum is at least `count`."""
        if self._plan.replayed:
            # a single piece, so that few CUDA graphs are recorded
            return [min(size for size in sizes if size.candidates >= count)]
        full, rest = divmod(count, sizes[0].candidates)
        return [sizes[0]] * full + list(_cheapest(rest, sizes)[1])

    def for_width(self, width: int) -> tuple[PieceSize, ...]:
        """Return the sizes, largest first, that may be used where the attention's products have this width."""
        key = torch.get_num_threads(), width
        if key not in self._found:
            self._found[key] = self._try_sizes(width)
        return self._found[key]

    def _try_sizes(self, width: int) -> tuple[PieceSize, ...]:
        """Return the largest size that keeps bits, and the smaller ones that give the same bits as it.

        Some of the smaller ones do so on one thread alone: MKL splits the sums of a product of few rows between
        threads, but not those of a full piece.
        """
        piece = self._plan.piece
        halved = [piece >> shift for shift in range((piece // self._plan.granule).bit_length())]
        if self._layers.device.type == "cpu" and self._layers.dtype.itemsize < 4:
            # equal bits are not promised in half precision, where rounding hides most differences from a trial
            return tuple(map(PieceSize, halved))
        buffer, query = self._new_buffer(), self._layers.query(_random_query(self._layers.model, width), 0)
        if keeps_bits(buffer, query, piece):
            best, others = piece, halved[1:]
        else:
            # MKL's products for AVX2 work in tiles of 6 or 12 rows, and may sum the rows left over in another order
            in_twelves = [size * 3 // 4 for size in halved]
            others = sorted([*halved[1:], *in_twelves], reverse=True)
            best = next((size for size in others if keeps_bits(buffer, query, size)), piece)
        buffer.fill_randomly(piece)
        whole = buffer.vectors(query, best)

        def agrees(size: int) -> bool:
            return torch.equal(buffer.vectors(query, size), whole[:size])

        on_cpu = self._layers.device.type == "cpu"
        found = [PieceSize(best)]
        for size in others:
            if size < best and agrees(size):
                found.append(PieceSize(size))
            elif size < best and on_cpu and on_one_thread(partial(agrees, size)):
                found.append(PieceSize(size, one_thread=True))
        return tuple(found)


@lru_cache(maxsize=4096)
def _cheapest(count: int, sizes: tuple[PieceSize, ...]) -> tuple[int, tuple[PieceSize, ...]]:
    """Return the least cost of pieces for `count` candidates, in candidates, and their sizes, largest first."""
    if count <= 0:
        return 0, ()
    found = []
    for number, size in enumerate(sizes):
        # later pieces are not larger, as their order does not matter
        cost, rest = _cheapest(count - size.candidates, sizes[number:])
        found.append((size.candidates + _PIECE_COST + cost, (size, *rest)))
    # of equal costs, fewer pieces
    return min(found, key=lambda option: (option[0], len(option[1])))


def keeps_bits(buffer: TrialBuffer, query: Query, size: int) -> bool:
    """Whether candidates keep the bits of their vectors when they move to other rows of a piece of this size."""
    buffer.fill_randomly(size)
    before = buffer.vectors(query, size)
    buffer.fill_randomly(size, shift=_SHIFT)
    return torch.equal(before.roll(_SHIFT, dims=0), buffer.vectors(query, size))


def _random_query(model: MixEncoderModel, length: int) -> QueryState:
    """One random query of `length` tokens."""
    heads, d = model.config.backbone_config.num_attention_heads, model.config.hidden_size
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(model.device, model.dtype)

    layers = range(len(model.interaction))
    keys, values = (tuple(random(1, length, heads, d // heads) for _ in layers) for _ in range(2))
    pooled = random(1, d) if model.config.dual_term else None
    first = None if model.config.state_row else random(1, d)
    return QueryState(keys, values, torch.tensor([length]), pooled, first)
