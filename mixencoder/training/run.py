"""`train`: from data and an encoder or checkpoint to a saved model of any architecture."""

import dataclasses
import fcntl
import json
import logging
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mixencoder.architectures import ARCHITECTURES, load_engine
from mixencoder.backbones import encoder_layers
from mixencoder.checkpoint import save
from mixencoder.durable import is_vacant, standing
from mixencoder.engine import Engine
from mixencoder.errors import DataError, InputError, TruncationWarning
from mixencoder.training.batches import Collator, ExampleDataset
from mixencoder.training.checks import check_contrast, check_heads, check_texts, ranked
from mixencoder.training.examples import Source, read_source
from mixencoder.training.objective import DISTILLATIONS, Objective, Teacher
from mixencoder.training.start import BUNDLED, CLASS_FIELDS, checkpoint_path, new_model, trained_model
from mixencoder.training.trainer import ObjectiveTrainer, PartialState, TrainingArguments, last_checkpoint

logger = logging.getLogger(__name__)

RECORD = "training.json"
"""File beside the weights of a trained model: how it was trained."""
_MAY_CHANGE = ("resume", "save_every", "log_every")
"""Fields that a resumed run may have other values of."""


@dataclass(frozen=True)
class DataSpec:
    """A source of training data."""

    source: Path | Iterable[Mapping[str, Any]]
    """A file, a BEIR folder, or rows, for example a `datasets.Dataset`."""
    weight: float = 1.0
    """How often batches come from here, relative to the other sources."""
    task: str | None = None
    """Of `mixencoder.training.examples.TASKS`; None reads it off the data."""
    name: str | None = None
    """What to call it; None takes the file's name."""


@dataclass(frozen=True)
class TrainConfig:
    """What `mixencoder train` needs; the fields of its YAML file and its flags."""

    output: str
    """Directory for the trained model; must not hold one yet. Until the end ``OUTPUT.unfinished`` holds checkpoints."""
    data: list[str | dict[str, Any] | DataSpec] = field(default_factory=list)
    """Files and BEIR folders: ``path``, ``path=weight``, or a mapping with ``source`` and fields of `DataSpec`."""
    data_dir: str = ""
    """Folder that relative data paths start from."""
    architecture: str | None = None
    """Of `mixencoder.architectures.ARCHITECTURES`; None is that of `model`, or mixencoder."""
    model: str | None = None
    """A trained model to go on from: a directory, a hub id, or "bundled". It gets a head that the data need and it
    lacks; all other weights go on as they are."""
    backbone: str | None = None
    """An encoder to start from instead, or a trained model whose encoder to take. None: that of the bundled one."""
    config: dict[str, Any] = field(default_factory=dict)
    """With backbone: fields of the architecture's configuration. Heads and class names are read off the data where
    they are left out. With model: only `CLASS_FIELDS`, for a classification head that it lacks, where the data hold
    class numbers instead of names."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Examples a step, process and accumulated batch."""
    mini_batch_size: int | None = None
    """Encode so many texts at once and cache their encodings: batches as large as wanted in little memory, for a third
    more time. None: all at once."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up for a step. Unlike mini_batch_size this adds no in-batch negatives."""
    in_batch: bool | None = None
    """Let every query of a ranking batch meet every document of it. None: unless each pair takes a pass of its own
    (cross-encoder, DeFormer)."""
    negatives: int | None = None
    """Listed negatives drawn for each query that has any. None: 1 in-batch; without, 4, and other queries' documents
    fill up lists that are shorter."""
    graded_list: int = 8
    """Documents of a graded list, at most."""
    learning_rate: float = 2e-5
    """Peak rate of the backbone; warms up over the first tenth, then falls linearly to zero."""
    head_learning_rate: float = 2e-4
    """Peak rate of everything on top of the backbone."""
    interaction_loss_weight: float = 0.5
    """MixEncoder with the dual term: weight of the same ranking loss on ``h . e`` alone. The dual term starts so good
    that without it the interaction learns next to nothing (docs/training.md)."""
    teacher: str | None = None
    """A trained model of any architecture whose scores are learned beside the labels, usually a cross-encoder."""
    distillation: str = "kl"
    """How ranking scores are learned: "kl" (listwise) or "margin-mse"."""
    distillation_weight: float = 0.5
    """Of the teacher's loss, from 0 to 1; the labels' loss weighs the rest."""
    temperature: float = 1.0
    """Of "kl"."""
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
    save_every: int = 500
    """Steps between checkpoints, from which an interrupted run can go on."""
    resume: bool = False
    """Go on from the last checkpoint of ``OUTPUT.unfinished``, with the weights of a run that was never interrupted."""


