"""`ModelHolder`: the base of all engines. Loads, copies, moves, pickles and saves a model with its tokenizer.

Scoring is in `mixencoder.base.engine`.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from mixencoder.base.backbones import cast_parameters, max_positions
from mixencoder.base.checkpoints.checkpoint import load_backbone, load_model, load_tokenizer, save
from mixencoder.base.checkpoints.locations import HubOptions, checkpoint_root, located, locked_for_reading
from mixencoder.base.checkpoints.sentence_transformers import follow_pooling
from mixencoder.base.checkpoints.upload import upload
from mixencoder.base.configuration import MIN_TOKENS, EncoderConfig, check_field_names
from mixencoder.base.empty_texts import check_on_empty
from mixencoder.base.inputs import local_path, placement, resolve_device, resolve_dtype
from mixencoder.base.modeling import HeadedModel, model_with_head
from mixencoder.base.notices import Notices
from mixencoder.base.tokenization import TextEncoder
from mixencoder.errors import InputError


class ModelHolder:
    """A model, its tokenizer, and the tokenization of queries and documents.

    Pickling and `copy.deepcopy` copy the weights; the engine that `copy.copy` returns shares them.

    Attributes:
        model: the torch module.
        tokenizer: its tokenizer.
        read_query: turns queries into token ids, cut to this engine's limits.
        read_document: the same for documents.
    """

    model_class: ClassVar[type[HeadedModel]]
    """The torch module of this architecture."""
    _derived: ClassVar[tuple[str, ...]] = ()
    """Attributes that `_derive` computes from the others: caches and locks, which are not pickled."""

    def __init__(self, model: HeadedModel, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._notices = Notices()
        config = model.config
        most_query, most_document = self._max_tokens("query"), self._max_tokens("document")
        self.read_query = TextEncoder(
            tokenizer,
            min(config.max_query_length or most_query, most_query),
            config.query_truncation_side,
            "query",
            notices=self._notices,
        )
        self.read_document = TextEncoder(
            tokenizer, min(config.max_document_length or most_document, most_document), notices=self._notices
        )
        self._derive()

    @classmethod
    def _load(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        hub: HubOptions,
    ) -> tuple[Any, Any]:
        """Load model and tokenizer of a checkpoint, for `from_pretrained`."""
        to_device = resolve_device(device)
        to_dtype = resolve_dtype(dtype, to_device)
        where = located(name_or_path, hub)
        with locked_for_reading(where):
            model = load_model(where, to_dtype, cls.model_class, engine_name=cls.__name__)
            tokenizer = load_tokenizer(where, model.config)
        if not local_path(name_or_path).is_dir():
            # the hub id, not a folder of the cache
            model.name_or_path = model.config.name_or_path = str(name_or_path)
        return model.to(to_device), tokenizer

    @classmethod
    def _make_untrained(
        cls,
        name_or_path: str | Path,
        num_labels: int | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        fields: Mapping[str, Any],
        *,
        hub: HubOptions,
        poolings: Mapping[str, Mapping[str, Any]] | None = None,
        lengths_matter: bool = False,
    ) -> tuple[Any, Any]:
        """Make an untrained model on top of an encoder, and load the encoder's tokenizer, for `from_backbone`.

        Args:
            name_or_path, num_labels, device, dtype: as in `from_backbone`.
            fields: of the configuration.
            hub: how a hub id becomes a folder.
            poolings, lengths_matter: for `follow_pooling`; None leaves the pooling alone.
        """
        to_device = resolve_device(device)
        to_dtype = resolve_dtype(dtype, to_device)
        name_or_path = located(name_or_path, hub)
        backbone = load_backbone(name_or_path)
        tokenizer = load_tokenizer(name_or_path, backbone.config)
        if num_labels is not None:
            fields = {"heads": ("classification",), **fields, "num_labels": num_labels}
        if poolings is not None:
            fields = follow_pooling(checkpoint_root(name_or_path), fields, poolings, lengths_matter=lengths_matter)
        config_class = cls.model_class.config_class
        try:
            check_field_names(config_class, fields)
            config = config_class(backbone_config=backbone.config, **cls._tokenizer_fields(tokenizer), **fields)
        except ValueError as error:
            raise InputError(str(error)) from error
        model = cls.model_class(config)
        model.backbone.load_state_dict(backbone.state_dict())
        model.start_from_backbone()
        cast_parameters(model, to_dtype)
        return model.to(to_device), tokenizer

    @classmethod
    def _tokenizer_fields(cls, tokenizer: Any) -> dict[str, Any]:
        """Return fields of the configuration that depend on the tokenizer."""
        return {}

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
        where = f"device={self.device}, dtype={str(self.dtype).removeprefix('torch.')}"
        return f"{type(self).__name__}({self._sizes()}, {size} parameters, heads={self.config.heads}, {where})"

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

        Also writes a model card, README.md, unless there is one that this library did not write. A crash leaves the old
        checkpoint or the new one, never a mix; other files in the directory stay.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        save(self.model, self.tokenizer, Path(directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        folder: str | Path | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, and return the address of the commit, or of the pull request.

        Args:
            repo_id: "owner/model"; it is created if it does not exist.
            token: None takes the one that ``hf auth login`` stored.
            private: of a new repository; None takes the owner's default.
            commit_message: None says that a model was added.
            revision: branch to upload to; None is the main branch.
            create_pr: open a pull request instead.
            exist_ok: whether the repository may exist.
            replace_model_card: whether to replace a README.md that the repository has.
            folder: a checkpoint of this model to upload as it is, for example with its record of training; None saves
                the model into a temporary folder.

        Raises:
            CheckpointError: the folder holds no checkpoint, or the hub refused or could not be reached.
        """
        options: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
        options |= {"exist_ok": exist_ok, "replace_model_card": replace_model_card}
        message = commit_message or f"Add a {type(self).__name__}"
        if folder is not None:
            return upload(Path(folder), repo_id, message, **options)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return upload(Path(temporary), repo_id, message, **options)

    def with_limits(
        self,
        *,
        max_query_length: int | None = None,
        max_document_length: int | None = None,
        on_empty: str | None = None,
    ) -> Self:
        """Return an engine with the same weights and other limits on texts; the configuration stays unchanged.

        Args:
            max_query_length, max_document_length: tokens, special tokens included; None keeps the limit.
            on_empty: what to do with texts without a token, such as blank ones: "special" reads them as the tokenizer's
                special tokens alone and warns (`EmptyTextWarning`), "error" raises an `InputError`. None keeps the
                engine's setting, "special" by default.

        Raises:
            InputError: a limit exceeds the backbone's positions or leaves no room for text, or on_empty has another
                value.
        """
        if on_empty is not None:
            check_on_empty(on_empty)
        other = copy.copy(self)
        other._notices = Notices()
        for role, length in (("query", max_query_length), ("document", max_document_length)):
            if length is not None and not MIN_TOKENS <= length <= self._max_tokens(role):
                raise InputError(
                    f"max_{role}_length is {length}; expected {MIN_TOKENS} to {self._max_tokens(role)} tokens"
                )
            name = f"read_{role}"
            text_encoder = getattr(self, name)
            changed = dataclasses.replace(
                text_encoder,
                max_length=text_encoder.max_length if length is None else length,
                on_empty=on_empty or text_encoder.on_empty,
                notices=other._notices,
            )
            setattr(other, name, changed)
        return other

    def with_head(self, head: str, class_names: Sequence[str] = ()) -> Self:
        """Return an engine whose model has one more, untrained head; all other weights are copied exactly.

        The new head comes last, so the default head stays the same. Ranking scores and this engine do not change.

        Args:
            head: "ranking" or "classification".
            class_names: for classification, the names of the classes in order of their numbers.

        Raises:
            InputError: the model has that head already, there is no such head, or class_names does not fit the head.
        """
        other = self._with_model(model_with_head(self.model, head, class_names))
        for name in ("read_query", "read_document"):
            setattr(other, name, dataclasses.replace(getattr(self, name), notices=other._notices))
        return other

    def to(
        self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move the model to a device, cast it, or both, and return this engine. Do not use the engine meanwhile.

        Texts that were encoded before stay where they are and are moved when they are ranked. An index belongs to one
        dtype.

        Args:
            where: a device, a dtype or both, in any order.
            device, dtype: the same by keyword, for example "cpu", "cuda:0"; "bfloat16", "bf16".

        Raises:
            InputError: a device or dtype does not exist or is given twice, or there is no argument.
        """
        to_device, to_dtype = placement(*where, device=device, dtype=dtype, current=self.device)
        if to_dtype is not None:
            cast_parameters(self.model, to_dtype)
        if to_device is not None:
            self.model.to(to_device)
        self._derive()
        return self

    @property
    def config(self) -> EncoderConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and encoded texts; scores are always float32."""
        return self.model.dtype

    @property
    def notices(self) -> dict[str, int]:
        """Numbers of texts so far that were cut or held no token, by kind, such as "truncated documents".

        The first text of a kind gives a warning, and later every gain of a digit in its count.
        """
        return self._notices.counts

    def _sizes(self) -> str:
        """Return the sizes that `repr` shows besides the number of parameters."""
        return f"d={self.config.hidden_size}"

    def _derive(self) -> None:
        """Compute the attributes in `_derived` anew, from model and tokenizer."""

    def _with_model(self, model: HeadedModel) -> Self:
        """Return an engine of the same class with another model."""
        return type(self)(model, self.tokenizer)

    def _max_tokens(self, role: str) -> int:
        """Return the most tokens that a text may have in a role, "query" or "document"."""
        return max_positions(self.config.backbone_config)
