"""Per-thread buffers for one piece of candidates: collect chunks into pieces, and score them.

`mixencoder.ranking.streaming` is the caller; `mixencoder.ranking.interaction` computes the scores.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mixencoder.base.threads import on_one_thread
from mixencoder.errors import InputError
from mixencoder.ranking.cuda_graphs import CudaGraphs
from mixencoder.ranking.interaction import Inputs, Layers, Query
from mixencoder.ranking.piece_sizes import PieceSize, PieceSizes
from mixencoder.ranking.pinned_memory import Staging
from mixencoder.ranking.plan import Plan, padded_length
from mixencoder.ranking.record_format import RecordFormat, mean_over_contexts
from mixencoder.ranking.workspace import Workspace
from mixkernels.packed_keys import LARGEST_ID

Rows = tuple[Tensor, Mapping[str, Tensor]]
"""Positions (C,) int64, and the fields (C, ...) of `RecordFormat.schema`. C is any number, also 0."""

_POSITIONS = "positions"


class CandidateBuffer:
    """A piece of candidates as the layers read it, and memory to score it. Only one thread at a time may use it.

    Args:
        layers: compute the scores.
        record_format: how candidates are stored.
        plan: the largest piece, and how pieces are scored.
        sizes: the sizes that pieces may have; None for a buffer that only serves to try sizes.
    """

    def __init__(
        self, layers: Layers, record_format: RecordFormat, plan: Plan, sizes: PieceSizes | None = None
    ) -> None:
        self._layers, self._format, self._plan, self._sizes = layers, record_format, plan, sizes
        self._fields = [field.name for field in record_format.schema.fields]
        self._has_dual = layers.model.config.dual_term
        # with CUDA graphs one for every size: a workspace that grew would move memory that a graph reads
        self._workspaces: dict[int, Workspace] = {}
        # padded length -> the memory that graphs read, and the query that it holds
        self._query_slots: dict[int, tuple[Query, Query | None]] = {}
        self._graphs = CudaGraphs(layers.device) if plan.replayed else None
        self._positions = torch.zeros(plan.piece, dtype=torch.int64, device=layers.device)
        options = {"dtype": layers.dtype, "device": layers.device}
        self._projected = record_format.has_projection
        if self._projected:
            # queries of contexts and state in one tensor, as the products read them
            self._queries = torch.empty(plan.piece, layers.rows, layers.d, **options)
            stacked = {"context_query": self._queries[:, : layers.contexts], "state_query": self._queries[:, -1]}
        else:
            stacked = {}
        self._parts = {
            name: stacked[name] if name in stacked else torch.empty(plan.piece, *shape, **options)
            for name, shape in record_format.parts.items()
        }
        self._staging: Staging | None = None

    def score_pieces(
        self, candidates: Iterable[Rows], queries: Sequence[Query], score: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read candidates piece by piece and score every piece for all queries.

        A chunk is read before the next one is requested, so that a source may use its memory again.

        Yields:
            Positions (C,) int64 and scores (B, C) float32 of a piece; positions are valid until the next piece.

        Raises:
            InputError: a chunk lacks a field, or a position is out of range.
        """
        assert self._sizes is not None, "a buffer without sizes only serves to try sizes"
        if score == "dual" and not self._plan.replayed and not self._plan.staged:
            yield from self._dual_pieces(candidates, queries)
            return
        groups = self._sizes.for_queries(queries)
        for count in self._fill(candidates, score, min(sizes[0].candidates for sizes, _ in groups)):
            scores = torch.empty(len(queries), count, dtype=torch.float32, device=self._layers.device)
            for sizes, numbers in groups:
                self._score_group([queries[number] for number in numbers], sizes, score, scores, numbers)
            yield self._positions[:count], scores

    def _dual_pieces(self, candidates: Iterable[Rows], queries: Sequence[Query]) -> Iterator[tuple[Tensor, Tensor]]:
        """`score_pieces` for the dual term alone: row by row, so pieces need not be filled for equal bits."""
        layers, workspace, size = self._layers, self._workspace(slice(0)), self._plan.piece
        dtype = torch.promote_types(layers.dtype, torch.float32)
        names = [name for name in ("context", "hint") if name in self._format.parts]
        pooled = {name: workspace.take(f"dual {name}", size, *self._format.parts[name], dtype=dtype) for name in names}
        for positions, rows in candidates:
            self._check_chunk(positions, rows)
            squares = torch.empty(len(positions), dtype=dtype)
            scores = torch.empty(len(queries), len(positions), dtype=dtype)
            for start in range(0, len(positions), size):
                stop = min(start + size, len(positions))
                self._format.read(rows, start, stop, pooled, 0)
                hint = pooled["hint"] if "hint" in pooled else mean_over_contexts(pooled["context"])
                hint = hint[: stop - start]
                layers.row_products(workspace, hint, hint, out=squares[start:stop])
                for query, out in zip(queries, scores, strict=True):
                    layers.row_products(workspace, hint, query.direction, out=out[start:stop])
            yield positions, layers.dual_scores(scores, squares)

    def _score_group(
        self, queries: Sequence[Query], sizes: tuple[PieceSize, ...], score: str, out: Tensor, numbers: list[int]
    ) -> None:
        """Score the first candidates of the buffer, in pieces of the given sizes; out (B, C) takes rows `numbers`."""
        assert self._sizes is not None, "the caller has asked it for the sizes"
        start, count = 0, out.shape[1]
        pieces = self._sizes.cut(count, sizes)
        self._pad(count, sum(size.candidates for size in pieces))
        for size, one_thread in pieces:
            stop = min(start + size, count)
            compute = partial(self._piece_scores, queries, slice(start, start + size), score)
            scores = on_one_thread(compute) if one_thread else compute()
            out[numbers, start:stop] = scores[:, : stop - start]
            start += size

    def _fill(self, candidates: Iterable[Rows], score: str, piece: int) -> Iterator[int]:
        """Copy candidates into the buffer; yield the number of rows when it holds a full piece, and at the end."""
        # the dual term needs the hint only: the other fields of a file are not read
        wanted = {name: part for name, part in self._parts.items() if score != "dual" or name in ("context", "hint")}
        filled = 0
        for positions, rows in candidates:
            self._check_chunk(positions, rows)
            start = 0
            while start < len(positions):
                count = min(len(positions) - start, piece - filled)
                self._copy(positions, rows, slice(start, start + count), wanted, filled)
                start, filled = start + count, filled + count
                if filled == piece:
                    yield filled
                    filled = 0
        if filled:
            yield filled

    def _pad(self, count: int, total: int) -> None:
        """Fill the rows from count to total with copies of the first row."""
        for part in self._parts.values():
            part[count:total] = part[:1]

    def fill_randomly(self, count: int, shift: int = 0) -> None:
        """Fill the first `count` rows with random candidates, the same in every call, rotated by `shift` rows."""
        generator = torch.Generator().manual_seed(0)
        for part in self._parts.values():
            drawn = torch.randn(part.shape, generator=generator, dtype=torch.float32, device="cpu")[:count]
            part[:count].copy_(drawn.roll(shift, dims=0))

    # the mode belongs to a thread, and these two also run in a pool's threads
    @torch.inference_mode()
    def vectors(self, query: Query, count: int) -> Tensor:
        """Interaction vectors h and e of the first `count` candidates, (count, 2, d)."""
        hint, _, inputs = self._shared_by_queries(slice(0, count), "interaction")
        return torch.stack(self._layers.vectors(self._workspace(slice(0, count)), inputs, hint, query), dim=1)

    @torch.inference_mode()
    def _piece_scores(self, queries: Sequence[Query], rows: slice, score: str) -> Tensor:
        """Scores (B, C) float32 of the candidates in the given rows of the buffer."""
        out = torch.empty(len(queries), rows.stop - rows.start, dtype=torch.float32, device=self._layers.device)
        if self._graphs is None:
            hint, squares, inputs = self._shared_by_queries(rows, score)
            for number, query in enumerate(queries):
                out[number] = self._scores(rows, hint, squares, inputs, query)
            return out
        for number, query in enumerate(queries):
            slot = self._query_slot(query)
            key = rows.start, rows.stop, score, slot.length
            out[number] = self._graphs.call(
                key, lambda slot=slot: self._scores(rows, *self._shared_by_queries(rows, score), slot)
            )
        return out

    def _copy(
        self, positions: Tensor, rows: Mapping[str, Tensor], part: slice, wanted: Mapping[str, Tensor], first: int
    ) -> None:
        """Copy a part of a chunk into the wanted tensors, from row `first` on."""
        begin, end = part.start, part.stop
        copied = slice(first, first + end - begin)
        # rows that are on the GPU already need no staging
        if not self._plan.staged or rows[next(iter(rows))].device.type != "cpu":
            self._format.read(rows, begin, end, wanted, first)
            self._positions[copied] = positions[part]
            return
        if self._staging is None:
            arrays = {field.name: (field.shape, field.torch_dtype) for field in self._format.schema.fields}
            arrays[_POSITIONS] = (), torch.int64
            self._staging = Staging(arrays, self._plan.piece, self._layers.device)
        sent = {name: array for name, array in rows.items() if name.removesuffix("_scale") in wanted}
        on_device = self._staging.send({**sent, _POSITIONS: positions}, begin, end)
        self._format.read(on_device, 0, end - begin, wanted, first)
        self._positions[copied] = on_device[_POSITIONS]
        self._staging.release()

    def _shared_by_queries(self, rows: slice, score: str) -> tuple[Tensor, Tensor | None, Inputs | None]:
        """What all queries share: hints, their squared lengths for the dual term, the first layer's inputs."""
        hint = self._parts["hint"][rows] if "hint" in self._parts else mean_over_contexts(self._parts["context"][rows])
        squares = None
        if self._has_dual and score != "interaction":
            wide = hint.to(torch.promote_types(hint.dtype, torch.float32))
            squares = self._layers.row_products(self._workspace(rows), wide, wide)
        return hint, squares, None if score == "dual" else self._inputs(rows, hint)

    def _scores(self, rows: slice, hint: Tensor, squares: Tensor | None, inputs: Inputs | None, query: Query) -> Tensor:
        layers, workspace = self._layers, self._workspace(rows)
        terms = [] if inputs is None else [layers.interact(workspace, inputs, hint, query)]
        if squares is not None:
            terms.append(layers.dual_scores(layers.row_products(workspace, hint, query.direction), squares))
        return sum(terms[1:], terms[0])

    def _inputs(self, rows: slice, hint: Tensor) -> Inputs:
        """The first layer's inputs: stored with the candidates, or computed from their context embeddings."""
        part = {name: tensor[rows] for name, tensor in self._parts.items()}
        if not self._projected:
            return self._layers.project(self._workspace(rows), 0, part.get("context"), hint)
        return Inputs(
            part.get("context"),
            self._queries[rows],
            part.get("context_value"),
            part.get("own_logits"),
            part.get("gate"),
        )

    def _workspace(self, rows: slice) -> Workspace:
        size = 0 if self._graphs is None else rows.stop - rows.start
        if size not in self._workspaces:
            self._workspaces[size] = Workspace(self._layers.dtype, self._layers.device)
        return self._workspaces[size]

    def _query_slot(self, query: Query) -> Query:
        """Copy a query into the memory from which CUDA graphs read queries of its padded length; return that."""
        length = padded_length(query.length)
        slot, held = self._query_slots.get(length, (None, None))
        if slot is None:
            slot = query.empty(length)
        if held is not query:
            slot.copy_from(query)
            self._query_slots[length] = slot, query
        return slot

    def _check_chunk(self, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
        fields = self._fields
        if missing := [name for name in fields if name not in rows]:
            raise InputError(f"a chunk lacks {', '.join(missing)}; expected the fields {', '.join(fields)}")
        if any(len(rows[name]) != len(positions) for name in fields):
            counts = {name: len(rows[name]) for name in fields}
            raise InputError(
                f"a chunk has {len(positions)} positions but rows {counts}; expected a row of every field for each"
            )
        if len(positions):
            low, high = (int(bound) for bound in positions.aminmax())
            if low < 0 or high > LARGEST_ID:
                raise InputError(f"positions reach from {low} to {high}; expected values in 0..{LARGEST_ID}")
