"""The front door: `MixEncoder`, from texts to scores and rankings.

Adds to `mixencoder.modeling` what text needs: a tokenizer, batching, devices, and the promise that a candidate's score
does not depend on what else is scored beside it (docs/determinism.md). Two rules keep it. Texts are encoded in groups
of exactly equal token length, so nothing is ever padded, and never in fewer than `MIN_TOKEN_ROWS` token rows. Pairs
are scored in chunks of one shape (`mixencoder.scoring`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixencoder.backbones import cast_parameters
from mixencoder.checkpoint import default_checkpoint, load_backbone, load_model, load_tokenizer
from mixencoder.configuration import MixEncoderConfig
from mixencoder.engine import EncodingEngine, Request, resolve_device, resolve_dtype
from mixencoder.errors import InputError
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.scoring import Pairs, score_pairs
from mixkernels import select_backend

SCORES = ("full", "interaction", "dual")
"""Which part of the ranking score: the sum, ``h . e`` alone, or the dual term alone."""


class MixEncoder(EncodingEngine):
    """Score and rank candidates for a query.

    Make one with `from_pretrained` (the bundled default, a directory, or a hub id) or `from_backbone` (an encoder to
    train from). Safe to use from several threads.

    Attributes:
        model: the `MixEncoderModel`.
        tokenizer: its tokenizer.
        read_query, read_document: from texts to token ids, as this engine cuts them.

    Example:
        >>> model = MixEncoder.from_pretrained()
        >>> model.rank("how do I undo a commit?", ["git reset --soft HEAD~1", "boil for ten minutes"], top_k=1)
        [{'corpus_id': 0, 'score': ...}]
    """

    score_terms = SCORES
    encoded_types = (Tensor,)

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
            device: None takes a GPU if there is one, else the CPU.
            dtype: a torch dtype or its name, of `DTYPES`. None: float32.
            backend: which mixkernels backend runs the attention: "auto", "triton", "torch" or "reference".

        Raises:
            CheckpointError: nothing is there, it is damaged, or it holds another kind of model.
            InputError: the device or the dtype does not exist.
            mixkernels.BackendError: the backend cannot run here; the message says why.
        """
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        path = default_checkpoint() if name_or_path is None else name_or_path
        model = load_model(path, dtype).to(device)
        return cls(model, load_tokenizer(path), backend=backend)

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
            name_or_path: a directory or hub id of an encoder; `mixencoder.backbones.SUPPORTED` lists the kinds.
            num_context_embeddings: k, 1 to 16.
            interaction_layers: the backbone layers that interaction layers read and start from.
            num_labels: classes of a classification head, which becomes the only head. None: a ranking head. For both
                pass ``heads=("ranking", "classification")`` beside it.
            device, dtype, backend: as in `from_pretrained`.
            config: further fields of `MixEncoderConfig`.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        backbone = load_backbone(name_or_path)
        if num_labels is not None:
            config.setdefault("heads", ("classification",))
            config["num_labels"] = num_labels
        try:
            configuration = MixEncoderConfig(
                backbone_config=backbone.config,
                num_context_embeddings=num_context_embeddings,
                interaction_layers=interaction_layers,
                **config,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        model = MixEncoderModel(configuration)
        model.backbone.load_state_dict(backbone.state_dict())
        model.start_interaction_from_backbone()
        cast_parameters(model, dtype)
        return cls(model.to(device), load_tokenizer(name_or_path), backend=backend)

    @property
    def backend(self) -> str:
        """The mixkernels backend asked for."""
        return self.model.kernel_backend

    @torch.inference_mode()
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
        return score_pairs(self.model, query_state, candidates, pairs, head="ranking", score=score).view(batch, count)

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        query_state = self._encode_queries(queries, request.batch_size, request.show_progress_bar)
        candidates = self._encode_documents(documents, request.batch_size, request.show_progress_bar)
        order = torch.argsort(pairs.query, stable=True)
        rows = Pairs(pairs.query[order], pairs.candidate[order])
        scored = score_pairs(self.model, query_state, candidates, rows, head=request.head, score=request.score)
        out = torch.empty_like(scored)
        out[order] = scored
        return out

    def _encode_queries(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> QueryState:
        parts = self._encode(rows, self.model.encode_query, batch_size, show_progress_bar, "Queries")
        states: dict[int, tuple[QueryState, int]] = {}
        for numbers, state in parts:
            states.update({number: (state, row) for row, number in enumerate(numbers)})
        order = [states[number] for number in range(len(rows))]
        width = max((len(row) for row in rows), default=1)

        def gather(field: str, layer: int) -> Tensor:
            sample = getattr(order[0][0], field)[layer]
            out = sample.new_zeros(len(order), width, *sample.shape[2:])
            for number, (state, row) in enumerate(order):
                tokens = getattr(state, field)[layer][row]
                out[number, : len(tokens)] = tokens
            return out

        layers = range(len(self.model.interaction))
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        pooled = torch.stack([state.pooled[row] for state, row in order]) if self.config.dual_term else None
        first = None if self.config.state_row else torch.stack([state.first[row] for state, row in order])
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
        out = torch.empty(len(rows), *self.model.codes.shape, dtype=self.dtype, device=self.device)
        parts = self._encode(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")
        for numbers, part in parts:
            out[numbers] = part
        return out

    def _check_candidates(self, candidates: Tensor) -> Tensor:
        expected = tuple(self.model.codes.shape)
        if not isinstance(candidates, Tensor) or candidates.dim() != 3 or candidates.shape[1:] != expected:
            found = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
            raise InputError(f"candidates are {found}; expected context embeddings (N, {expected[0]}, {expected[1]})")
        return candidates.to(self.device, self.dtype)

    def _check_score(self, score: str) -> None:
        super()._check_score(score)
        if score == "dual" and not self.config.dual_term:
            raise InputError('score is "dual", but this model has no dual term (dual_term=False)')
