"""`EncodingEngine`: the base of engines that encode queries and documents separately."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from mixencoder.base.encoder_passes import EncoderPasses
from mixencoder.base.engine import Engine, Request
from mixencoder.base.inference_context import inference
from mixencoder.base.inputs import as_list, positive_integer
from mixencoder.base.results import check_encoded
from mixencoder.base.scores import unique
from mixencoder.errors import InputError
from mixencoder.progress import progress_bar

Q = TypeVar("Q")
"""Encoded queries."""
D = TypeVar("D")
"""Encoded documents."""


class EncodingEngine(Engine, Generic[Q, D]):
    """An engine that encodes queries and documents separately, so that documents can be encoded ahead of time."""

    _derived = ("_passes",)

    def _derive(self) -> None:
        super()._derive()
        self._passes = EncoderPasses(self.model, self.tokenizer.pad_token_id or 0)

    @inference
    def encode_query(
        self, texts: str | Iterable[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> Q:
        """Encode queries once, for any number of candidates.

        Raises:
            InputError: there is no text, or a text is not a string.
            NonFiniteError: the model's result is NaN or infinite.
        """
        texts = as_list(texts, "query")
        if not texts:
            raise InputError("query is empty; expected at least one text")
        batch_size = positive_integer(batch_size, "batch_size")
        return self._finite_queries(self.read_query(texts), batch_size, show_progress_bar)

    @inference
    def encode_document(
        self, texts: str | Iterable[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> D:
        """Encode documents ahead of time, on the model's device, in its dtype; equal texts are encoded once.

        Raises:
            InputError: a text is not a string.
            NonFiniteError: the model's result is NaN or infinite.
        """
        batch_size = positive_integer(batch_size, "batch_size")
        return self._finite_documents(self.read_document(as_list(texts, "document")), batch_size, show_progress_bar)

    def interact(self, query_state: Q, candidates: D, *, score: str = "full") -> Tensor:
        """Score N encoded candidates for B encoded queries: (B, N) float32. This is the hot path.

        Args:
            query_state: from `encode_query`.
            candidates: from `encode_document`.
            score: one of `score_terms`.

        Raises:
            InputError: the model has no ranking head or no such score, or candidates have another shape.
            NonFiniteError: a score is NaN or infinite.
        """
        raise NotImplementedError

    def _score_all(self, queries: Sequence[str], documents: Sequence[str] | Any, request: Request) -> Tensor:
        options = request.batch_size, request.show_progress_bar
        # tokenise all texts before the first pass, so that an invalid text raises at once
        query_rows = self.read_query(queries)
        document_rows = None if isinstance(documents, self.encoded_types) else self.read_document(documents)
        query_state = self._finite_queries(query_rows, *options)
        candidates: Any = documents
        if document_rows is not None:
            candidates = self._finite_documents(document_rows, *options)
        return self.interact(query_state, candidates, score=request.score)

    def _finite_queries(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> Q:
        """Encode token rows of queries, and check that the result is finite."""
        return check_encoded(self._encode_queries(rows, batch_size, show_progress_bar), "queries", self.dtype)

    def _finite_documents(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> D:
        """Encode token rows of documents, equal rows once, and check that the result is finite."""
        distinct, number_of = unique(rows)
        # encoded documents of every architecture can be indexed by a tensor of their numbers
        encoded: Any = self._encode_documents(distinct, batch_size, show_progress_bar)
        return check_encoded(encoded, "documents", self.dtype)[number_of.to(self.device)]

    def _encode_queries(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> Q:
        """Encode token rows of queries, at least one."""
        raise NotImplementedError

    def _encode_documents(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> D:
        """Encode token rows of documents; the result can be indexed by a tensor of row numbers."""
        raise NotImplementedError

    def _encode(
        self,
        rows: Sequence[Sequence[int]],
        encode: Callable[[Tensor, Tensor], Any],
        batch_size: int,
        show_progress_bar: bool | None,
        name: str,
        *,
        alone: bool = False,
    ) -> Iterator[tuple[list[int], Any]]:
        """Encode token rows in passes of the backbone; for each pass yield its rows' numbers and the result of encode.

        A result may hold padding after a text's tokens. One that is not a tensor may also hold more rows than the pass
        has texts.

        Args:
            rows, encode, batch_size, alone: as in `EncoderPasses.run`.
            show_progress_bar: as in `predict`.
            name: the text before the progress bar.
        """
        batch_size = positive_integer(batch_size, "batch_size")
        options = {"batch_size": batch_size, "device": self.device, "alone": alone}
        with progress_bar(len(rows), name, "text", show_progress_bar) as bar:
            for numbers, encoded in self._passes.run(rows, encode, **options):
                yield numbers, encoded[: len(numbers)] if isinstance(encoded, Tensor) else encoded
                bar.update(len(numbers))
