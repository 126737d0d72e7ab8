"""The one place where the server calls the model: answers the rankings of a pass, gathering what can be gathered.

Texts of all requests are encoded together, each distinct text once; a score does not depend on what else is in the pass
(docs/determinism.md). A request with many texts takes several passes. Runs in the worker thread of
`mixencoder.serving.batching`.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.configuration import MIN_TOKENS
from mixencoder.base.results import RankResult, best_first
from mixencoder.base.tokenization import TextEncoder, Windows
from mixencoder.errors import MixEncoderError
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.modeling import QueryState
from mixencoder.serving.batching import SHARE, UNFINISHED, Job
from mixencoder.serving.errors import RequestError, too_large
from mixencoder.serving.work import RESULTS_OF_INDEX, Explained, Explaining, Hit, Ranked, Ranking, Reading

RankStored = Callable[[MixEncoder, list[str], int | None, list[str] | None], list[list[RankResult]]]
"""Ranks candidates of the index elsewhere: (engine, queries, top_k, ids) -> what `MixEncoder.rank` over it returns.

The engine reads queries as the requests want; ids None ranks all. A `RequestError` becomes the requests' answer."""

_Row = tuple[int, ...]
"""Token ids of a text."""
_SIDES = {None: None, "start": "right", "end": "left"}
"""The truncation side for each value of `Reading.keep`."""


@dataclass
class _Progress:
    """How far the passes have come with a request."""

    rows: list[_Row]
    """The token row of each document."""
    tokens: int
    """Tokens of the queries and documents."""
    cut: int
    """Number of texts that lost tokens."""
    missing: list[_Row]
    """Distinct rows that are not encoded yet."""
    encoded: dict[_Row, Tensor] = field(default_factory=dict)
    """Context embeddings (k, d) of the others."""
    scores: list[Tensor] = field(default_factory=list)
    """With pairs: the scores of the first ones."""

    def ranked(self, rankings: list[list[Hit]]) -> Ranked:
        """Return the answer to the request."""
        return Ranked(rankings, self.tokens, self.cut)


