"""Base classes of the peers' engines, on top of `mixencoder.base.engine`.

`Peer` loads and starts models. `EncodingPeer` encodes queries and documents separately: `VectorPeer` into vectors of
one size, `TokenPeer` into a vector for every token.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from mixencoder.base.checkpoints.locations import HubOptions
from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.engine import Engine, Request
from mixencoder.base.inference_context import inference
from mixencoder.base.modeling import TwoTowerModel, full_scores
from mixencoder.base.scores import Pairs, check_finite
from mixencoder.errors import InputError
from mixencoder.peers.packed import PackedTokens
from mixencoder.peers.token_states import TokenStates

S = TypeVar("S", Tensor, PackedTokens)
"""Encoded queries or documents."""


class Peer(Engine):
    """An engine with the constructors `from_pretrained` and `from_backbone`.

    Attributes:
        pools: whether a text becomes one vector, pooled by the configuration's ``pooling``.
    """

    pools: bool = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> Self:
        """Load a checkpoint.

        Args:
            name_or_path: a directory or a hub id; the package contains no checkpoint of this architecture.
            device: None takes a GPU if there is one, else the CPU.
            dtype: a torch dtype or its name, of `mixencoder.base.inputs.DTYPES`. None: float32.
            revision, token, cache_dir, local_files_only, subfolder: as in `MixEncoder.from_pretrained`.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or it holds another kind of model.
            InputError: name_or_path is None, or the device or the dtype does not exist.
        """
        if name_or_path is None:
            raise InputError(
                f"the package bundles no {cls.__name__}; expected a checkpoint's directory or hub id. To make a new "
                f"model, use {cls.__name__}.from_backbone and train it (mixencoder train)"
            )
        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        return cls(*cls._load(name_or_path, device, dtype, hub))

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | Path,
        num_labels: int | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        **config: Any,
    ) -> Self:
        """Make an untrained model on top of a pretrained encoder.

        Args:
            name_or_path: a directory or hub id of an encoder; `mixencoder.base.backbones.SUPPORTED` lists the kinds.
                If the model compares one vector a text and no pooling is given, the pooling that a folder of
                sentence-transformers names is used; if the model does not have it, there is a warning
                (`EncoderWarning`).
            num_labels: classes of a classification head, which is then the only head. None: a ranking head. For both,
                also pass ``heads=("ranking", "classification")``.
            device, dtype, revision, token, cache_dir, local_files_only, subfolder: as in `from_pretrained`.
            config: further fields of the configuration.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        poolings = {"mean": {}, "first": {"pooling": "first"}} if cls.pools else None
        # a cosine does not depend on the lengths of the vectors
        lengths_matter = config.get("similarity", "cosine") != "cosine"
        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        options = {"hub": hub, "poolings": poolings, "lengths_matter": lengths_matter}
        model, tokenizer = cls._make_untrained(name_or_path, num_labels, device, dtype, config, **options)
        return cls(model, tokenizer)


class EncodingPeer(Peer, EncodingEngine[S, S]):
    """A peer that encodes queries and documents separately.

    Attributes:
        query_block: queries that `interact` scores at once.
    """

    model: TwoTowerModel
    query_block: int = 1

    @inference
    def interact(self, query_state: S, candidates: S, *, score: str = "full") -> Tensor:
        """Return ranking scores (B, N) float32 of B encoded queries for N encoded candidates: the hot path.

        Args:
            query_state: from `encode_query`.
            candidates: from `encode_document`.
            score: "full", the only score of these models.

        Raises:
            InputError: the model has no ranking head, score is not "full", or candidates have another shape.
            NonFiniteError: a score is NaN or infinite.
        """
        self.model.check_head("ranking")
        candidates = self._check_candidates(candidates)
        self._check_score(score)
        out = torch.empty(len(query_state), len(candidates), dtype=torch.float32, device=self.device)
        numbers = torch.arange(len(query_state), device=self.device)
        for rows in numbers.split(self.query_block):
            out[rows] = self._score_pool(query_state[rows], candidates)
        return check_finite(out, self.dtype)

    def _score_pairs(
        self, queries: Sequence[Sequence[int]], documents: Sequence[Sequence[int]], pairs: Pairs, request: Request
    ) -> Tensor:
        query_state = self._encode_queries(queries, request.batch_size, request.show_progress_bar)
        candidates = self._encode_documents(documents, request.batch_size, request.show_progress_bar)
        pairs = Pairs(pairs.query.to(self.device), pairs.candidate.to(self.device))
        size = () if request.head == "ranking" else (self.config.num_classes,)
        out = torch.empty(len(pairs.query), *size, dtype=torch.float32, device=self.device)
        for rows in self._pair_blocks(query_state, candidates, pairs):
            query, candidate = self._take(query_state, pairs.query[rows]), self._take(candidates, pairs.candidate[rows])
            # one candidate for every query
            scores = self.model.interact(query, candidate.unflatten(0, (-1, 1)), request.head)
            out[rows] = full_scores(scores).squeeze(1).float()
        return check_finite(out, self.dtype)

    def _score_pool(self, query_state: S, candidates: S) -> Tensor:
        """Return ranking scores (B, N) of a block of queries for candidates that they share."""
        raise NotImplementedError

    def _pair_blocks(self, query_state: S, candidates: S, pairs: Pairs) -> Iterator[Tensor]:
        """Yield the row numbers of pairs that are scored at once."""
        raise NotImplementedError

    def _take(self, states: S, numbers: Tensor) -> Tensor | TokenStates:
        """Return the states of chosen texts, as the torch module takes them."""
        raise NotImplementedError

    def _check_candidates(self, candidates: Any) -> S:
        """Return candidates on the model's device, in its dtype."""
        raise NotImplementedError


