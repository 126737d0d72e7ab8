"""A model with its tokenizer, as every engine holds them: read, described, copied, moved, pickled and saved.

What engines compute is in `mixencoder.base.engine`.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from mixencoder.base.backbones import cast_parameters, max_positions
from mixencoder.base.checkpoints.checkpoint import load_backbone, load_model, load_tokenizer, save
from mixencoder.base.checkpoints.locations import held, root_of
from mixencoder.base.checkpoints.sentence_transformers import follow_pooling
from mixencoder.base.configuration import EncoderConfig, check_names
from mixencoder.base.empty_texts import check_on_empty
from mixencoder.base.inputs import placement, resolve_device, resolve_dtype
from mixencoder.base.modeling import HeadedModel, model_with_head
from mixencoder.base.notices import Notices
from mixencoder.base.tokenization import TextEncoder
from mixencoder.errors import InputError


class ModelHolder:
    """A model, its tokenizer, and how texts are read for it.

    Pickling and `copy.deepcopy` give an engine with weights of its own; `copy.copy` one over the same weights.

    Attributes:
        model: the torch module.
        tokenizer: its tokenizer.
        read_query: from texts to token ids, as this engine cuts them.
        read_document: the same of documents.
    """

    model_class: ClassVar[type[HeadedModel]]
    """The torch module of this architecture."""
    _derived: ClassVar[tuple[str, ...]] = ()
    """Attributes that `_derive` makes of the others: caches and locks, which no copy takes along."""

    def __init__(self, model: HeadedModel, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._notices = Notices()
        config = model.config
        longest = self._longest("query"), self._longest("document")
        self.read_query = TextEncoder(
            tokenizer,
            min(config.max_query_length or longest[0], longest[0]),
            config.query_truncation_side,
            "query",
            notices=self._notices,
        )
        self.read_document = TextEncoder(
            tokenizer, min(config.max_document_length or longest[1], longest[1]), notices=self._notices
        )
        self._derive()

    @classmethod
    def _load(
        cls, name_or_path: str | Path, device: str | torch.device | None, dtype: str | torch.dtype | None
    ) -> tuple[Any, Any]:
        """Load model and tokenizer of a checkpoint, as `from_pretrained` promises."""
        target, precision = resolve_device(device), resolve_dtype(dtype)
        with held(name_or_path):
            model = load_model(name_or_path, precision, cls.model_class, front_door=cls.__name__)
            tokenizer = load_tokenizer(name_or_path, model.config)
        return model.to(target), tokenizer

    @classmethod
    def _start(
        cls,
        name_or_path: str | Path,
        num_labels: int | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        fields: Mapping[str, Any],
        *,
        poolings: Mapping[str, Mapping[str, Any]] | None = None,
        scales: bool = False,
    ) -> tuple[Any, Any]:
        """Make an untrained model over an encoder, and load the encoder's tokenizer, as `from_backbone` promises.

        Args:
            name_or_path, num_labels, device, dtype: as there.
            fields: of the configuration.
            poolings, scales: what `follow_pooling` may choose from; None leaves the pooling alone.
        """
        target, precision = resolve_device(device), resolve_dtype(dtype)
        backbone = load_backbone(name_or_path)
        tokenizer = load_tokenizer(name_or_path, backbone.config)
        if num_labels is not None:
            fields = {"heads": ("classification",), **fields, "num_labels": num_labels}
        if poolings is not None:
            fields = follow_pooling(root_of(name_or_path), fields, poolings, scales=scales)
        config_class = cls.model_class.config_class
        try:
            check_names(config_class, fields)
            config = config_class(backbone_config=backbone.config, **cls._tokenizer_fields(tokenizer), **fields)
        except ValueError as error:
            raise InputError(str(error)) from error
        model = cls.model_class(config)
        model.backbone.load_state_dict(backbone.state_dict())
        model.start_from_backbone()
        cast_parameters(model, precision)
        return model.to(target), tokenizer

    @classmethod
    def _tokenizer_fields(cls, tokenizer: Any) -> dict[str, Any]:
        """Fields of the configuration that are read off the tokenizer."""
        return {}

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
        where = f"device={self.device}, dtype={str(self.dtype).removeprefix('torch.')}"
        return f"{type(self).__name__}({self._shape()}, {size} parameters, heads={self.config.heads}, {where})"

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._derive()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write configuration, weights (safetensors) and tokenizer into a directory, which `from_pretrained` reads.

        A crash leaves the checkpoint that was there or the new one, never a mix; other files there stay.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        save(self.model, self.tokenizer, Path(directory))

    def with_limits(
        self,
        *,
        max_query_length: int | None = None,
        max_document_length: int | None = None,
        on_empty: str | None = None,
    ) -> Self:
        """Return an engine over the same weights that reads texts otherwise; the configuration is left alone.

        Args:
            max_query_length, max_document_length: tokens, special tokens included; None keeps the limit.
            on_empty: what becomes of texts without a token, such as blank ones: "special" reads them as the tokenizer's
                special tokens alone and warns (`EmptyTextWarning`), "error" refuses them; None keeps what this engine
                does, which is "special" at first.

        Raises:
            InputError: a limit is more than the backbone has positions for, or leaves no room for text; or there is no
                such on_empty.
        """
        if on_empty is not None:
            check_on_empty(on_empty)
        other = copy.copy(self)
        other._notices = Notices()
        for role, length in (("query", max_query_length), ("document", max_document_length)):
            if length is not None and not 3 <= length <= self._longest(role):
                raise InputError(f"max_{role}_length is {length}; expected 3 to {self._longest(role)} tokens")
            name = f"read_{role}"
            reader = getattr(self, name)
            changed = dataclasses.replace(
                reader,
                max_length=reader.max_length if length is None else length,
                on_empty=on_empty or reader.on_empty,
                notices=other._notices,
            )
            setattr(other, name, changed)
        return other

    def with_head(self, head: str, class_names: Sequence[str] = ()) -> Self:
        """Return an engine whose model has one more, untrained head; all other weights are copies, bit for bit.

        The new head comes last: the default head, ranking scores and this engine stay as they are.

        Args:
            head: "ranking" or "classification".
            class_names: for classification, the classes' names in order of their numbers.

        Raises:
            InputError: the model has that head, there is no such head, or class_names does not fit it.
        """
        other = self._over(model_with_head(self.model, head, class_names))
        for name in ("read_query", "read_document"):
            setattr(other, name, dataclasses.replace(getattr(self, name), notices=other._notices))
        return other

    def to(
        self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move the model to a device, cast it, or both, and return this engine; nothing may be ranked meanwhile.

        What was encoded before stays where it is and is moved when it is ranked. An index belongs to one dtype.

        Args:
            where: a device, a dtype or both, in any order.
            device, dtype: the same by keyword; "cpu", "cuda:0"; "bfloat16", "bf16" and the like.

        Raises:
            InputError: there is no such device or dtype, or one is named twice.
        """
        target, precision = placement(*where, device=device, dtype=dtype)
        if precision is not None:
            cast_parameters(self.model, precision)
        if target is not None:
            self.model.to(target)
        self._derive()
        return self

    @property
    def config(self) -> EncoderConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and encoded texts; scores are float32 whatever it is."""
        return self.model.dtype

    @property
    def notices(self) -> dict[str, int]:
        """How many texts were cut or held no token so far, by kind, such as "truncated documents".

        Each kind is warned of at its first occasion, and again whenever its count has gained a digit.
        """
        return self._notices.counts

    def _shape(self) -> str:
        """Sizes for `repr`, beside the number of parameters."""
        return f"d={self.config.hidden_size}"

    def _derive(self) -> None:
        """Make what is made of model and tokenizer, anew."""

    def _over(self, model: HeadedModel) -> Self:
        """Return an engine of the same kind over another model."""
        return type(self)(model, self.tokenizer)

    def _longest(self, role: str) -> int:
        """Tokens that the model can read of a text of this role, "query" or "document"."""
        return max_positions(self.config.backbone_config)
