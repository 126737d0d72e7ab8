"""Base classes of the torch modules of all six architectures: backbone, heads, pooling, and `forward` for training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from mixencoder.base.backbones import KeyValueTap, build_backbone, cast_parameters
from mixencoder.base.configuration import HEADS, EncoderConfig
from mixencoder.base.gradient_cache import in_chunks
from mixencoder.base.inference_context import shared_by_passes
from mixencoder.base.prepared_encoder import PreparedEncoder, is_untouched, prepare
from mixencoder.base.weights_version import KeptForWeights, version_in_call
from mixencoder.errors import InputError


class RankingScores(NamedTuple):
    """The two terms of ranking scores, float32; the score is their sum."""

    interaction: Tensor
    dual: Tensor | None

    @property
    def full(self) -> Tensor:
        """The ranking scores."""
        return self.interaction if self.dual is None else self.interaction + self.dual


def full_scores(out: RankingScores | Tensor) -> Tensor:
    """Return the result of a model's ``interact`` or ``forward`` as one tensor: full ranking scores, or logits."""
    return out.full if isinstance(out, RankingScores) else out


class Batch(NamedTuple):
    """Token ids of texts and their attention mask, both (B, n)."""

    ids: Tensor
    mask: Tensor


class PairClassifier(nn.Module):
    """Classify a pair of vectors u, v, or several pairs together: ``MLP([u ; v ; |u-v|])`` with 3d hidden units.

    Args:
        width: d, size of a vector.
        config: gives the number of labels and the dropout.
        pairs: number of pairs whose features are concatenated.
    """

    def __init__(self, width: int, config: EncoderConfig, *, pairs: int = 1) -> None:
        super().__init__()
        self.dense = nn.Linear(3 * width * pairs, 3 * width)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(3 * width, config.num_classes)

    def forward(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return logits (..., num_labels), at least float32, from vectors (..., d), broadcast against each other."""
        vectors = torch.broadcast_tensors(*(vector for pair in pairs for vector in pair))
        features = [torch.cat([u, v, (u - v).abs()], dim=-1) for u, v in zip(vectors[::2], vectors[1::2], strict=True)]
        hidden = F.relu(self.dense(torch.cat(features, dim=-1)))
        return at_least_float32(self.out_proj(self.dropout(hidden)))


class HeadedModel(PreTrainedModel):
    """Base of the torch modules of all architectures: a backbone, and heads by name.

    Trainers call ``forward``, which has the same arguments and results in all of them. To rank and classify texts use
    `mixencoder.fast.MixEncoder` and `mixencoder.peers`.
    """

    config_class: type[EncoderConfig] = EncoderConfig
    config: EncoderConfig
    backbone: Any
    """The encoder; `mixencoder.base.backbones.Layout` describes the modules of each kind."""
    base_model_prefix = "mixencoder"
    _supports_sdpa = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self._prepared: KeptForWeights[PreparedEncoder | None] = KeptForWeights()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that are not loaded, from a normal distribution as BERT does."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.backbone_config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def run_backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, tap: KeyValueTap | None = None, **inputs: Tensor
    ) -> Tensor:
        """Return the backbone's final token vectors (B, n, d).

        In calls of an engine on a CPU this may be `PreparedEncoder`, whose results differ by rounding.

        Args:
            input_ids: (B, n), padded on the right.
            attention_mask: (B, n), 1 for tokens; None if there is no padding.
            tap: takes keys and values of layers.
            inputs: further inputs of the backbone (token_type_ids).

        Raises:
            LastTapReached: tap has all that it wants.
        """
        prepared = self.prepared_encoder()
        if prepared is not None:
            return prepared(input_ids, attention_mask, tap, **inputs)
        options = inputs if tap is None else {**inputs, "key_value_tap": tap}
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state

    def prepared_encoder(self) -> PreparedEncoder | None:
        """Return the backbone prepared for inference; None outside an engine's calls, and if it cannot be prepared."""
        if not torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return None
        return shared_by_passes(self, self._prepare)

    def _prepare(self) -> PreparedEncoder | None:
        if self.backbone.device.type != "cpu" or not is_untouched(self.backbone):
            return None
        return self._prepared.get(version_in_call(self), lambda: prepare(self.backbone))

    def start_from_backbone(self) -> None:
        """Copy weights of the backbone into an untrained model's other layers; here there are none."""

    if TYPE_CHECKING:
        # transformers wraps this method such that a type checker no longer sees its type
        # pyrefly: ignore [bad-override]: overrides that wrapper
        def to(self, *args: Any, **kwargs: Any) -> Self:
            """Move or cast, as `torch.nn.Module.to`."""

    def check_head(self, head: str | None) -> str:
        """Return the head to use; None stands for the first one of the configuration.

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

        Without candidates_per_query every query is scored against every document: (B, N). With it, the documents are
        those of the first query, then of the second, and so on, N = B * candidates_per_query, and the result is (B,
        candidates_per_query). Ranking returns `RankingScores`, classification logits with num_labels as last dimension.
        mini_batch_size turns on gradient caching (`mixencoder.base.gradient_cache`): that many texts (for a
        cross-encoder: pairs) are encoded at once.

        Raises:
            InputError: the model has no such head.
        """
        query = Batch(query_input_ids, query_attention_mask)
        document = Batch(document_input_ids, document_attention_mask)
        return self._score_batch(query, document, candidates_per_query, self.check_head(head), mini_batch_size)

    def _score_batch(
        self, query: Batch, document: Batch, candidates_per_query: int | None, head: str, mini_batch_size: int | None
    ) -> RankingScores | Tensor:
        """As `forward`, with the head checked."""
        raise NotImplementedError


class TwoTowerModel(HeadedModel):
    """A model that encodes queries and documents separately, and scores the encodings (`interact`)."""

    def encode_query(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode queries (B, m), padded on the right; attention_mask is None if there is no padding."""
        raise NotImplementedError

    def encode_document(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Encode documents (N, n), padded on the right; attention_mask is None if there is no padding."""
        raise NotImplementedError

    def interact(self, query_state: Any, candidates: Any, head: str | None = None) -> RankingScores | Tensor:
        """Score encoded candidates for B queries: N candidates, one pool for all queries, or (B, N), N for each query.

        Returns ranking scores, each (B, N), or logits (B, N, num_labels); at least float32.

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


_Model = TypeVar("_Model", bound=HeadedModel)


def model_with_head(model: _Model, head: str, class_names: Sequence[str] = ()) -> _Model:
    """Return a copy of a model with one more, untrained head at the end; all other weights are copied exactly.

    Args:
        model: of any architecture.
        head: "ranking" or "classification".
        class_names: for classification, the names of the classes in order of their numbers.

    Raises:
        InputError: the model has that head already, there is no such head, or class_names does not fit the head.
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
    # strict, so that no weight of the model is left out
    extended.load_state_dict({**extended.state_dict(), **model.state_dict()})
    cast_parameters(extended, model.dtype)
    return extended.to(model.device)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; scores are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(tokens: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """Pool token vectors (B, n, d) into (B, d): their mean, or with how="first" the first."""
    if how == "first":
        return tokens[:, 0]
    if attention_mask is None:
        return tokens.mean(dim=1)
    weights = attention_mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
