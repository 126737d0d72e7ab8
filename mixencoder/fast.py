"""The entry point: `MixEncoder`, from texts to scores and rankings.

Adds tokenizer, batching and devices to `mixencoder.modeling`. A candidate's score does not depend on what else is
scored in the same call (docs/determinism.md): texts are encoded in passes whose shapes keep a text's bits
(`mixencoder.base.encoder_passes`), and pairs are scored in blocks of one shape (`mixencoder.ranking.pairs`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor

from mixencoder.base.checkpoints.locations import HubOptions
from mixencoder.base.engine import Request
from mixencoder.base.inference_context import inference
from mixencoder.base.inputs import as_list, positive_integer
from mixencoder.base.modeling import HeadedModel
from mixencoder.base.results import Activation, RankResult
from mixencoder.base.scores import Pairs
from mixencoder.bundled import default_checkpoint
from mixencoder.errors import InputError
from mixencoder.explanation.attention import explain_pair
from mixencoder.explanation.result import PairExplanation
from mixencoder.first_stage import FirstStage
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.index_ranker import IndexRanker
from mixencoder.ranking.indexing_engine import IndexingEngine
from mixencoder.ranking.pairs import PairScorer
from mixencoder.ranking.prefilter import check_prefilter
from mixencoder.ranking.query_cache import QueryStateCache
from mixkernels import select_backend

SCORES = ("full", "interaction", "dual")
"""Parts of the ranking score: the sum, ``h . e`` alone, or the dual term alone."""

_PROBES = (
    "A short sentence.",
    "How do I undo the last commit without losing my changes?",
    "The committee approved the budget for the next year after a long discussion about schools and roads.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
)
"""Texts whose vectors show how long an encoder's vectors are."""


