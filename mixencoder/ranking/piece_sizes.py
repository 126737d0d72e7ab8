"""The sizes of pieces in which a candidate's score has the same bits wherever it stands: found by trying.

Libraries choose their products by shape, and may sum in another order in a smaller product or in its last rows
(docs/determinism.md). So sizes are compared before they are used, once for every number of threads and width of the
attention's products.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.interaction import Layers, Query
from mixencoder.ranking.plan import Plan, padded_length

_MOVED = 17
"""Places that candidates move on in a trial: to another row of every product's tiles, whatever their size."""


class TrialBuffer(Protocol):
    """A buffer of candidates, as a trial uses it (`mixencoder.ranking.candidate_buffer.CandidateBuffer`)."""

    def fill_randomly(self, count: int, moved: int = 0) -> None:
        """Fill the first rows with random candidates, moved on by some rows among them."""

    def vectors(self, query: Query, count: int) -> Tensor:
        """Interaction vectors (C, 2, d) of the first candidates."""


class PieceSizes:
    """Which sizes of pieces may be used for a query; what was found is kept. Safe to use from several threads.

    Args:
        layers: what scores the pieces.
        plan: the largest and the smallest size, and whether queries are padded for replays.
        new_buffer: makes a buffer for trials.
    """

    def __init__(self, layers: Layers, plan: Plan, new_buffer: Callable[[], TrialBuffer]) -> None:
        self._layers, self._plan, self._new_buffer = layers, plan, new_buffer
        # two threads that try at once find the same
        self._found: dict[tuple[int, int], tuple[int, ...]] = {}

    def for_queries(self, queries: Sequence[Query]) -> tuple[int, ...]:
        """Return the sizes, falling, in which a candidate has the same bits for each of some queries."""
        width = padded_length if self._plan.replayed else self._layers.width
        agreeing = [self.for_width(each) for each in {width(query.length) for query in queries}]
        return tuple(size for size in agreeing[0] if all(size in others for others in agreeing)) or (self._plan.piece,)

    def cut(self, count: int, sizes: tuple[int, ...]) -> list[int]:
        """Return the sizes of the pieces that `count` candidates are scored in; their sum is at least `count`."""
        if self._plan.replayed:
            # one piece, so that few shapes are recorded
            return [min(size for size in sizes if size >= count)]
        pieces = []
        for size in sizes[:-1]:
            pieces += [size] * (count // size)
            count %= size
        return pieces + [sizes[-1]] * math.ceil(count / sizes[-1])

    def for_width(self, width: int) -> tuple[int, ...]:
        """Return the sizes, falling, that agree where the attention's products have this width."""
        key = torch.get_num_threads(), width
        if key not in self._found:
            self._found[key] = self._try(width)
        return self._found[key]

    def _try(self, width: int) -> tuple[int, ...]:
        buffer, piece = self._new_buffer(), self._plan.piece
        query = self._layers.query(_random_query(self._layers.model, width), 0)
        halved = [piece >> shift for shift in range((piece // self._plan.granule).bit_length())]
        if keeps_bits(buffer, query, piece):
            best, others = piece, halved[1:]
        else:
            # MKL's products for AVX2 work in tiles of 6 or 12 rows, and may sum otherwise in what is left over
            in_twelves = [size * 3 // 4 for size in halved]
            others = sorted([*halved[1:], *in_twelves], reverse=True)
            best = next((size for size in others if keeps_bits(buffer, query, size)), piece)
        buffer.fill_randomly(piece)
        whole = buffer.vectors(query, best)
        smaller = [size for size in others if size < best and torch.equal(buffer.vectors(query, size), whole[:size])]
        return best, *smaller


def keeps_bits(buffer: TrialBuffer, query: Query, size: int) -> bool:
    """Whether candidates that move to other rows of a piece take their bits along."""
    buffer.fill_randomly(size)
    here = buffer.vectors(query, size)
    buffer.fill_randomly(size, moved=_MOVED)
    return torch.equal(here.roll(_MOVED, dims=0), buffer.vectors(query, size))


def _random_query(model: MixEncoderModel, length: int) -> QueryState:
    """One query of some tokens."""
    heads, d = model.config.backbone_config.num_attention_heads, model.config.hidden_size
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(model.device, model.dtype)

    layers = range(len(model.interaction))
    keys, values = (tuple(random(1, length, heads, d // heads) for _ in layers) for _ in range(2))
    pooled = random(1, d) if model.config.dual_term else None
    first = None if model.config.state_row else random(1, d)
    return QueryState(keys, values, torch.tensor([length]), pooled, first)
