"""Where a thread scores candidates: a piece of them as the layers read it, and memory for the interaction.

`mixencoder.ranking.streaming` fills desks and has them score.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mixencoder.errors import InputError
from mixencoder.ranking.cuda_graphs import Replays, Staging, replays_wanted
from mixencoder.ranking.interaction import Inputs, Layers, Query
from mixencoder.ranking.record_format import RecordFormat, mean_over_contexts
from mixencoder.ranking.workspace import Workspace
from mixkernels.packed_keys import LARGEST_ID

Rows = tuple[Tensor, Mapping[str, Tensor]]
"""Positions (C,) int64, and the fields (C, ...) of `RecordFormat.schema`. C is any number, also 0."""

PIECE = 512
"""Candidates of a full piece on a CPU: enough for products to run at full speed, few enough for a shared cache."""
_POSITIONS = "positions"
_SHORTEST = 16


class Plan(NamedTuple):
    """How candidates are cut and scored on a kind of device."""

    piece: int
    """Candidates of a full piece."""
    granule: int
    """Candidates of the smallest."""
    replayed: bool
    """Pieces are scored by replays (`mixencoder.ranking.cuda_graphs`), with queries padded to a few lengths."""
    staged: bool
    """Rows that lie in the memory of the CPU travel by way of pinned memory."""


ON_CPU = Plan(PIECE, 32, replayed=False, staged=False)
ON_GPU = Plan(4096, 512, replayed=True, staged=True)
"""The FFN's intermediates of a piece fit into the cache of a large GPU; no size has been timed on one yet."""


def plan_for(device: torch.device) -> Plan:
    """Return the plan for a device."""
    if device.type == "cpu":
        return ON_CPU
    return ON_GPU._replace(replayed=device.type == "cuda" and replays_wanted(), staged=device.type == "cuda")


def padded_length(length: int) -> int:
    """Return the length that a query of so many tokens is padded to for replays: a power of two, at least 16."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


class Desk:
    """A piece of candidates and memory to score it; one thread at a time uses one.

    Attributes:
        positions: (piece,) int64, of the candidates on the desk.
    """

    def __init__(self, layers: Layers, record_format: RecordFormat, plan: Plan) -> None:
        self._layers, self._format, self._plan = layers, record_format, plan
        self._has_dual = layers.model.config.dual_term
        # by size where work is recorded, so that none grows under a recording
        self._workspaces: dict[int, Workspace] = {}
        self._seats: dict[int, tuple[Query, Query | None]] = {}
        self._replays = Replays(layers.device) if plan.replayed else None
        self.positions = torch.zeros(plan.piece, dtype=torch.int64, device=layers.device)
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

    def fill(self, candidates: Iterable[Rows], score: str, piece: int) -> Iterator[int]:
        """Read candidates onto the desk; yields the number of rows whenever it holds a piece, and at the end.

        A chunk is read before the next one is asked for.
        """
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

    def pad(self, count: int, total: int) -> None:
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

    def scores(self, queries: list[Query], rows: slice, score: str) -> Tensor:
        """Scores (B, C) of the candidates in some rows, float32."""
        out = torch.empty(len(queries), rows.stop - rows.start, dtype=torch.float32, device=self._layers.device)
        if self._replays is None:
            hint, lengths, inputs = self._prepared(rows, score)
            for number, query in enumerate(queries):
                out[number] = self._scores(rows, hint, lengths, inputs, query)
            return out
        for number, query in enumerate(queries):
            seat = self._seat(query)
            key = rows.start, rows.stop, score, seat.length
            out[number] = self._replays.call(
                key, lambda seat=seat: self._scores(rows, *self._prepared(rows, score), seat)
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
            self.positions[place] = positions[part]
            return
        if self._staging is None:
            arrays = {field.name: (field.shape, field.torch_dtype) for field in self._format.schema.fields}
            arrays[_POSITIONS] = (), torch.int64
            self._staging = Staging(arrays, self._plan.piece, self._layers.device)
        sent = {name: array for name, array in rows.items() if name.removesuffix("_scale") in wanted}
        near = self._staging.send({**sent, _POSITIONS: positions}, begin, end)
        self._format.read(near, 0, end - begin, wanted, at)
        self.positions[place] = near[_POSITIONS]
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

    def _seat(self, query: Query) -> Query:
        """The place where replays look for a query of its padded length, with the query in it."""
        length = padded_length(query.length)
        seat, seated = self._seats.get(length, (None, None))
        if seat is None:
            seat = query.empty(length)
        if seated is not query:
            seat.take(query)
            self._seats[length] = seat, query
        return seat

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
