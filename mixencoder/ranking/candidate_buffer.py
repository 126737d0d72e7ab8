"""Buffers for one piece of candidates, and memory to score it; a thread at a time uses one.

`mixencoder.ranking.streaming` reads candidates through a buffer, which cuts them into pieces of the right shapes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.ranking.cuda_graphs import Replays
from mixencoder.ranking.interaction import Inputs, Layers, Query
from mixencoder.ranking.piece_sizes import PieceSizes
from mixencoder.ranking.pinned_memory import Staging
from mixencoder.ranking.plan import Plan, padded_length
from mixencoder.ranking.record_format import RecordFormat, mean_over_contexts
from mixencoder.ranking.workspace import Workspace
from mixkernels.packed_keys import LARGEST_ID

Rows = tuple[Tensor, Mapping[str, Tensor]]
"""Positions (C,) int64, and the fields (C, ...) of `RecordFormat.schema`. C is any number, also 0."""

_POSITIONS = "positions"


class CandidateBuffer:
    """A piece of candidates as the layers read it, and memory to score it.

    Args:
        layers: what scores candidates.
        record_format: how they are stored.
        plan: how large a piece is, and how it is scored.
        sizes: the shapes that pieces may have; None for a buffer that only tries shapes.
    """

    def __init__(
        self, layers: Layers, record_format: RecordFormat, plan: Plan, sizes: PieceSizes | None = None
    ) -> None:
        self._layers, self._format, self._plan, self._sizes = layers, record_format, plan, sizes
        self._has_dual = layers.model.config.dual_term
        # by size where work is recorded, so that none grows under a recording
        self._workspaces: dict[int, Workspace] = {}
        self._query_slots: dict[int, tuple[Query, Query | None]] = {}
        self._replays = Replays(layers.device) if plan.replayed else None
        self._positions = torch.zeros(plan.piece, dtype=torch.int64, device=layers.device)
        options = {"dtype": layers.dtype, "device": layers.device}
        self._projected = record_format.layout == "projected"
        if self._projected:
            # contexts' and state's queries side by side, as products want them
            self._queries = torch.empty(plan.piece, layers.rows, layers.d, **options)
            stacked = {"context_query": self._queries[:, : layers.contexts], "state_query": self._queries[:, -1]}
        else:
            stacked = {}
        self._parts = {
            name: stacked[name] if name in stacked else torch.empty(plan.piece, *shape, **options)
            for name, shape in record_format.parts.items()
        }
        self._staging: Staging | None = None

    def scored(
        self, candidates: Iterable[Rows], queries: Sequence[Query], score: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read candidates piece by piece and score every piece for all queries.

        A chunk of candidates is read before the next one is asked for.

        Yields:
            Positions (C,) int64 and scores (B, C) float32 of a piece; positions are valid until the next one.

        Raises:
            InputError: a chunk lacks a field, or a position is out of range.
        """
        assert self._sizes is not None, "a buffer for trials scores no candidates"
        sizes = self._sizes.for_queries(queries)
        for count in self._fill(candidates, score, sizes[0]):
            start, parts = 0, []
            shapes = self._sizes.cut(count, sizes)
            self._pad(count, sum(shapes))
            for size in shapes:
                parts.append(self._piece_scores(queries, slice(start, start + size), score))
                start += size
            yield self._positions[:count], (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, :count]

    def _fill(self, candidates: Iterable[Rows], score: str, piece: int) -> Iterator[int]:
        """Read candidates into the buffer; yields the number of rows whenever it holds a piece, and at the end."""
        # the dual term reads the hint alone, which keeps the rest of a file unread
        wanted = {name: part for name, part in self._parts.items() if score != "dual" or name in ("context", "hint")}
        filled = 0
        for positions, rows in candidates:
            self._check_chunk(positions, rows)
            start = 0
            while start < len(positions):
                count = min(len(positions) - start, piece - filled)
                self._read(positions, rows, slice(start, start + count), wanted, filled)
                start, filled = start + count, filled + count
                if filled == piece:
                    yield filled
                    filled = 0
        if filled:
            yield filled

    def _pad(self, count: int, total: int) -> None:
        """Repeat the first row in the places from count to total."""
        for part in self._parts.values():
            part[count:total] = part[:1]

    def fill_randomly(self, count: int, moved: int = 0) -> None:
        """Fill the first places with random candidates, moved on by some places among them."""
        generator = torch.Generator().manual_seed(0)
        for part in self._parts.values():
            drawn = torch.randn(part.shape, generator=generator, dtype=torch.float32, device="cpu")[:count]
            part[:count].copy_(drawn.roll(moved, dims=0))

    def vectors(self, query: Query, count: int) -> Tensor:
        """Interaction vectors (C, 2, d) of the first candidates, h and e."""
        hint, _, inputs = self._prepared(slice(0, count), "interaction")
        return torch.stack(self._layers.vectors(self._workspace(slice(0, count)), inputs, hint, query), dim=1)

    def _piece_scores(self, queries: Sequence[Query], rows: slice, score: str) -> Tensor:
        """Scores (B, C) of the candidates in some rows, float32."""
        out = torch.empty(len(queries), rows.stop - rows.start, dtype=torch.float32, device=self._layers.device)
        if self._replays is None:
            hint, lengths, inputs = self._prepared(rows, score)
            for number, query in enumerate(queries):
                out[number] = self._scores(rows, hint, lengths, inputs, query)
            return out
        for number, query in enumerate(queries):
            slot = self._query_slot(query)
            key = rows.start, rows.stop, score, slot.length
            out[number] = self._replays.call(
                key, lambda slot=slot: self._scores(rows, *self._prepared(rows, score), slot)
            )
        return out

    def _read(
        self, positions: Tensor, rows: Mapping[str, Tensor], part: slice, wanted: Mapping[str, Tensor], at: int
    ) -> None:
        """Write a part of a chunk into the wanted tensors, from place `at` on."""
        begin, end = part.start, part.stop
        place = slice(at, at + end - begin)
        # what is on a GPU already needs no staging
        if not self._plan.staged or rows[next(iter(rows))].device.type != "cpu":
            self._format.read(rows, begin, end, wanted, at)
            self._positions[place] = positions[part]
            return
        if self._staging is None:
            arrays = {field.name: (field.shape, field.torch_dtype) for field in self._format.schema.fields}
            arrays[_POSITIONS] = (), torch.int64
            self._staging = Staging(arrays, self._plan.piece, self._layers.device)
        sent = {name: array for name, array in rows.items() if name.removesuffix("_scale") in wanted}
        near = self._staging.send({**sent, _POSITIONS: positions}, begin, end)
        self._format.read(near, 0, end - begin, wanted, at)
        self._positions[place] = near[_POSITIONS]
        self._staging.release()

    def _prepared(self, rows: slice, score: str) -> tuple[Tensor, Tensor | None, Inputs | None]:
        """What all queries meet of some rows: hint, the dual term's lengths, the first layer's inputs."""
        hint = self._parts["hint"][rows] if "hint" in self._parts else mean_over_contexts(self._parts["context"][rows])
        lengths = self._layers.dual_lengths(hint) if self._has_dual and score != "interaction" else None
        return hint, lengths, None if score == "dual" else self._inputs(rows, hint)

    def _scores(self, rows: slice, hint: Tensor, lengths: Tensor | None, inputs: Inputs | None, query: Query) -> Tensor:
        layers, workspace = self._layers, self._workspace(rows)
        if inputs is None:
            return layers.dual(workspace, hint, lengths, query)
        scores = layers.interact(workspace, inputs, hint, query)
        return scores if lengths is None else scores + layers.dual(workspace, hint, lengths, query)

    def _inputs(self, rows: slice, hint: Tensor) -> Inputs:
        """What the first layer reads of the candidates."""
        part = {name: tensor[rows] for name, tensor in self._parts.items()}
        if not self._projected:
            return self._layers.project(self._workspace(rows), 0, part["context"], hint)
        return Inputs(
            part.get("context"),
            self._queries[rows],
            part.get("context_value"),
            part.get("own_logits"),
            part.get("gate"),
        )

    def _workspace(self, rows: slice) -> Workspace:
        size = 0 if self._replays is None else rows.stop - rows.start
        if size not in self._workspaces:
            self._workspaces[size] = Workspace(self._layers.dtype, self._layers.device)
        return self._workspaces[size]

    def _query_slot(self, query: Query) -> Query:
        """The memory in which replays read a query of its padded length, with the query copied into it."""
        length = padded_length(query.length)
        slot, held = self._query_slots.get(length, (None, None))
        if slot is None:
            slot = query.empty(length)
        if held is not query:
            slot.take(query)
            self._query_slots[length] = slot, query
        return slot

    def _check_chunk(self, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
        fields = [field.name for field in self._format.schema.fields]
        if missing := [name for name in fields if name not in rows]:
            raise InputError(f"a chunk lacks {', '.join(missing)}; expected the fields {', '.join(fields)}")
        if any(len(rows[name]) != len(positions) for name in fields):
            counts = {name: len(rows[name]) for name in fields}
            raise InputError(f"a chunk has {len(positions)} positions but rows {counts}; expected as many")
        if len(positions):
            low, high = (int(bound) for bound in positions.aminmax())
            if low < 0 or high > LARGEST_ID:
                raise InputError(f"positions reach from {low} to {high}; expected values in 0..{LARGEST_ID}")