class Ranker:
    """Ranks with one model and perhaps one index.

    Args:
        engine: the model; warnings about texts, which quote them, are switched off in a copy that shares its weights.
        index: the index, opened by an engine of `quiet_engine`, or None.
        most_tokens: limit for the tokens of all texts of a request.
        rank_stored: ranks candidates of the index in place of the engine; None leaves that to the engine.
    """

    def __init__(
        self,
        engine: MixEncoder,
        index: CandidateIndex | None,
        *,
        most_tokens: int,
        rank_stored: RankStored | None = None,
    ) -> None:
        self.index, self._most_tokens, self._rank_stored = index, most_tokens, rank_stored
        self.calibrated = engine.config.calibration is not None
        self._engines = {keep: quiet_engine(engine, side) for keep, side in _SIDES.items()}

    def run(self, jobs: Sequence[Job[Ranking]]) -> list[Any]:
        """Run a pass: for each request return a `Ranked`, an exception or `UNFINISHED`.

        An error of one request does not affect the others.
        """
        try:
            return self._run(jobs)
        except MixEncoderError as error:
            if len(jobs) == 1:
                return [error]
            return [self.run([job])[0] for job in jobs]

    def probabilities(self, scores: Tensor) -> np.ndarray:
        """Return probabilities (float64) of scores: calibrated, or the plain sigmoid of a model without calibration."""
        if self.calibrated:
            return self._engines[None].probability(scores)
        return torch.sigmoid(scores.double()).cpu().numpy()

    def explain(self, work: Explaining) -> Explained:
        """Explain a score.

        Raises:
            RequestError: the index does not hold the text.
            MixEncoderError: the id is unknown, or a text cannot be used.
        """
        document = work.document
        if work.id is not None:
            document = self._view().get(work.id).text
        if document is None:
            raise RequestError(422, "validation", "the index holds no texts; give the document instead of its id")
        found = self._engines[None].explain(work.query, document)
        return Explained(found, float(self.probabilities(torch.tensor(found.score))))

    def _run(self, jobs: Sequence[Job[Ranking]]) -> list[Any]:
        results: dict[int, Any] = {}
        for number, job in enumerate(jobs):
            try:
                job.state = self._begin(job.work) if job.state is None else job.state
            except (MixEncoderError, RequestError) as error:
                results[number] = error
        live = {number: job for number, job in enumerate(jobs) if number not in results}
        by_id = {n: job.work for n, job in live.items() if job.work.uses_index and job.work.ids is not None}
        # together is faster than one by one; the engine keeps the states for the rankings that follow
        self._query_states(by_id)
        for number, job in live.items():
            if job.work.paired:
                results[number] = self._score_pairs(job.work, job.state)
            elif job.work.uses_index and job.work.ids is not None:
                results[number] = self._rank_ids(job.work, job.work.ids, job.state)
        whole = {n: job for n, job in live.items() if job.work.uses_index and job.work.ids is None}
        results |= self._rank_whole_index(whole)
        by_text = {n: job for n, job in live.items() if not job.work.uses_index and not job.work.paired}
        results |= self._rank_texts(by_text)
        return [results[number] for number in range(len(jobs))]

    def _begin(self, work: Ranking) -> _Progress:
        engine = self._engines[work.reading.keep]
        queries = _windows(engine.read_query, work.queries, work.reading)
        documents = _windows(_document_reader(engine, work.reading), work.documents or (), work.reading)
        tokens = sum(len(row) for windows in (queries, documents) for (row,) in windows.rows)
        if tokens > self._most_tokens:
            raise too_large("the request", tokens, self._most_tokens, "tokens")
        rows = [tuple(row) for (row,) in documents.rows]
        # texts of equal length are encoded in one pass of the backbone, so keep them together
        missing = sorted(dict.fromkeys(rows), key=len)
        return _Progress(rows, tokens, queries.cut + documents.cut, missing)

    def _rank_texts(self, jobs: dict[int, Job[Ranking]]) -> dict[int, Any]:
        """Encode the next documents of all requests together, and score the requests that are complete then."""
        wanted = list(dict.fromkeys(row for job in jobs.values() for row in job.state.missing[:SHARE]))
        encoded = dict(zip(wanted, self._engines[None].encode_rows(wanted), strict=True)) if wanted else {}
        for job in jobs.values():
            progress: _Progress = job.state
            progress.encoded |= {row: encoded[row] for row in progress.missing if row in encoded}
            progress.missing = [row for row in progress.missing if row not in encoded]
        complete = {number: job for number, job in jobs.items() if not job.state.missing}
        states = self._query_states({number: job.work for number, job in complete.items()})
        results: dict[int, Any] = dict.fromkeys(jobs, UNFINISHED)
        for number, job in complete.items():
            candidates = torch.stack([job.state.encoded[row] for row in job.state.rows])
            scores = torch.cat([self._engines[None].interact(state, candidates) for state in states[number]])
            best, positions = best_first(scores, job.work.top_k)
            shown = best.numpy() if job.work.raw_scores else self.probabilities(best)
            rankings = [
                [Hit(index, score) for index, score in zip(found, values, strict=True)]
                for found, values in zip(positions.tolist(), shown.tolist(), strict=True)
            ]
            results[number] = job.state.ranked(rankings)
        return results

    def _query_states(self, works: dict[int, Ranking]) -> dict[int, list[QueryState]]:
        """Encode the queries of all requests together."""
        found: dict[int, list[QueryState]] = {}
        for keep, engine in self._engines.items():
            numbers = [number for number, work in works.items() if work.reading.keep == keep]
            texts = [query for number in numbers for query in works[number].queries]
            states = iter(engine.query_states(texts) if texts else ())
            found |= {number: [next(states) for _ in works[number].queries] for number in numbers}
        return found

    def _score_pairs(self, work: Ranking, progress: _Progress) -> Any:
        """Score the next pairs of a request."""
        engine = copy.copy(self._engines[work.reading.keep])
        engine.read_document = _document_reader(engine, work.reading)
        pairs = list(zip(work.queries, work.documents or (), strict=True))
        first = sum(map(len, progress.scores))
        options: dict[str, Any] = {"head": "ranking", "convert_to_tensor": True, "show_progress_bar": False}
        progress.scores.append(engine.predict(pairs[first : first + SHARE], **options))
        if first + SHARE < len(pairs):
            return UNFINISHED
        scores = torch.cat(progress.scores)
        shown = scores.cpu().numpy() if work.raw_scores else self.probabilities(scores)
        return progress.ranked([[Hit(index, score) for index, score in enumerate(shown.tolist())]])

    def _rank_ids(
        self, work: Ranking, ids: tuple[str, ...], progress: _Progress
    ) -> Ranked | MixEncoderError | RequestError:
        view = self._view()
        position_of = {name: number for number, name in enumerate(ids)}
        try:
            rankings = self._rank_index([work], view, work.top_k, list(ids))
        except (MixEncoderError, RequestError) as error:
            # most often an unknown id
            return error
        hits = [
            [hit._replace(index=position_of[hit.id or ""]) for hit in self._hits(ranking, view, work)]
            for ranking in rankings
        ]
        return progress.ranked(hits)

    def _rank_whole_index(self, jobs: dict[int, Job[Ranking]]) -> dict[int, Ranked | RequestError]:
        """Rank all documents of the index; requests for equally many results share one run over it."""
        results: dict[int, Ranked | RequestError] = {}
        groups: dict[tuple[str | None, int], list[int]] = {}
        for number, job in jobs.items():
            key = job.work.reading.keep, job.work.top_k or RESULTS_OF_INDEX
            groups.setdefault(key, []).append(number)
        view = self._view() if jobs else None
        for (_, top_k), numbers in groups.items():
            assert view is not None, "there are requests"
            try:
                rankings = iter(self._rank_index([jobs[number].work for number in numbers], view, top_k, None))
            except RequestError as error:
                results |= dict.fromkeys(numbers, error)
                continue
            for number in numbers:
                work = jobs[number].work
                hits = [self._hits(next(rankings), view, work) for _ in work.queries]
                results[number] = jobs[number].state.ranked(hits)
        return results

    def _rank_index(
        self, works: Sequence[Ranking], view: Snapshot, top_k: int | None, ids: list[str] | None
    ) -> list[list[Any]]:
        engine = self._engines[works[0].reading.keep]
        queries = [query for work in works for query in work.queries]
        if self._rank_stored is not None:
            return self._rank_stored(engine, queries, top_k, ids)
        return engine.rank(queries, view, top_k, ids=ids, show_progress_bar=False)

    def _hits(self, ranking: Sequence[Any], view: Snapshot, work: Ranking) -> list[Hit]:
        if not ranking:
            return []
        scores = torch.tensor([entry["score"] for entry in ranking])
        shown = scores.numpy() if work.raw_scores else self.probabilities(scores)
        stored = work.with_metadata or work.with_texts
        records = view.records([entry["corpus_id"] for entry in ranking]) if stored else [None] * len(ranking)
        return [
            Hit(
                entry["corpus_id"],
                score,
                entry["id"],
                record.text if record is not None and work.with_texts else None,
                json.loads(record.metadata) if record is not None and record.metadata and work.with_metadata else None,
            )
            for entry, score, record in zip(ranking, shown.tolist(), records, strict=True)
        ]

    def _view(self) -> Snapshot:
        assert self.index is not None, "the service rejects requests for an index that it does not have"
        return self.index.snapshot()


def quiet_engine(engine: MixEncoder, truncation_side: str | None = None) -> MixEncoder:
    """Return an engine with the same weights that gives no warnings about texts, as these quote them.

    Args:
        engine: the engine.
        truncation_side: "right" keeps the start of texts that are too long, "left" their end; None changes nothing.
    """
    other = copy.copy(engine)
    for name in ("read_query", "read_document"):
        read = getattr(engine, name).quiet()
        setattr(
            other, name, read if truncation_side is None else dataclasses.replace(read, truncation_side=truncation_side)
        )
    return other


def _document_reader(engine: MixEncoder, reading: Reading) -> TextEncoder:
    read = engine.read_document
    if reading.document_tokens is None:
        return read
    return dataclasses.replace(read, max_length=max(MIN_TOKENS, min(read.max_length, reading.document_tokens)))


def _windows(read: TextEncoder, texts: Sequence[str], reading: Reading) -> Windows:
    return read.windows(texts, on_overflow="error" if reading.refuse else "truncate")
