"""The one place where the server calls the model: answers the rankings of a pass, gathering what can be gathered.

Texts of all requests are encoded together, each distinct text once; a score does not depend on what else is in the pass
(docs/determinism.md). Runs in the worker thread of `mixencoder.serving.batching`.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.configuration import MIN_TOKENS
from mixencoder.base.results import best_first
from mixencoder.base.tokenization import TextEncoder, Windows
from mixencoder.errors import MixEncoderError
from mixencoder.fast import MixEncoder
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.modeling import QueryState
from mixencoder.serving.batching import Job
from mixencoder.serving.work import RESULTS_OF_INDEX, Hit, Ranked, Ranking, Reading

ENCODED_AT_ONCE = 256
"""Texts between two looks at whether their clients are still there."""
_SIDES = {None: None, "start": "right", "end": "left"}
"""The truncation side for each value of `Reading.keep`."""


class _Tokens(NamedTuple):
    """The token rows of a request's documents, and the counts of its texts."""

    documents: list[tuple[int, ...]]
    total: int
    cut: int


class Ranker:
    """Ranks with one model and perhaps one index.

    Args:
        engine: the model; warnings about texts, which quote them, are switched off in a copy that shares its weights.
        index: the index, opened by an engine of `quiet_engine`, or None.
    """

    def __init__(self, engine: MixEncoder, index: CandidateIndex | None) -> None:
        self.index = index
        self.calibrated = engine.config.calibration is not None
        self._engines = {keep: quiet_engine(engine, side) for keep, side in _SIDES.items()}

    def run(self, jobs: Sequence[Job[Ranking]]) -> list[Ranked | Exception]:
        """Answer the rankings of a pass; an error of one does not affect the others."""
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

    def _run(self, jobs: Sequence[Job[Ranking]]) -> list[Ranked | Exception]:
        results: dict[int, Ranked | Exception] = {}
        tokens: dict[int, _Tokens] = {}
        for number, job in enumerate(jobs):
            try:
                tokens[number] = self._read(job.work)
            except MixEncoderError as error:
                results[number] = error
        live = {number: jobs[number] for number in tokens}
        for number, job in live.items():
            if job.work.paired:
                results[number] = self._score_pairs(job.work, tokens[number])
            elif job.work.uses_index and job.work.ids is not None:
                results[number] = self._rank_ids(job.work, job.work.ids, tokens[number])
        by_text = {n: job for n, job in live.items() if not job.work.uses_index and not job.work.paired}
        results |= self._rank_texts(by_text, tokens)
        whole = {n: job.work for n, job in live.items() if job.work.uses_index and job.work.ids is None}
        results |= self._rank_whole_index(whole, tokens)
        return [results[number] for number in range(len(jobs))]

    def _read(self, work: Ranking) -> _Tokens:
        engine, reading = self._engines[work.reading.keep], work.reading
        queries = _windows(engine.read_query, work.queries, reading)
        documents = Windows([], 0)
        if work.documents is not None:
            documents = _windows(_document_reader(engine, reading), work.documents, reading)
        total = sum(len(row) for windows in (queries, documents) for (row,) in windows.rows)
        return _Tokens([tuple(row) for (row,) in documents.rows], total, queries.cut + documents.cut)

    def _rank_texts(self, jobs: dict[int, Job[Ranking]], tokens: dict[int, _Tokens]) -> dict[int, Ranked | Exception]:
        """Rank documents given as texts: all are encoded in common passes, then each request is scored."""
        encoded: dict[tuple[int, ...], Tensor] = {}
        while missing := _missing(jobs, tokens, encoded):
            rows = self._engines[None].encode_rows(missing)
            encoded.update(zip(missing, rows, strict=True))
        wanted = {number: job for number, job in jobs.items() if not job.abandoned}
        results: dict[int, Ranked | Exception] = {number: Ranked([], 0, 0) for number in jobs if number not in wanted}
        states = self._query_states({number: job.work for number, job in wanted.items()})
        for number, job in wanted.items():
            candidates = torch.stack([encoded[row] for row in tokens[number].documents])
            scores = torch.cat([self._engines[None].interact(state, candidates) for state in states[number]])
            best, positions = best_first(scores, job.work.top_k)
            shown = best.numpy() if job.work.raw_scores else self.probabilities(best)
            rankings = [
                [Hit(index, score) for index, score in zip(found, values, strict=True)]
                for found, values in zip(positions.tolist(), shown.tolist(), strict=True)
            ]
            results[number] = Ranked(rankings, tokens[number].total, tokens[number].cut)
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

    def _score_pairs(self, work: Ranking, tokens: _Tokens) -> Ranked:
        engine = copy.copy(self._engines[work.reading.keep])
        engine.read_document = _document_reader(engine, work.reading)
        pairs = list(zip(work.queries, work.documents or (), strict=True))
        scores = engine.predict(pairs, head="ranking", convert_to_tensor=True, show_progress_bar=False)
        shown = scores.cpu().numpy() if work.raw_scores else self.probabilities(scores)
        return Ranked([[Hit(index, score) for index, score in enumerate(shown.tolist())]], tokens.total, tokens.cut)

    def _rank_ids(self, work: Ranking, ids: tuple[str, ...], tokens: _Tokens) -> Ranked:
        view = self._view()
        position_of = {name: number for number, name in enumerate(ids)}
        rankings = self._rank_index([work], view, work.top_k, list(ids))
        hits = [
            [hit._replace(index=position_of[hit.id or ""]) for hit in self._hits(ranking, view, work)]
            for ranking in rankings
        ]
        return Ranked(hits, tokens.total, tokens.cut)

    def _rank_whole_index(self, works: dict[int, Ranking], tokens: dict[int, _Tokens]) -> dict[int, Ranked | Exception]:
        """Rank all documents of the index; requests for equally many results share one run over it."""
        results: dict[int, Ranked | Exception] = {}
        groups: dict[tuple[str | None, int], list[int]] = {}
        for number, work in works.items():
            groups.setdefault((work.reading.keep, work.top_k or RESULTS_OF_INDEX), []).append(number)
        view = self._view() if works else None
        for (_, top_k), numbers in groups.items():
            assert view is not None, "there are requests"
            rankings = iter(self._rank_index([works[number] for number in numbers], view, top_k, None))
            for number in numbers:
                work = works[number]
                hits = [self._hits(next(rankings), view, work) for _ in work.queries]
                results[number] = Ranked(hits, tokens[number].total, tokens[number].cut)
        return results

    def _rank_index(
        self, works: Sequence[Ranking], view: Snapshot, top_k: int | None, ids: list[str] | None
    ) -> list[list[Any]]:
        engine = self._engines[works[0].reading.keep]
        queries = [query for work in works for query in work.queries]
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


def _missing(
    jobs: dict[int, Job[Ranking]], tokens: dict[int, _Tokens], encoded: dict[tuple[int, ...], Tensor]
) -> list[tuple[int, ...]]:
    """Return token rows that clients still wait for and that are not encoded, at most `ENCODED_AT_ONCE`."""
    rows: dict[tuple[int, ...], None] = {}
    for number, job in jobs.items():
        if not job.abandoned:
            for row in tokens[number].documents:
                if row not in encoded:
                    rows[row] = None
                    if len(rows) == ENCODED_AT_ONCE:
                        return list(rows)
    return list(rows)
