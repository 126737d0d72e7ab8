"""PyTerrier: `MixEncoderReranker` scores texts in a frame, `MixEncoderIndex` stores candidates and ranks them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixencoder.fast import MixEncoder
from mixencoder.integrations.shared import Model, engine_of, missing

try:
    import pandas as pd
    import pyterrier as pt
except ImportError as error:
    raise missing("pyterrier", error) from error


class MixEncoderReranker(pt.Transformer):
    """Score each row of a frame with qid, query, docno and text; the result has new columns score and rank.

    Args:
        model: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        text_field: the column of the documents' texts.
        batch_size: texts encoded at once.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    def __init__(self, model: Model = None, *, text_field: str = "text", batch_size: int = 32, **options: Any) -> None:
        self.engine = engine_of(model, **options)
        self.text_field, self.batch_size = text_field, batch_size

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return a scored copy of the frame; equal texts are encoded once."""
        pt.validate.result_frame(inp, extra_columns=["query", self.text_field], context=self)
        pairs = list(zip(inp["query"], inp[self.text_field], strict=True))
        scores = self.engine.predict(pairs, head="ranking", batch_size=self.batch_size)
        return _ranked(inp.assign(score=scores.astype(float)))


class MixEncoderIndex(pt.Indexer):
    """Candidates stored in a folder: encoded once, by `index`, and ranked by any number of pipelines.

    As a transformer it ranks all candidates for frames of queries, and scores again the documents of frames that have a
    column docno, whose texts are not needed.

    Args:
        path: a folder, of an index or for one.
        model: a MixEncoder, the directory or hub id of its checkpoint, or None for the bundled default.
        num_results: how many candidates to return for a query.
        options: device and dtype, as in `MixEncoder.from_pretrained`.
    """

    def __init__(
        self, path: str | Path, model: MixEncoder | str | Path | None = None, *, num_results: int = 1000, **options: Any
    ) -> None:
        self.path, self.num_results = path, num_results
        self.engine = model if isinstance(model, MixEncoder) else MixEncoder.from_pretrained(model, **options)
        self._opened: Any = None

    def index(self, iter: Iterable[dict[str, Any]], **options: Any) -> "MixEncoderIndex":
        """Encode and store documents with docno and text; options are those of `MixEncoder.index`."""
        texts, names = _columns(iter)
        self._opened = self.engine.index(texts, names, self.path, **options)
        return self

    def index_inputs(self) -> list[list[str]]:
        """Return the columns that `index` needs."""
        return [["docno", "text"]]

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return a frame with docno, score and rank: of the candidates, or of the frame's own documents."""
        if "docno" in inp.columns:
            pt.validate.result_frame(inp, extra_columns=["query"], context=self)
            return self._scored(inp)
        pt.validate.query_frame(inp, extra_columns=["query"], context=self)
        rankings = self.engine.rank(list(inp["query"]), self._index(), self.num_results) if len(inp) else []
        rows = [(row, entry["id"], entry["score"]) for row, found in enumerate(rankings) for entry in found]
        found = inp.drop(columns=["score", "rank"], errors="ignore").iloc[[row for row, _, _ in rows]]
        scores = pd.Series([score for _, _, score in rows], dtype=float).to_numpy()
        return _ranked(found.assign(docno=[name for _, name, _ in rows], score=scores))

    def _scored(self, inp: pd.DataFrame) -> pd.DataFrame:
        inp = inp.reset_index(drop=True)
        scores = pd.Series(index=inp.index, dtype=float)
        for query, rows in inp.groupby("query", sort=False):
            ids = list(dict.fromkeys(rows["docno"]))
            score_of = {found["id"]: found["score"] for found in self.engine.rank(query, self._index(), ids=ids)}
            scores[rows.index] = rows["docno"].map(score_of)
        return _ranked(inp.assign(score=scores))

    def _index(self) -> Any:
        if self._opened is None:
            self._opened = self.engine.open_index(self.path, read_only=True)
        return self._opened


def _columns(documents: Iterable[dict[str, Any]]) -> tuple[Iterator[str], Iterator[str]]:
    """Return texts and names of documents as two iterators that read the documents as they advance."""
    import itertools

    first, second = itertools.tee(documents)
    return (document["text"] for document in first), (str(document["docno"]) for document in second)


def _ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with a rank for each score, rows of each query best first."""
    ranked = pt.model.add_ranks(frame)
    return ranked.sort_values(["qid", "rank"], kind="stable").reset_index(drop=True)
