"""What the torch modules of all six architectures have in common: backbone, heads, pooling, the trainer's forward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from mixencoder.base.backbones import build_backbone, cast_parameters
from mixencoder.base.configuration import HEADS, EncoderConfig
from mixencoder.base.gradient_cache import in_chunks
from mixencoder.errors import InputError


class RankingScores(NamedTuple):
    """The two terms of the ranking score, float32; the score is their sum."""

    interaction: Tensor
    dual: Tensor | None

    @property
    def full(self) -> Tensor:
        """Return the ranking score."""
        return self.interaction if self.dual is None else self.interaction + self.dual


def full_scores(out: RankingScores | Tensor) -> Tensor:
    """Return what a model's ``interact`` or ``forward`` gave as one tensor: ranking scores, or logits as they are."""
    return out.full if isinstance(out, RankingScores) else out


class Batch(NamedTuple):
    """Texts as the backbone reads them, both tensors (B, n)."""

    ids: Tensor
    mask: Tensor


class PairClassifier(nn.Module):
    """``MLP([u ; v ; |u-v|])`` of one pair of vectors, or of several side by side: to 3d, then to the labels.

    Args:
        width: d, numbers of a vector.
        config: says how many labels there are, and the dropout.
        pairs: pairs of vectors.
    """

    def __init__(self, width: int, config: EncoderConfig, *, pairs: int = 1) -> None:
        super().__init__()
        self.dense = nn.Linear(3 * width * pairs, 3 * width)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(3 * width, config.num_classes)

    def forward(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (..., num_labels), at least float32, from vectors (..., d) that broadcast against each other."""
        vectors = torch.broadcast_tensors(*(vector for pair in pairs for vector in pair))
        features = [torch.cat([u, v, (u - v).abs()], dim=-1) for u, v in zip(vectors[::2], vectors[1::2], strict=True)]
        hidden = F.relu(self.dense(torch.cat(features, dim=-1)))
        return at_least_float32(self.out_proj(self.dropout(hidden)))


class HeadedModel(PreTrainedModel):
    """What the torch modules of all architectures have in common: a backbone, and heads by name.

    ``forward`` is what a trainer calls, with the same arguments and results for all. For ranking and classifying texts
    use `mixencoder.fast.MixEncoder` and `mixencoder.peers`.
    """

    config_class: type[EncoderConfig] = EncoderConfig
    config: EncoderConfig
    backbone: Any
    """The encoder; its kind decides what it is made of (`mixencoder.base.backbones.Layout`)."""
    base_model_prefix = "mixencoder"
    _supports_sdpa = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what is not loaded: normal weights as in BERT."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.backbone_config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def start_from_backbone(self) -> None:
        """Start weights of an untrained model from the backbone's, where there is anything to start."""

    if TYPE_CHECKING:
        # transformers wraps it so that a type checker no longer sees whose method it is
        # pyrefly: ignore [bad-override]: what is overridden is that wrapper
        def to(self, *args: Any, **kwargs: Any) -> Self:
            """Move or cast, as `torch.nn.Module.to`."""

    def check_head(self, head: str | None) -> str:
        """Return the head to use, the configuration's first for None.

        Raises:
            InputError: the model has no such head.
        """
        if head is None:
            return self.config.heads[0]
        if head not in self.config.heads:
            raise InputError(f"the model has no head {head!r}; its heads are {', '.join(self.config.heads)}")
        return head

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        document_input_ids: Tensor,
        document_attention_mask: Tensor,
        candidates_per_query: int | None = None,
        head: str | None = None,
        mini_batch_size: int | None = None,
    ) -> RankingScores | Tensor:
        """Score queries (B, m) against documents (N, n), token ids of single texts padded on the right.

        Without candidates_per_query every query meets every document, (B, N). With it the documents are those of the
        queries in turn, N = B * candidates_per_query, and the result is (B, candidates_per_query). Ranking scores come
        as `RankingScores` (``full``), class logits with a last dimension num_labels. With mini_batch_size so many
        texts (for a cross-encoder: pairs) are encoded at once, and their activations again on the way back
        (`mixencoder.base.gradient_cache`).

        Raises:
            InputError: the model has no such head.
        """
        query = Batch(query_input_ids, query_attention_mask)
        document = Batch(document_input_ids, document_attention_mask)
        return self._score_batch(query, document, candidates_per_query, self.check_head(head), mini_batch_size)

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        """Do what `forward` promises."""
        raise NotImplementedError


class TwoTowerModel(HeadedModel):
    """A model that encodes queries and documents apart: it has `encode_query`, `encode_document` and `interact`."""

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode queries (B, m), padded on the right; attention_mask is None when there is no padding."""
        raise NotImplementedError

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode documents (N, n), padded on the right; attention_mask is None when there is no padding."""
        raise NotImplementedError

    def interact(self, query_state: Any, candidates: Any, head: str | None = None) -> RankingScores | Tensor:
        """Score encoded candidates, N that all B queries meet or (B, N) of each query's own.

        Returns the ranking scores, ``full`` of which is (B, N), or class logits (B, N, num_labels); at least float32.

        Raises:
            InputError: the model has no such head.
        """
        raise NotImplementedError

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        query_state = in_chunks(self.encode_query, query, mini_batch_size)
        candidates = in_chunks(self.encode_document, document, mini_batch_size)
        if candidates_per_query is not None:
            candidates = candidates.unflatten(0, (-1, candidates_per_query))
        return self.interact(query_state, candidates, head)

    def _tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Final token vectors (B, n, d)."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


_Model = TypeVar("_Model", bound=HeadedModel)


def model_with_head(model: _Model, head: str, class_names: Sequence[str] = ()) -> _Model:
    """Return a copy of a model with one more, untrained head, which comes last; other weights keep their bits.

    Args:
        model: of any of the architectures.
        head: "ranking" or "classification".
        class_names: for classification, the classes' names in order of their numbers.

    Raises:
        InputError: the model has that head, there is no such head, or the classes are not those of a head.
    """
    has = model.config.heads
    if head not in HEADS or head in has:
        raise InputError(
            f"head is {head!r}; expected one of {', '.join(HEADS)} that the model lacks, it has {', '.join(has)}"
        )
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if head == "ranking" and names:
        raise InputError(f"class_names is {names}; a ranking head has no classes")
    if head == "classification" and (not names or len(set(names)) < len(names)):
        raise InputError(f"class_names is {names}; expected names of classes, each once")
    fields = model.config.to_dict()
    fields["heads"] = [*has, head]
    if names:
        fields["id2label"] = dict(enumerate(names))
        fields["label2id"] = {name: number for number, name in enumerate(names)}
    extended = type(model)(type(model.config).from_dict(fields))
    # strict: all that the model had must have its place
    extended.load_state_dict({**extended.state_dict(), **model.state_dict()})
    cast_parameters(extended, model.dtype)
    return extended.to(model.device)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision, in which scores are never computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(tokens: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector (B, d) of token vectors (B, n, d): the mean over tokens, or the first."""
    if how == "first":
        return tokens[:, 0]
    if attention_mask is None:
        return tokens.mean(dim=1)
    weights = attention_mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