def train(config: TrainConfig) -> Engine:
    """Train and save a model.

    Under torchrun or ``accelerate launch`` every process calls this; each gets its share of every batch.

    Raises:
        DataError, InputError, CheckpointError: something named in the configuration cannot be used; found before any
            training.
        NonFiniteError: the loss became NaN or infinite; checkpoints stay as they are.
    """
    _check(config)
    specs = [_spec(item, config.data_dir) for item in config.data]
    # without a GPU accelerate takes the processes that torchrun started for one another only when told of the CPU
    state = PartialState(cpu=not torch.cuda.is_available())
    unfinished = Path(f"{config.output.rstrip('/')}.unfinished")
    with _alone(unfinished) if state.is_main_process else nullcontext(False) as was_there:
        if state.is_main_process:
            _prepare_folder(config, unfinished, was_there=was_there)
        state.wait_for_everyone()
        if not is_vacant(Path(config.output)):
            # the interrupted run had come to its end
            return load_engine(config.output, device="cpu")
        return _run(config, specs, state, unfinished)


def _run(config: TrainConfig, specs: list[DataSpec], state: PartialState, unfinished: Path) -> Engine:
    """Train, from the last checkpoint if there is one, and save."""
    checkpoint = last_checkpoint(unfinished)
    try:
        engine, trainer = _prepare(config, specs, unfinished)
        start = time.perf_counter()
        with warnings.catch_warnings():
            # cutting training texts is a choice of the configuration
            warnings.simplefilter("ignore", TruncationWarning)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        engine.model.requires_grad_(True).eval()
        if state.is_main_process:
            record = _record(config, trainer, specs, time.perf_counter() - start)
            save(engine.model, engine.tokenizer, Path(config.output), beside={RECORD: record})
            shutil.rmtree(unfinished)
        state.wait_for_everyone()
    finally:
        if state.is_main_process and unfinished.is_dir() and last_checkpoint(unfinished) is None:
            shutil.rmtree(unfinished)
    return engine


@contextmanager
def _alone(unfinished: Path) -> Generator[bool]:
    """Keep other runs from a folder of checkpoints, until this one ends or dies; yields whether the folder was there.

    Raises:
        InputError: a run that is still going on has it.
    """
    was_there = unfinished.exists()
    unfinished.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{unfinished} is being written by a run that still goes on; wait for it, or end it"
            raise InputError(message) from error
        yield was_there
    finally:
        os.close(descriptor)
        if not was_there:
            # a run that was refused leaves nothing
            with suppress(OSError):
                unfinished.rmdir()


