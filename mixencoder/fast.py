"""The front door: `MixEncoder`, from texts to scores and rankings.

Adds to `mixencoder.modeling` what text needs: a tokenizer, batching, devices, and the promise that a candidate's score
does not depend on what else is scored beside it (docs/determinism.md). Two rules keep it. Texts are encoded in groups
of exactly equal token length, so nothing is ever padded, and never in fewer than `MIN_TOKEN_ROWS` token rows. Pairs
are scored in chunks of one shape (`mixencoder.scoring`).
"""

import copy
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mixencoder.backbones import max_positions
from mixencoder.checkpoint import default_checkpoint, load_backbone, load_model, load_tokenizer, save
from mixencoder.configuration import MixEncoderConfig
from mixencoder.errors import InputError
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.scoring import Pairs, score_pairs
from mixencoder.tokenization import TextEncoder
from mixkernels import select_backend

logger = logging.getLogger(__name__)

MIN_TOKEN_ROWS = 32
"""Fewest token rows of an encoder pass; with fewer, CPU libraries use products that round differently."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCORES = ("full", "interaction", "dual")
"""Which part of the ranking score: the sum, ``h . e`` alone, or the dual term alone."""


class MixEncoder:
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

    def __init__(self, model: MixEncoderModel, tokenizer: Any, *, backend: str = "auto") -> None:
        select_backend(None if backend == "auto" else backend)
        model.kernel_backend = backend
        self.model = model.eval()
        self.tokenizer = tokenizer
        config, positions = model.config, max_positions(model.config.backbone_config)
        self.read_query = TextEncoder(
            tokenizer, min(config.max_query_length or positions, positions), config.query_truncation_side, "query"
        )
        self.read_document = TextEncoder(tokenizer, min(config.max_document_length or positions, positions))

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
        device, dtype = _device(device), _dtype(dtype)
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
            name_or_path: a directory or hub id of a BERT, RoBERTa or XLM-R encoder.
            num_context_embeddings: k, 1 to 16.
            interaction_layers: the backbone layers that interaction layers read and start from.
            num_labels: classes of a classification head, which becomes the only head. None: a ranking head. For both
                pass ``heads=("ranking", "classification")`` beside it.
            device, dtype, backend: as in `from_pretrained`.
            config: further fields of `MixEncoderConfig`.

        Raises:
            CheckpointError, UnsupportedBackboneError, InputError: the encoder or a value cannot be used.
        """
        device, dtype = _device(device), _dtype(dtype)
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
        return cls(model.to(device, dtype), load_tokenizer(name_or_path), backend=backend)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write configuration, weights (safetensors) and tokenizer into a directory, which `from_pretrained` reads.

        A crash leaves every file either as it was or as it becomes, never half-written.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        save(self.model, self.tokenizer, Path(directory))

    def with_limits(
        self, *, max_query_length: int | None = None, max_document_length: int | None = None
    ) -> "MixEncoder":
        """Return an engine over the same weights that reads fewer tokens; the configuration is left alone.

        Args:
            max_query_length, max_document_length: tokens, special tokens included; None keeps the limit.

        Raises:
            InputError: a limit is more than the backbone has positions for, or leaves no room for text.
        """
        other, positions = copy.copy(self), max_positions(self.config.backbone_config)
        for role, length in (("query", max_query_length), ("document", max_document_length)):
            if length is None:
                continue
            if not 3 <= length <= positions:
                raise InputError(f"max_{role}_length is {length}; expected 3 to {positions} tokens")
            name = f"read_{role}"
            setattr(other, name, dataclasses.replace(getattr(self, name), max_length=length))
        return other

    @property
    def config(self) -> MixEncoderConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and context embeddings; scores are float32 whatever it is."""
        return self.model.codes.dtype

    @property
    def backend(self) -> str:
        """The mixkernels backend asked for."""
        return self.model.kernel_backend

    def encode_query(
        self, texts: str | Sequence[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> QueryState:
        """Encode queries once, for any number of candidates.

        Raises:
            InputError: a text is not a string or holds no token.
        """
        texts = _as_list(texts, "query")
        if not texts:
            raise InputError("query is empty; expected at least one text")
        return self._encode_queries(self.read_query(texts), batch_size, show_progress_bar)

    def encode_document(
        self, texts: str | Sequence[str], *, batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> Tensor:
        """Encode candidates ahead of time: context embeddings (N, k, d) on the model's device, in its dtype.

        Equal texts are encoded once.

        Raises:
            InputError: a text is not a string or holds no token.
        """
        rows, place = _unique(self.read_document(_as_list(texts, "document")))
        return self._encode_documents(rows, batch_size, show_progress_bar)[place.to(self.device)]

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

    @torch.inference_mode()
    def predict(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        head: str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        score: str = "full",
    ) -> np.ndarray | list[Tensor] | Tensor:
        """Score (query, document) pairs; equal texts are encoded once.

        Args:
            pairs: (query, document) texts; one pair alone gives one result.
            batch_size: texts encoded at once.
            show_progress_bar: None shows one if this module's logger is at INFO or below.
            head: "ranking" or "classification"; None takes the configuration's default.
            activation_fn: applied to the logits, for example ``torch.sigmoid``; None leaves them as they are.
            convert_to_numpy: return a numpy array, else a list of tensors.
            convert_to_tensor: return one tensor; wins over convert_to_numpy.
            score: which part of a ranking score, of `SCORES`.

        Returns:
            float32 scores (n,) for ranking, logits (n, num_labels) for classification.

        Raises:
            InputError: a pair is not two strings, a text holds no token, or the model has no such head or score.
        """
        head = self.model.check_head(head)
        self._check_score(score)
        if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
            single, pairs = True, [pairs]
        else:
            single, pairs = False, list(pairs)
        for index, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"pair {index} is {pair!r}; expected (query, document)")
        if not pairs:
            out = torch.empty((0,) if head == "ranking" else (0, self.config.num_labels))
        else:
            queries, query_of = _unique(self.read_query([pair[0] for pair in pairs]))
            documents, document_of = _unique(self.read_document([pair[1] for pair in pairs]))
            query_state = self._encode_queries(queries, batch_size, show_progress_bar)
            candidates = self._encode_documents(documents, batch_size, show_progress_bar)
            order = torch.argsort(query_of, stable=True)
            rows = Pairs(query_of[order], document_of[order])
            scored = score_pairs(self.model, query_state, candidates, rows, head=head, score=score)
            out = torch.empty_like(scored)
            out[order] = scored
        if activation_fn is not None:
            out = activation_fn(out)
        if single:
            out = out[0]
        if convert_to_tensor:
            return out
        return out.cpu().numpy() if convert_to_numpy else (out if single else list(out))

    def rank(
        self,
        query: str | Sequence[str],
        documents: Sequence[str] | Tensor,
        top_k: int | None = None,
        *,
        ids: Sequence[str] | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        score: str = "full",
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Rank documents for a query, best first, ties to the lower corpus_id.

        Args:
            query: one text, or several, which give a list of rankings.
            documents: texts, or the context embeddings (N, k, d) that `encode_document` made of them.
            top_k: how many to return; None returns all.
            ids: a name of each document, returned as "id".
            return_documents: also return each document's text.
            batch_size, show_progress_bar, activation_fn, score: as in `predict`.

        Returns:
            [{"corpus_id": int, "score": float, "text": str?, "id": str?}, ...] for every query.

        Raises:
            InputError: no query or no document, a text that is not a string or holds no token, or a bad option.
        """
        encoded = isinstance(documents, Tensor)
        if not encoded:
            documents = _as_list(documents, "document")
        if len(documents) == 0:
            raise InputError("documents is empty; expected at least one candidate to rank")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise InputError(f"top_k is {top_k!r}; expected a positive integer or None")
        if ids is not None and len(ids) != len(documents):
            raise InputError(f"ids names {len(ids)} documents but there are {len(documents)}")
        if return_documents and encoded:
            raise InputError("return_documents needs texts, but documents are context embeddings")
        single = isinstance(query, str)
        options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        query_state = self.encode_query(query, **options)
        candidates = documents if encoded else self.encode_document(documents, **options)
        scores = self.interact(query_state, candidates, score=score)
        if activation_fn is not None:
            scores = activation_fn(scores)

        def entry(corpus_id: int, value: float) -> dict[str, Any]:
            result: dict[str, Any] = {"corpus_id": corpus_id, "score": value}
            if return_documents:
                result["text"] = documents[corpus_id]
            if ids is not None:
                result["id"] = ids[corpus_id]
            return result

        rankings = []
        for row in scores.cpu().numpy():
            order = np.argsort(-row, kind="stable")[:top_k]
            rankings.append([entry(int(place), float(row[place])) for place in order])
        return rankings[0] if single else rankings

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
        return QueryState(
            tuple(gather("keys", layer) for layer in layers),
            tuple(gather("values", layer) for layer in layers),
            lengths,
            pooled,
        )

    def _encode_documents(
        self, rows: Sequence[Sequence[int]], batch_size: int, show_progress_bar: bool | None
    ) -> Tensor:
        out = torch.empty(len(rows), *self.model.codes.shape, dtype=self.dtype, device=self.device)
        parts = self._encode(rows, self.model.encode_document, batch_size, show_progress_bar, "Documents")
        for numbers, part in parts:
            out[numbers] = part
        return out

    def _encode(
        self,
        rows: Sequence[Sequence[int]],
        encode: Callable[[Tensor], Any],
        batch_size: int,
        show_progress_bar: bool | None,
        name: str,
    ) -> Iterator[tuple[list[int], Any]]:
        """Encode texts in groups of equal length; yields the numbers of a group's texts and what was made of them."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a positive integer")
        groups = defaultdict(list)
        for number, row in enumerate(rows):
            groups[len(row)].append(number)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() <= logging.INFO
        with tqdm(total=len(rows), desc=name, unit="text", disable=not show_progress_bar) as bar:
            # longest first: what does not fit into memory fails at once
            for length in sorted(groups, reverse=True):
                for start in range(0, len(groups[length]), batch_size):
                    numbers = groups[length][start : start + batch_size]
                    batch = [rows[number] for number in numbers]
                    missing = -(-MIN_TOKEN_ROWS // length) - len(batch)
                    batch += [batch[0]] * missing
                    with torch.inference_mode():
                        encoded = encode(torch.tensor(batch, device=self.device))
                    yield numbers, encoded[: len(numbers)] if isinstance(encoded, Tensor) else encoded
                    bar.update(len(numbers))

    def _check_candidates(self, candidates: Tensor) -> Tensor:
        expected = tuple(self.model.codes.shape)
        if not isinstance(candidates, Tensor) or candidates.dim() != 3 or candidates.shape[1:] != expected:
            found = tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
            raise InputError(f"candidates are {found}; expected context embeddings (N, {expected[0]}, {expected[1]})")
        return candidates.to(self.device, self.dtype)

    def _check_score(self, score: str) -> None:
        if score not in SCORES:
            raise InputError(f"score is {score!r}; expected one of {', '.join(SCORES)}")
        if score == "dual" and not self.config.dual_term:
            raise InputError('score is "dual", but this model has no dual term (dual_term=False)')


def _as_list(texts: str | Sequence[str], role: str) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise InputError(f"{role} is a {type(texts).__name__}; expected a string or a list of strings")
    return list(texts)


def _unique(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], Tensor]:
    """Distinct token rows in order of appearance, and for every row its number among them."""
    numbers: dict[tuple[int, ...], int] = {}
    place = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return list(numbers), torch.tensor(place, dtype=torch.int64)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used here: {reason}; expected for example cpu") from error
    return device


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r} cannot be used; expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)