class MixEncoder(IndexingEngine):
    """Score and rank candidates for a query.

    Make one with `from_pretrained` (the bundled default, a directory, or a hub id), or with `from_backbone` (an
    untrained model on a pretrained encoder). Safe to use from several threads.

    Attributes:
        model: the `MixEncoderModel`.
        tokenizer: its tokenizer.
        read_query: turns queries into token ids, cut to this engine's limits.
        read_document: the same for documents.
        identity: the fingerprint of model and tokenizer that an index stores.

    Example:
        >>> model = MixEncoder.from_pretrained()
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': 0, 'score': ...}]
    """

    model: MixEncoderModel
    model_class = MixEncoderModel
    score_terms = SCORES
    encoded_types = (Tensor,)
    _derived = (*IndexingEngine._derived, "_index_ranker", "_pair_scorer", "_query_states")

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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> "MixEncoder":
        """Load a checkpoint.

        Args:
            name_or_path: a directory, a hub id, or None for the default that the package bundles (no network).
            device: None and "auto" take a GPU if there is one, else the CPU.
            dtype: of the weights: a torch dtype, its name, or a short form such as "bf16". None: float32. "auto":
                bfloat16 where the device multiplies it faster, which changes scores a little, else float32.
            backend: which mixkernels backend runs the attention: "auto", "triton", "torch" or "reference".
            revision, token, cache_dir, local_files_only: of a hub id: branch, tag or commit; access token; folder of
                downloads; True never asks the hub. A folder ignores them.
            subfolder: the folder below that holds the checkpoint.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or it holds another kind of model.
            InputError: the device or the dtype does not exist.
            mixkernels.BackendError: the backend cannot run here; the message says why.
        """
        path = default_checkpoint() if name_or_path is None else name_or_path
        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        return cls(*cls._load(path, device, dtype, hub), backend=backend)

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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        **config: Any,
    ) -> "MixEncoder":
        """Make an untrained MixEncoder on top of a pretrained encoder.

        Args:
            name_or_path: a directory or hub id of an encoder; `mixencoder.base.backbones.SUPPORTED` lists the kinds.
                If the model compares one vector per text and no pooling is given, the pooling of a
                sentence-transformers folder is taken over, with an `EncoderWarning` where that is impossible.
            num_context_embeddings: k, 1 to 16.
            interaction_layers: the backbone layers whose keys and values the interaction layers read, and whose weights
                they start with.
            num_labels: number of classes of a classification head, which becomes the only head. None: a ranking head.
                For both heads also pass ``heads=("ranking", "classification")``.
            device, dtype, backend, revision, token, cache_dir, local_files_only, subfolder: as in `from_pretrained`.
            config: further fields of `MixEncoderConfig`.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        fields = {"num_context_embeddings": num_context_embeddings, "interaction_layers": interaction_layers, **config}
        poolings = None
        if config.get("dual_term"):
            # only the dual term compares the vectors that the encoder was trained to produce
            poolings = {"mean": {}, **({"first": {"pooling": "first"}} if num_context_embeddings == 1 else {})}
        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        model, tokenizer = cls._make_untrained(
            name_or_path, num_labels, device, dtype, fields, hub=hub, poolings=poolings
        )
        return cls(model, tokenizer, backend=backend)

    @classmethod
    def from_vectors(
        cls,
        encoder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        **config: Any,
    ) -> "MixEncoder":
        """Make an untrained MixEncoder for vectors that an encoder made before, normalised or not, without their texts.

        ``model.index(embeddings=vectors, ids=ids)`` stores the vectors, and ``mixencoder train --freeze-encoder
        --index`` trains the query's side and the interaction on them; the vectors stay. Before training, rank with
        ``score="dual"``: the cosine of query and vector.

        Args:
            encoder: the directory or hub id of the encoder that made the vectors, as the mean of its final token
                vectors, or as the first one's if the folder of a sentence-transformers model says so.
            device, dtype, backend: as in `from_pretrained`.
            config: options of the hub as in `from_pretrained`, and fields of `MixEncoderConfig` other than
                num_context_embeddings, which is 1, and dual_term, which is True. By default `query_adapter_size` is the
                width of the vectors, and `context_norm` is the mean length of this encoder's vectors of some texts.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        fields: dict[str, Any] = {"num_context_embeddings": 1, "dual_term": True}
        if given := sorted(fields.keys() & config.keys()):
            raise InputError(f"{' and '.join(given)} cannot be chosen: a document has one vector, compared by cosine")
        options: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
        options |= {field.name: config.pop(field.name) for field in fields_of(HubOptions) if field.name in config}
        plain = cls.from_backbone(encoder, **fields, **options)
        lengths = plain.encode_document(_PROBES, show_progress_bar=False).float().norm(dim=-1)
        defaults: dict[str, Any] = {
            "query_adapter_size": plain.config.hidden_size,
            "context_norm": float(lengths.mean()),
        }
        return cls.from_backbone(encoder, **fields, **{**defaults, **config}, **options)

    def _derive(self) -> None:
        super()._derive()
        self._pair_scorer = PairScorer(self.model)
        self._query_states = QueryStateCache()
        self._index_ranker = IndexRanker(self.model, self.identity)

    def _sizes(self) -> str:
        config = self.config
        layers = f"k={config.num_context_embeddings}, J={len(config.interaction_layers)} (layers "
        layers += ", ".join(map(str, config.interaction_layer_indices)) + ")"
        return f"{super()._sizes()}, {layers}" + (", dual term" if config.dual_term else "")

    def _with_model(self, model: HeadedModel) -> Self:
        assert isinstance(model, MixEncoderModel), "the model of a MixEncoder is a MixEncoderModel"
        return type(self)(model, self.tokenizer, backend=self.backend)

    @property
    def backend(self) -> str:
        """The mixkernels backend that was chosen, "auto" by default."""
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
        prefilter: int | str | None = ...,
        first_stage: FirstStage | None = ...,
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
        prefilter: int | str | None = ...,
        first_stage: FirstStage | None = ...,
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
        prefilter: int | str | None = "auto",
        first_stage: FirstStage | None = None,
        products: str = "native",
    ) -> list[RankResult] | list[list[RankResult]]:
        """Rank documents for a query, best first, ties to the lower corpus_id.

        Args:
            query: one text, or several, which give a list of rankings.
            documents: texts in any ordered iterable, the result of `encode_document`, an index, or a snapshot of one:
                ``index.snapshot()``, or ``index.snapshot().to("cuda")``, which stays on the GPU between calls.
            top_k: how many to return; None returns all.
            ids: a name for each document, returned as "id". With an index: rank only these of its documents, for
                example the results of a first stage; one list of ids, or one list per query.
            return_documents: also return each document's text.
            batch_size, show_progress_bar, score: as in `predict`.
            activation_fn: applied to the returned scores (B, n), best first, after the cut to top_k; keeps their
                shape. It does not change the order.
            return_probabilities: also return the `probability` of each score.
            prefilter: with an index and the dual term: fully score only this many documents, the best by dual score,
                which is faster and may lose a result (docs/candidate-index.md has the measured loss). None scores all.
                "auto" takes about ten per result, at least 100, if there are more than four times as many documents;
                it scores all if top_k is None, score is not "full", or the model has no dual term.
            first_stage: with an index: chooses the documents that prefilter counts, in place of their dual scores, so
                that not all documents are read (docs/scale.md): `open_first_stage`, or any other
                `mixencoder.first_stage.FirstStage`. It is not searched where prefilter scores all documents anyway.
            products: with an index, what matrix products compute in: "native", the model's dtype; "bfloat16", if the
                device has instructions for it; "auto", bfloat16 for a float32 model where it is faster, else "native";
                or "int8", on a CPU. bfloat16 and int8 change scores slightly.

        Returns:
            For each query a list of `mixencoder.base.results.RankResult`: ``{"corpus_id": int, "score": float, "text":
            str?, "id": str?, "probability": float?}``. With an index, corpus_id is the document's position in iteration
            order, and "id" is always present.

        Raises:
            InputError: there is no query or no document, a text is not a string, or an option is invalid.
            IndexMismatchError: another encoder made the index, this model's encoder has changed since, or the index has
                changed since first_stage was built.
            UnknownIdError: the index does not hold one of the ids.
            DuplicateIdError: an id is given twice.
            NonFiniteError: a score is NaN or infinite.
            ForkedProcessError: this process was forked from one that had computed with threads.
        """
        if not isinstance(documents, CandidateIndex | Snapshot):
            if check_prefilter(prefilter) not in (None, "auto") or products != "native":
                raise InputError("prefilter and products are for an index; make one of the documents with index()")
            if first_stage is not None:
                raise InputError("first_stage is for an index; make one of the documents with index()")
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
            first_stage=first_stage,
            return_documents=return_documents,
            activation_fn=activation_fn,
            score=score,
            products=products,
        )
        if return_probabilities:
            self._add_probabilities(rankings)
        return rankings[0] if isinstance(query, str) else rankings

    @inference
    def query_states(self, texts: Iterable[str], *, batch_size: int = 32) -> list[QueryState]:
        """Encode queries, one state (B = 1) each, or take them from a bounded cache of earlier ones.

        Raises:
            InputError: a text is not a string.
            NonFiniteError: the model's result is NaN or infinite.
        """
        batch_size = positive_integer(batch_size, "batch_size")

        def encode(rows: Sequence[Sequence[int]]) -> QueryState:
            return self._finite_queries(rows, batch_size, show_progress_bar=False)

        return self._query_states.fetch(self.model, self.read_query(as_list(texts, "query")), encode)

    @inference
    def interact(self, query_state: QueryState, candidates: Tensor, *, score: str = "full") -> Tensor:
        """Score N encoded candidates (N, k, d) for B encoded queries: (B, N) float32. This is the hot path.

        Args:
            query_state: from `encode_query`.
            candidates: from `encode_document`.
            score: "full", or one term of it, of `SCORES`.

        Raises:
            InputError: the model has no ranking head or no such score, or candidates have another shape.
            NonFiniteError: a score is NaN or infinite.
        """
        self.model.check_head("ranking")
        candidates = self._check_candidates(candidates)
        self._check_score(score)
        batch, count = len(query_state), len(candidates)
        pairs = Pairs(torch.arange(batch).repeat_interleave(count), torch.arange(count).repeat(batch))
        return self._pair_scorer.score(query_state, candidates, pairs, head="ranking", score=score).view(batch, count)

    @inference
    def explain(self, query: str, document: str) -> PairExplanation:
        """Explain the ranking score of one document for one query: what attends to what, and the terms of the score.

        Raises:
            InputError: the model has no ranking head, or a text is not a string or cannot be read.
            NonFiniteError: a score is NaN or infinite.
        """
        self.model.check_head("ranking")
        read_query, read_document = self.read_query.locate(query), self.read_document.locate(document)
        state = self._finite_queries([read_query.ids], 1, show_progress_bar=False)
        contexts = self._finite_documents([read_document.ids], 1, show_progress_bar=False)
        names = SCORES if self.config.dual_term else ("full", "interaction")
        scores = {name: float(self.interact(state, contexts, score=name)) for name in names}
        return explain_pair(
            self.model,
            (query, read_query),
            (document, read_document),
            query_state=state,
            contexts=contexts,
            token_names=self.tokenizer.convert_ids_to_tokens,
            scores=scores,
            probability=None if self.config.calibration is None else float(self.probability(scores["full"])),
        )

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        query_state = self._encode_queries(queries, request.batch_size, request.show_progress_bar)
        candidates = self._encode_documents(documents, request.batch_size, request.show_progress_bar)
        # the scorer takes pairs sorted by query
        order = torch.argsort(pairs.query, stable=True)
        by_query = Pairs(pairs.query[order], pairs.candidate[order])
        scored = self._pair_scorer.score(query_state, candidates, by_query, head=request.head, score=request.score)
        out = torch.empty_like(scored)
        out[order] = scored
        return out

    def _encode_queries(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> QueryState:
        passes = self._encode(rows, self.model.encode_query, batch_size, show_progress_bar, "Queries", alone=True)
        # for each query the state of its pass, and its row there
        found: dict[int, tuple[QueryState, int]] = {}
        for numbers, state in passes:
            found.update({number: (state, row) for row, number in enumerate(numbers)})
        in_order = [found[number] for number in range(len(rows))]
        longest = max((len(row) for row in rows), default=1)

        def padded(field: str, layer: int) -> Tensor:
            sample = getattr(in_order[0][0], field)[layer]
            out = sample.new_zeros(len(in_order), longest, *sample.shape[2:])
            for number, (state, row) in enumerate(in_order):
                length = len(rows[number])
                out[number, :length] = getattr(state, field)[layer][row, :length]
            return out

        def stacked(field: str) -> Tensor:
            return torch.stack([getattr(state, field)[row] for state, row in in_order])

        layers = range(len(self.model.interaction))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        pooled = stacked("pooled") if self.config.dual_term else None
        first = None if self.config.state_row else stacked("first")
        return QueryState(
            tuple(padded("keys", layer) for layer in layers),
            tuple(padded("values", layer) for layer in layers),
            lengths,
            pooled,
            first,
        )

    def _encode_documents(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> Tensor:
        out = torch.empty(len(rows), *self.model.context_shape, dtype=self.dtype, device=self.device)
        passes = self._encode(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")
        for numbers, encoded in passes:
            out[numbers] = encoded
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