def _check(config: TrainConfig) -> None:
    if config.model is not None and config.backbone is not None:
        raise InputError("expected either a model to go on from or a backbone to start from, not both")
    if config.model is not None and not set(config.config) <= set(CLASS_FIELDS):
        raise InputError(
            f"config is {config.config}, but a model to go on from has its own; expected nothing but the classes of a "
            f"head that it is to get ({', '.join(CLASS_FIELDS)})"
        )
    if config.architecture is not None and config.architecture not in ARCHITECTURES:
        raise InputError(f"architecture is {config.architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "graded_list": 2, "log_every": 1}
    least |= {"save_every": 1, "mini_batch_size": 1, "negatives": 0, "freeze_layers": 0}
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise InputError(f"{name} is {value!r}; expected an integer of at least {lowest}")
    for entry in dataclasses.fields(TrainConfig):
        value = getattr(config, entry.name)
        if entry.type is float and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise InputError(f"{entry.name} is {value!r}; expected a number of at least 0")
    if config.distillation not in DISTILLATIONS:
        raise InputError(f"distillation is {config.distillation!r}; expected one of {', '.join(DISTILLATIONS)}")
    if config.distillation_weight > 1:
        raise InputError(f"distillation_weight is {config.distillation_weight}; expected a number from 0 to 1")
    if config.temperature == 0:
        raise InputError(f"temperature is {config.temperature}; expected a positive number")
    if not config.data:
        raise DataError("no training data was named; expected files in one of the shapes of docs/training.md")


def _spec(item: str | dict[str, Any] | DataSpec, data_dir: str) -> DataSpec:
    if isinstance(item, str):
        path, _, weight = item.partition("=")
        try:
            item = DataSpec(Path(path), float(weight) if weight else 1.0)
        except ValueError as error:
            raise InputError(f"weight of {path} is {weight!r}; expected a number") from error
    elif isinstance(item, dict):
        try:
            item = DataSpec(**item)
        except TypeError as error:
            known = ", ".join(entry.name for entry in dataclasses.fields(DataSpec))
            raise InputError(f"data entry {item} cannot be used: {error}; expected {known}") from error
    source = Path(data_dir, item.source) if isinstance(item.source, str | Path) else item.source
    if isinstance(source, Iterator):
        # rows are read twice: for the names of classes, and for the examples
        source = list(source)
    weight = item.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise InputError(f"weight of {item.name or item.source} is {weight}; expected a positive number")
    return dataclasses.replace(item, source=source)


def _prepare_folder(config: TrainConfig, unfinished: Path, *, was_there: bool) -> None:
    """Begin in a folder of checkpoints, or see that a run can go on from those that it holds; overwrite nothing."""
    output, known = Path(config.output), unfinished / "config.json"
    # not asdict, which would copy rows that were given as data
    fields = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    settings = json.loads(json.dumps(fields, default=_named))
    is_done = was_there and (standing(output) / RECORD).is_file()
    if not is_vacant(output) and not (config.resume and is_done):
        raise InputError(f"{output} exists and is not empty; name another output, or move it away")
    if not is_done and last_checkpoint(unfinished) is None:
        # what is there cannot be used: a run died before its first checkpoint was whole
        for path in unfinished.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        known.write_text(json.dumps(settings), encoding="utf-8")
        return
    if not config.resume:
        raise InputError(f"{unfinished} holds an interrupted run; go on with it (resume), or remove it to start again")
    # of a run that died while it cleaned up, they may be gone
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else settings
    changed = [name for name in settings if name not in _MAY_CHANGE and settings[name] != before.get(name)]
    if changed:
        found = ", ".join(f"{name} {settings[name]!r} instead of {before.get(name)!r}" for name in changed)
        raise InputError(f"{unfinished} was begun with other settings: {found}; resume with the same ones")
    if is_done:
        shutil.rmtree(unfinished)


def _prepare(config: TrainConfig, specs: list[DataSpec], folder: Path) -> tuple[Engine, ObjectiveTrainer]:
    torch.manual_seed(config.seed)
    engine = _start(config, specs)
    label2id = engine.config.class_numbers
    sources = [
        read_source(spec.source, weight=spec.weight, label2id=label2id, task=spec.task, name=spec.name)
        for spec in specs
    ]
    if config.model is not None and "ranking" not in engine.config.heads and ranked(sources):
        logger.info("%s gets a ranking head for %s", config.model, ", ".join(ranked(sources)))
        engine = engine.with_head("ranking")
    check_heads(engine, sources, "this model")
    check_texts(sources, engine.tokenizer)
    for source in sources:
        logger.info("%s: %d examples, %s", source.name, len(source.examples), source.task)
    model = engine.model
    if config.freeze_embeddings:
        model.backbone.embeddings.requires_grad_(False)
    for layer in encoder_layers(model.backbone)[: config.freeze_layers]:
        layer.requires_grad_(False)
    in_batch = not engine.reads_jointly if config.in_batch is None else config.in_batch
    negatives = config.negatives if config.negatives is not None else (1 if in_batch else 4)
    if not in_batch and negatives < 1:
        raise InputError("negatives is 0, but queries have lists of their own (in_batch); expected at least 1")
    check_contrast(sources, config.batch_size, PartialState().num_processes, negatives)
    reader = _limited(engine, config)
    collator = Collator(
        reader.read_query,
        reader.read_document,
        engine.tokenizer.pad_token_id,
        negatives,
        config.seed,
        in_batch=in_batch,
        graded_list=config.graded_list,
        with_lists=config.teacher is not None,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.steps // 10,
        lr_scheduler_type="linear",
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        disable_tqdm=False,
    )
    objective = Objective(
        interaction_loss_weight=config.interaction_loss_weight,
        teacher=_load_teacher(config, sources, label2id, arguments.device),
        distillation=config.distillation,
        distillation_weight=config.distillation_weight,
        temperature=config.temperature,
        mini_batch_size=config.mini_batch_size,
    )
    trainer = ObjectiveTrainer(
        model=model,
        args=arguments,
        train_dataset=ExampleDataset(sources),
        data_collator=collator,
        sources=sources,
        objective=objective,
        head_learning_rate=config.head_learning_rate,
    )
    return engine, trainer


def _start(config: TrainConfig, specs: list[DataSpec]) -> Engine:
    sources = [spec.source for spec in specs]
    if config.model is not None:
        return trained_model(config.model, config.architecture, config.config, sources)
    return new_model(config.architecture or "mixencoder", config.backbone or BUNDLED, config.config, sources)


def _limited(engine: Engine, config: TrainConfig) -> Engine:
    return engine.with_limits(
        max_query_length=min(config.max_query_tokens, engine.read_query.max_length),
        max_document_length=min(config.max_document_tokens, engine.read_document.max_length),
    )


def _load_teacher(
    config: TrainConfig, sources: list[Source], label2id: dict[str, int] | None, device: torch.device
) -> Teacher | None:
    if config.teacher is None:
        return None
    engine = _limited(load_engine(checkpoint_path(config.teacher), device=device), config)
    taught = [source for source in sources if source.task != "similarity"]
    if not taught:
        raise DataError("a teacher was named, but all data are scored pairs, which teach by themselves")
    check_heads(engine, taught, f"the teacher {config.teacher}")
    if any(source.task == "classification" for source in sources):
        found = engine.config.class_numbers
        if found != label2id:
            raise DataError(f"the teacher {config.teacher} knows the classes {found}; expected {label2id}")
    return Teacher(engine)


def _record(config: TrainConfig, trainer: ObjectiveTrainer, specs: list[DataSpec], seconds: float) -> str:
    """Return how the model was trained, as JSON; names alone, as paths are nobody's business."""
    settings = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(TrainConfig)
        if entry.name not in ("output", "data", "data_dir", "resume")
    }
    for name in ("model", "backbone", "teacher"):
        settings[name] = settings[name] and Path(settings[name]).name
    record = {
        "settings": settings,
        "data": [{"name": spec.name or _named(spec.source), "weight": spec.weight} for spec in specs],
        "examples": {source.name: len(source.examples) for source in trainer.train_sources},
        "seconds": round(seconds, 1),
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "device": trainer.args.device.type,
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("mixencoder", "torch", "transformers", "accelerate")},
        "log": trainer.state.log_history,
    }
    return json.dumps(record, indent=2, default=_named) + "\n"


def _named(value: Any) -> Any:
    """Name what JSON cannot hold."""
    if isinstance(value, DataSpec):
        return dataclasses.asdict(dataclasses.replace(value, source=_named(value.source)))
    return value.name if isinstance(value, Path) else type(value).__name__
