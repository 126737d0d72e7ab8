"""`train`: from data files and a backbone or checkpoint to a saved MixEncoder, on transformers' Trainer."""

import logging
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mixencoder.backbones import encoder_layers
from mixencoder.errors import DataError, InputError, MissingExtraError, NonFiniteError, TruncationWarning
from mixencoder.fast import MixEncoder
from mixencoder.training.data import Collator, ExampleDataset, Source, SourceBatchSampler, read_source
from mixencoder.training.losses import classification_loss, ranking_loss, similarity_loss

try:
    import accelerate  # noqa: F401  (transformers' Trainer needs it)
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise MissingExtraError(f"training needs the extra: pip install 'mixencoder[train]' ({error})") from error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """What `mixencoder train` needs; the fields of its YAML file and its flags."""

    output: str
    """Directory for the trained model; must not hold one yet."""
    data: list[str] = field(default_factory=list)
    """Files and BEIR folders, each with an optional weight: ``path`` or ``path=weight``."""
    data_dir: str = ""
    """Folder that relative data paths start from."""
    model: str | None = None
    """A MixEncoder to go on from; or give backbone."""
    backbone: str | None = None
    """An encoder to start from."""
    config: dict[str, Any] = field(default_factory=dict)
    """With backbone: fields of `MixEncoderConfig`."""
    steps: int = 1000
    batch_size: int = 32
    negatives: int = 1
    """Listed negatives drawn for each query that has any."""
    learning_rate: float = 2e-5
    """Peak rate of the backbone; warms up over the first tenth, then falls linearly to zero."""
    interaction_learning_rate: float = 2e-4
    """Peak rate of everything on top of the backbone."""
    interaction_loss_weight: float = 0.5
    """With the dual term: weight of the same ranking loss on ``h . e`` alone. The dual term starts so good that without
    it the interaction learns next to nothing (docs/training.md)."""
    freeze_embeddings: bool = True
    """Leave the backbone's token and position embeddings as they are."""
    freeze_layers: int = 0
    """Leave so many of the backbone's lowest layers as they are."""
    max_query_tokens: int = 64
    """Tokens read of a query in training, at most the model's own limit, which is left alone."""
    max_document_tokens: int = 128
    """The same of a document."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False
    """Autocast to bfloat16; pays off where the processor has it."""
    seed: int = 0
    log_every: int = 50


def train(config: TrainConfig) -> MixEncoder:
    """Train and save a MixEncoder.

    Raises:
        DataError, InputError, CheckpointError: something named in the configuration cannot be used; found before any
            training.
        NonFiniteError: the loss became NaN or infinite; nothing is saved.
    """
    output = Path(config.output)
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise InputError(f"{output} exists and is not empty; name another output, or move it away")
    if (config.model is None) == (config.backbone is None):
        raise InputError("expected either a model to go on from or a backbone to start from, not both and not neither")
    for name in ("steps", "batch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; expected a positive integer")
    torch.manual_seed(config.seed)
    engine = (
        MixEncoder.from_pretrained(config.model)
        if config.model is not None
        else MixEncoder.from_backbone(config.backbone, **config.config)
    )
    sources = _read_sources(config, engine)
    for source in sources:
        logger.info("%s: %d examples, %s", source.name, len(source.examples), source.task)

    model = engine.model
    if config.freeze_embeddings:
        model.backbone.embeddings.requires_grad_(False)
    for layer in encoder_layers(model.backbone)[: config.freeze_layers]:
        layer.requires_grad_(False)
    reader = engine.with_limits(
        max_query_length=min(config.max_query_tokens, engine.read_query.max_length),
        max_document_length=min(config.max_document_tokens, engine.read_document.max_length),
    )
    collator = Collator(
        reader.read_query,
        reader.read_document,
        engine.tokenizer.pad_token_id,
        config.negatives,
        config.seed,
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=math.ceil(config.steps / 10),
        lr_scheduler_type="linear",
        bf16=config.bf16,
        seed=config.seed,
        logging_steps=config.log_every,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=False,
    )
    trainer = MixEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=ExampleDataset(sources),
        data_collator=collator,
        sources=sources,
        interaction_learning_rate=config.interaction_learning_rate,
        interaction_loss_weight=config.interaction_loss_weight,
    )
    with warnings.catch_warnings():
        # cutting training texts is a choice of the configuration
        warnings.simplefilter("ignore", TruncationWarning)
        trainer.train()
    model.requires_grad_(True).eval()
    engine.save_pretrained(output)
    return engine


class MixEncoderTrainer(Trainer):
    """transformers' Trainer with one loss a task, batches from one source, and two learning rates."""

    def __init__(
        self,
        *,
        sources: list[Source],
        interaction_learning_rate: float,
        interaction_loss_weight: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._sources = sources
        self._interaction_loss_weight = interaction_loss_weight
        self._interaction_learning_rate = interaction_learning_rate

    def get_train_dataloader(self) -> DataLoader:
        """Return batches that each come from one source."""
        sampler = SourceBatchSampler(
            self._sources,
            batch_size=self.args.per_device_train_batch_size,
            steps=self.args.max_steps,
            seed=self.args.seed,
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with two rates; biases, norms and single vectors are not decayed."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in (model or self.model).named_parameters():
            if parameter.requires_grad:
                in_backbone = name.startswith("backbone.")
                rate = self.args.learning_rate if in_backbone else self._interaction_learning_rate
                decay = self.args.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of the batch's task, and the outputs if asked for."""
        inputs = dict(inputs)
        task, targets, excluded = inputs.pop("task"), inputs.pop("targets"), inputs.pop("excluded", None)
        if task == "ranking":
            scores = model(**inputs, head="ranking")
            outputs = scores.full
            loss = ranking_loss(outputs, targets, excluded)
            if scores.dual is not None:
                loss = loss + self._interaction_loss_weight * ranking_loss(scores.interaction, targets, excluded)
        elif task == "classification":
            outputs = model(**inputs, candidates_per_query=1, head="classification").squeeze(1)
            loss = classification_loss(outputs, targets)
        else:
            outputs = model(**inputs, candidates_per_query=1, head="ranking").full.squeeze(1)
            loss = similarity_loss(outputs, targets)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss is {loss.item()} at step {self.state.global_step} ({task}); nothing is saved"
            )
        return (loss, outputs) if return_outputs else loss


def _read_sources(config: TrainConfig, engine: MixEncoder) -> list[Source]:
    if not config.data:
        raise DataError("no training data was named; expected files in one of the shapes of docs/training.md")
    label2id = engine.config.label2id if "classification" in engine.config.heads else None
    sources = []
    for item in config.data:
        name, _, weight = item.partition("=")
        try:
            number = float(weight) if weight else 1.0
        except ValueError as error:
            raise InputError(f"weight of {name} is {weight!r}; expected a number") from error
        if not 0 < number < math.inf:
            raise InputError(f"weight of {name} is {number}; expected a positive number")
        sources.append(read_source(Path(config.data_dir, name), weight=number, label2id=label2id))
    lacking = [
        source.name for source in sources if source.task != "classification" and "ranking" not in engine.config.heads
    ]
    if lacking:
        raise DataError(f"{', '.join(lacking)}: ranking and similarity need a ranking head, which this model lacks")
    return sources
