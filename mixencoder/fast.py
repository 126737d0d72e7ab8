"""The front door: `MixEncoder`, from texts to scores and rankings.

Adds to `mixencoder.modeling` what text needs: a tokenizer, batching, devices, and the promise that a candidate's score
does not depend on what else is scored beside it (docs/determinism.md): texts are encoded in passes whose shapes keep a
text's bits (`mixencoder.base.encoder_passes`), pairs are scored in chunks of one shape (`mixencoder.ranking.pairs`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.engine import Request
from mixencoder.base.inference_context import inference
from mixencoder.base.inputs import as_list, check_documents, positive_integer
from mixencoder.base.modeling import HeadedModel
from mixencoder.base.results import Activation, RankResult, check_encoded
from mixencoder.base.scores import Pairs
from mixencoder.bundled import default_checkpoint
from mixencoder.errors import InputError
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.index.candidate_index import BuildEstimate
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.index_ranker import IndexRanker
from mixencoder.ranking.indexing import DocumentEncoder, IndexAdapter, estimate_index, open_index
from mixencoder.ranking.pairs import PairScorer
from mixencoder.ranking.query_cache import QueryStateCache
from mixkernels import select_backend

SCORES = ("full", "interaction", "dual")
"""Which part of the ranking score: the sum, ``h . e`` alone, or the dual term alone."""


class MixEncoder(EncodingEngine[QueryState, Tensor]):
    """Score and rank candidates for a query.

    Make one with `from_pretrained` (the bundled default, a directory, or a hub id) or `from_backbone` (an encoder to
    train from). Safe to use from several threads.

    Attributes:
        model: the `MixEncoderModel`.
        tokenizer: its tokenizer.
        read_query: from texts to token ids, as this engine cuts them.
        read_document: the same of documents.
        identity: what an index's fingerprint says of model and tokenizer.

    Example:
        >>> model = MixEncoder.from_pretrained()
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': 0, 'score': ...}]
    """

    model: MixEncoderModel
    model_class = MixEncoderModel
    score_terms = SCORES
    encoded_types = (Tensor,)
    _derived = (*EncodingEngine._derived, "identity", "_index_ranker", "_pair_scorer", "_query_states")

    def __init__(self, model: MixEncoderModel, tokenizer: Any, *, backend: str = "auto") -> None:
        select_backend(None if backend == "auto" else backend)
        model.kernel_backend = backend
        super().__init__(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
    ) -> "MixEncoder":
        """Load a checkpoint.

        Args:
            name_or_path: a directory, a hub id, or None for the default that the package bundles (no network).
            device: None and "auto" take a GPU if there is one, else the CPU.
            dtype: a torch dtype or its name, of `DTYPES`, or short as in "bf16". None and "auto": float32.
            backend: which mixkernels backend runs the attention: "auto", "triton", "torch" or "reference".

        Raises:
            CheckpointError: nothing is there, it is damaged, or it holds another kind of model.
            InputError: the device or the dtype does not exist.
            mixkernels.BackendError: the backend cannot run here; the message says why.
        """
        path = default_checkpoint() if name_or_path is None else name_or_path
        return cls(*cls._load(path, device, dtype), backend=backend)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | Path,
        num_context_embeddings: int = 1,
        interaction_layers: Sequence[int] = (-1,),
        num_labels: int | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        **config: Any,
    ) -> "MixEncoder":
        """Make an untrained MixEncoder on top of a pretrained encoder.

        Args:
            name_or_path: a directory or hub id of an encoder; `mixencoder.base.backbones.SUPPORTED` lists the kinds.
                The pooling that a folder of sentence-transformers names is followed, or warned of (`EncoderWarning`),
                where the model compares one vector a text and no pooling is asked for.
            num_context_embeddings: k, 1 to 16.
            interaction_layers: the backbone layers that interaction layers read and start from.
            num_labels: classes of a classification head, which becomes the only head. None: a ranking head. For both
                pass ``heads=("ranking", "classification")`` beside it.
            device, dtype, backend: as in `from_pretrained`.
            config: further fields of `MixEncoderConfig`.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        fields = {"num_context_embeddings": num_context_embeddings, "interaction_layers": interaction_layers, **config}
        poolings = None
        if config.get("dual_term"):
            # only the dual term compares the vectors that the encoder was trained to make
            poolings = {"mean": {}, **({"first": {"pooling": "first"}} if num_context_embeddings == 1 else {})}
        made = cls._start(name_or_path, num_labels, device, dtype, fields, poolings=poolings)
        return cls(*made, backend=backend)

    def _derive(self) -> None:
        super()._derive()
        self._pair_scorer = PairScorer(self.model)
        self._query_states = QueryStateCache()
        self.identity = ModelIdentity(self.model, self.tokenizer)
        self._index_ranker = IndexRanker(self.model, self.identity)

    def _shape(self) -> str:
        config = self.config
        layers = f"k={config.num_context_embeddings}, J={len(config.interaction_layers)} (layers "
        layers += ", ".join(map(str, config.interaction_layer_indices)) + ")"
        return f"{super()._shape()}, {layers}" + (", dual term" if config.dual_term else "")

    def _over(self, model: HeadedModel) -> Self:
        assert isinstance(model, MixEncoderModel), "a head is added to a model of one's own kind"
        return type(self)(model, self.tokenizer, backend=self.backend)

    @property
    def _document_encoder(self) -> DocumentEncoder:
        return DocumentEncoder(self.model, self.identity, self.read_document, self.encode_rows)

    @property
    def backend(self) -> str:
        """The mixkernels backend asked for."""
        return self.model.kernel_backend

    @overload
    def rank(
        self,
        query: str,
        documents: Iterable[str] | Tensor | CandidateIndex | Snapshot,
        top_k: int | None = ...,
        *,
        ids: Iterable[str] | Iterable[Iterable[str]] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Activation | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
        prefilter: int | None = ...,
        products: str = ...,
    ) -> list[RankResult]: ...

    @overload
    def rank(
        self,
        query: Iterable[str],
        documents: Iterable[str] | Tensor | CandidateIndex | Snapshot,
        top_k: int | None = ...,
        *,
        ids: Iterable[str] | Iterable[Iterable[str]] | None = ...,
        return_documents: bool = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Activation | None = ...,
        score: str = ...,
        return_probabilities: bool = ...,
        prefilter: int | None = ...,
        products: str = ...,
    ) -> list[list[RankResult]]: ...

    @inference
    def rank(
        self,
        query: str | Iterable[str],
        documents: Iterable[str] | Tensor | CandidateIndex | Snapshot,
        top_k: int | None = None,
        *,
        ids: Iterable[str] | Iterable[Iterable[str]] | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        score: str = "full",
        return_probabilities: bool = False,
        prefilter: int | None = None,
        products: str = "native",
    ) -> list[RankResult] | list[list[RankResult]]:
        """Rank documents for a query, best first, ties to the lower corpus_id.

        Args:
            query: one text, or several, which give a list of rankings.
            documents: texts, in anything that gives them in an order, what `encode_document` made of them, an index, or
                a view of one: ``index.snapshot()``, or ``index.snapshot().to("cuda")``, which a GPU ranks without
                reading it again.
            top_k: how many to return; None returns all.
            ids: a name of each document, returned as "id". With an index: rank those of its documents alone, for
                example what a first stage found; a list of ids, or one for each query.
            return_documents: also return each document's text.
            batch_size, show_progress_bar, score: as in `predict`.
            activation_fn: applied to the scores that are returned (B, n), best first, after the cut to top_k; returns
                as many numbers. It does not change the order.
            return_probabilities: also return what `probability` makes of each score.
            prefilter: with an index and the dual term: keep so many by the dual score, which costs little, and let
                only those interact with the query (docs/candidate-index.md has the measured loss).
            products: with an index: "native"; "bfloat16", where the device multiplies that itself; or "int8", on a
                CPU. The latter two are faster and move scores a little.

        Returns:
            A list of `mixencoder.base.results.RankResult` a query: ``{"corpus_id": int, "score": float, "text": str?,
            "id": str?, "probability": float?}``. With an index corpus_id is the document's place in iteration order,
            and "id" is always there.

        Raises:
            InputError: no query or no document, a text that is not a string, or a bad option.
            IndexMismatchError: another model made the index, or this one's weights have changed since.
            UnknownIdError, DuplicateIdError: the index does not hold a document of ids, or one is named twice.
            NonFiniteError: a score is NaN or infinite.
            ForkedProcessError: this process was forked from one that computes with threads.
        """
        if not isinstance(documents, CandidateIndex | Snapshot):
            if prefilter is not None or products != "native":
                raise InputError("prefilter and products are for an index; make one of the documents with index()")
            options: dict[str, Any] = {"ids": ids, "return_documents": return_documents, "batch_size": batch_size}
            options |= {"show_progress_bar": show_progress_bar, "activation_fn": activation_fn, "score": score}
            return super().rank(query, documents, top_k, return_probabilities=return_probabilities, **options)
        self._check_score(score)
        if return_probabilities:
            self._check_probabilities(score, activation_fn)
        queries = as_list(query, "query")
        if not queries:
            raise InputError("query is empty; expected at least one text")
        rankings = self._index_ranker.rank(
            self.query_states(queries, batch_size=batch_size),
            documents,
            top_k,
            ids=ids,
            show_progress_bar=show_progress_bar,
            prefilter=prefilter,
            return_documents=return_documents,
            activation_fn=activation_fn,
            score=score,
            products=products,
        )
        if return_probabilities:
            self._add_probabilities(rankings)
        return rankings[0] if isinstance(query, str) else rankings

    def index(
        self,
        documents: Iterable[str] | None = None,
        ids: Iterable[str] | None = None,
        path: str | Path | None = None,
        *,
        precision: str = "float16",
        layout: str = "projected",
        on_overflow: str = "truncate",
        metadata: Iterable[Mapping[str, Any] | None] | None = None,
        embeddings: Tensor | np.ndarray | None = None,
        store_text: bool = True,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> CandidateIndex:
        """Encode documents once into an index that `rank` reads, in memory or in a folder.

        In a folder it is committed every 1,024 texts; interrupted, the same call goes on where it stopped.

        Texts that are cut or hold no token are counted and warned of (`notices`), here and when more are added.

        Args:
            documents: several texts, of any number: an iterator is read as it goes.
            ids: a name of each; None takes a hash of the text, so that the same text twice is one document.
            path: a new or empty folder, or an unfinished index; None stays in memory.
            precision: "float32", "float16", "bfloat16" or "int8": how numbers are stored (docs/candidate-index.md).
            layout: "projected" stores all that the first interaction layer can know before a query; "compact" the
                context embeddings alone, which takes less room and more time.
            on_overflow: "truncate" cuts documents that are longer than the model reads, "chunk" splits them and ranks
                each by its best part, "error" refuses them.
            metadata: a JSON object of each document, or None, kept beside.
            embeddings: (N, k, d) of `encode_document`, taken instead of encoding texts.
            store_text: keep texts, for `return_documents` and for mending damage.
            batch_size, show_progress_bar: as in `encode_document`.

        Raises:
            InputError: an option or a text cannot be used.
            IndexStateError: a complete index or something else is at path; `open_index` opens one.
            IndexMismatchError: an unfinished index at path was begun by another model or with other settings.
            DuplicateIdError: an id is given twice.
            IndexStorageError, IndexLockedError: the disk refused, or somebody else is writing.
        """
        if documents is not None:
            check_documents(documents)
        batch_size = positive_integer(batch_size, "batch_size")
        index = IndexAdapter(self._document_encoder, precision, layout, on_overflow).create(path, store_text=store_text)
        index.build(
            documents,
            ids,
            metadata=metadata,
            embeddings=embeddings,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        return index

    def open_index(
        self, path: str | Path, *, read_only: bool = False, check_sizes: bool = True, verify: bool = False
    ) -> CandidateIndex:
        """Open an index that this checkpoint made, in this precision; opening writes nothing.

        Args:
            path: its folder.
            read_only: refuse writing.
            check_sizes: refuse an index whose files are too short; False to `CandidateIndex.repair` it.
            verify: also compare everything with its checksums, which reads all of it.

        Raises:
            IndexMismatchError: another model or other settings made it; the message names both.
            IndexStateError: there is no index, it is unfinished, or its format is newer.
            IndexDamagedError: files are missing, cut short or unreadable; with verify, a checksum disagrees.
        """
        return open_index(self._document_encoder, path, read_only=read_only, check_sizes=check_sizes, verify=verify)

    def estimate_index(
        self,
        documents: Iterable[str],
        *,
        precision: str = "float16",
        layout: str = "projected",
        on_overflow: str = "truncate",
        batch_size: int = 32,
    ) -> BuildEstimate:
        """Tell the bytes and the time that an index of documents will take, from encoding a few of them.

        Raises:
            InputError: an option or a text cannot be used.
        """
        options = {"precision": precision, "layout": layout, "on_overflow": on_overflow, "batch_size": batch_size}
        return estimate_index(self._document_encoder, list(check_documents(documents)), **options)

    @inference
    def query_states(self, texts: Iterable[str], *, batch_size: int = 32) -> list[QueryState]:
        """Encode queries, each as a state of its own (B = 1), or take them from a bounded cache of earlier ones.

        Raises:
            InputError: a text is not a string.
            NonFiniteError: what the model makes of them is NaN or infinite.
        """
        batch_size = positive_integer(batch_size, "batch_size")

        def encode(rows: Sequence[Sequence[int]]) -> QueryState:
            return self._finite_queries(rows, batch_size, show_progress_bar=False)

        return self._query_states.fetch(self.model, self.read_query(as_list(texts, "query")), encode)

    @inference
    def encode_rows(self, rows: Sequence[Sequence[int]], *, batch_size: int = 32) -> Tensor:
        """Encode documents that are token ids already, special tokens included: (N, k, d).

        Raises:
            NonFiniteError: what the model makes of them is NaN or infinite.
        """
        encoded = self._encode_documents(rows, positive_integer(batch_size, "batch_size"), show_progress_bar=False)
        return check_encoded(encoded, "documents", self.dtype)

    @inference
    def interact(self, query_state: QueryState, candidates: Tensor, *, score: str = "full") -> Tensor:
        """Ranking scores (B, N) float32 of B encoded queries for N encoded candidates (N, k, d): the hot path.

        Args:
            query_state: of `encode_query`.
            candidates: of `encode_document`.
            score: "full", or one term of it, of `SCORES`.

        Raises:
            InputError: the model has no ranking head or no such score, or candidates have another shape.
        """
        self.model.check_head("ranking")
        candidates = self._check_candidates(candidates)
        self._check_score(score)
        batch, count = len(query_state), len(candidates)
        pairs = Pairs(
            torch.arange(batch).repeat_interleave(count),
            torch.arange(count).repeat(batch),
        )
        return self._pair_scorer.score(query_state, candidates, pairs, head="ranking", score=score).view(batch, count)

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        query_state = self._encode_queries(queries, request.batch_size, request.show_progress_bar)
        candidates = self._encode_documents(documents, request.batch_size, request.show_progress_bar)
        order = torch.argsort(pairs.query, stable=True)
        rows = Pairs(pairs.query[order], pairs.candidate[order])
        scored = self._pair_scorer.score(query_state, candidates, rows, head=request.head, score=request.score)
        out = torch.empty_like(scored)
        out[order] = scored
        return out

    def _encode_queries(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> QueryState:
        parts = self._encode(rows, self.model.encode_query, batch_size, show_progress_bar, "Queries", alone=True)
        states: dict[int, tuple[QueryState, int]] = {}
        for numbers, state in parts:
            states.update({number: (state, row) for row, number in enumerate(numbers)})
        order = [states[number] for number in range(len(rows))]
        width = max((len(row) for row in rows), default=1)

        def gather(field: str, layer: int) -> Tensor:
            sample = getattr(order[0][0], field)[layer]
            out = sample.new_zeros(len(order), width, *sample.shape[2:])
            for number, (state, row) in enumerate(order):
                length = len(rows[number])
                out[number, :length] = getattr(state, field)[layer][row, :length]
            return out

        def stacked(field: str) -> Tensor:
            return torch.stack([getattr(state, field)[row] for state, row in order])

        layers = range(len(self.model.interaction))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        pooled = stacked("pooled") if self.config.dual_term else None
        first = None if self.config.state_row else stacked("first")
        return QueryState(
            tuple(gather("keys", layer) for layer in layers),
            tuple(gather("values", layer) for layer in layers),
            lengths,
            pooled,
            first,
        )

    def _encode_documents(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> Tensor:
        out = torch.empty(len(rows), *self.model.context_shape, dtype=self.dtype, device=self.device)
        parts = self._encode(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")
        for numbers, part in parts:
            out[numbers] = part
        return out

    def _check_candidates(self, candidates: Tensor) -> Tensor:
        expected = self.model.context_shape
        if not isinstance(candidates, Tensor) or candidates.dim() != 3 or candidates.shape[1:] != expected:
            found = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
            raise InputError(f"candidates are {found}; expected context embeddings (N, {expected[0]}, {expected[1]})")
        return candidates.to(self.device, self.dtype)

    def _check_score(self, score: str) -> None:
        super()._check_score(score)
        if score == "dual" and not self.config.dual_term:
            raise InputError('score is "dual", but this model has no dual term (dual_term=False)')