class VectorPeer(EncodingPeer[Tensor]):
    """A peer whose encoded queries and documents have one size each.

    Attributes:
        candidate_block: candidates that `interact` scores at once. A block is padded to a multiple of 64, as products
            of few rows, or of an odd number of rows, may round equal rows differently.
    """

    encoded_types = (Tensor,)
    pools = True
    candidate_block: int = 4096

    def _encode_queries(self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None) -> Tensor:
        return self._stack(rows, self.model.encode_query, batch_size, show_progress_bar, "Queries")

    def _encode_documents(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> Tensor:
        return self._stack(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")

    def _stack(self, rows: Sequence[Sequence[int]], *options: Any) -> Tensor:
        order, parts = [], []
        for numbers, part in self._encode(rows, *options):
            order += numbers
            parts.append(part)
        if not parts:
            return torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        stacked = torch.cat(parts)
        out = torch.empty_like(stacked)
        out[torch.tensor(order, device=self.device)] = stacked
        return out

    def _score_pool(self, query_state: Tensor, candidates: Tensor) -> Tensor:
        parts = []
        for block in candidates.split(self.candidate_block):
            count = len(block)
            if count % 64:
                block = torch.cat([block, block[-1:].expand(-count % 64, -1)])
            parts.append(full_scores(self.model.interact(query_state, block, "ranking"))[:, :count])
        return torch.cat(parts, dim=1).float()

    def _pair_blocks(self, query_state: Tensor, candidates: Tensor, pairs: Pairs) -> Iterator[Tensor]:
        yield from torch.arange(len(pairs.query), device=self.device).split(256)

    def _take(self, states: Tensor, numbers: Tensor) -> Tensor:
        return states[numbers]

    def _check_candidates(self, candidates: Any) -> Tensor:
        width = self.config.hidden_size
        if not isinstance(candidates, Tensor) or candidates.dim() != 2 or candidates.shape[1] != width:
            found = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
            raise InputError(f"candidates are {found}; expected vectors (N, {width}), as encode_document makes them")
        return candidates.to(self.device, self.dtype)


class TokenPeer(EncodingPeer[PackedTokens]):
    """A peer whose encoded queries and documents hold a vector for every token.

    Attributes:
        tokens_at_once: tokens, padding included, of a block of candidates that is scored at once.
        joins_query: whether the query's tokens count too, once for every candidate.
    """

    encoded_types = (PackedTokens,)
    tokens_at_once: int
    joins_query: bool

    def _encode_queries(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> PackedTokens:
        return self._pack(rows, self.model.encode_query, batch_size, show_progress_bar, "Queries")

    def _encode_documents(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> PackedTokens:
        return self._pack(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")

    def _pack(self, rows: Sequence[Sequence[int]], *options: Any) -> PackedTokens:
        order, texts = [], []
        for numbers, states in self._encode(rows, *options):
            order += numbers
            texts += [states.vectors[row, : len(rows[number])] for row, number in enumerate(numbers)]
        if not texts:
            texts.append(torch.empty(0, self._width, dtype=self.dtype, device=self.device))
        packed = PackedTokens.from_texts(texts)
        return packed[torch.tensor(order, dtype=torch.int64, device=self.device).argsort()]

    @property
    def _width(self) -> int:
        """Size of a token's vector."""
        return self.config.hidden_size

    def _score_pool(self, query_state: PackedTokens, candidates: PackedTokens) -> Tensor:
        # equal texts, which share their vectors, are scored once, so that they tie exactly
        starts, number = candidates.starts.unique(return_inverse=True)
        representative = torch.empty_like(starts).scatter_(0, number, torch.arange(len(number), device=self.device))
        distinct = candidates[representative]
        queries = query_state.pad()
        out = torch.empty(len(query_state), len(distinct), dtype=torch.float32, device=self.device)
        for rows in self._blocks(distinct.lengths, int(query_state.lengths.max()) if self.joins_query else 0):
            out[:, rows] = full_scores(self.model.interact(queries, distinct[rows].pad(), "ranking")).float()
        return out[:, number]

    def _pair_blocks(self, query_state: PackedTokens, candidates: PackedTokens, pairs: Pairs) -> Iterator[Tensor]:
        lengths = query_state.lengths[pairs.query] + candidates.lengths[pairs.candidate]
        yield from self._blocks(lengths, 0)

    def _blocks(self, lengths: Tensor, extra: int) -> Iterator[Tensor]:
        """Split texts, longest first, into blocks of at most `tokens_at_once` tokens, with `extra` tokens a text."""
        order = lengths.argsort(descending=True, stable=True)
        start = 0
        while start < len(order):
            count = max(1, self.tokens_at_once // (int(lengths[order[start]]) + extra))
            yield order[start : start + count]
            start += count

    def _take(self, states: PackedTokens, numbers: Tensor) -> TokenStates:
        return states[numbers].pad()

    def _check_candidates(self, candidates: Any) -> PackedTokens:
        if not isinstance(candidates, PackedTokens) or candidates.vectors.shape[1] != self._width:
            is_packed = isinstance(candidates, PackedTokens)
            found = f"vectors of size {candidates.vectors.shape[1]}" if is_packed else type(candidates).__name__
            raise InputError(
                f"candidates are {found}; expected PackedTokens with vectors of size {self._width}, as "
                "encode_document makes them"
            )
        return candidates.to(self.device, self.dtype)
