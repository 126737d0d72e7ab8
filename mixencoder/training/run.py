"""`train`: train a model of any architecture on data, from an encoder or a checkpoint, and save it."""

import dataclasses
import json
import logging
import platform
import time
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixencoder.architectures import load_engine
from mixencoder.base.backbones import encoder_layers
from mixencoder.base.checkpoints.checkpoint import save
from mixencoder.base.engine import Engine
from mixencoder.data.answers import with_known_answers
from mixencoder.data.examples import read_source
from mixencoder.data.sources import Source, content_hash
from mixencoder.durable import is_vacant
from mixencoder.errors import DataError, InputError, TruncationWarning
from mixencoder.fast import MixEncoder
from mixencoder.modeling import MixEncoderModel
from mixencoder.training.batches import Collator, ExampleDataset, ModelInputs, TokenInputs
from mixencoder.training.checks import check_contrast, check_heads, check_launcher, check_texts, ranking_sources
from mixencoder.training.config import DataSpec, TrainConfig, checked, data_specs
from mixencoder.training.folders import RECORD, RunFolder, last_checkpoint
from mixencoder.training.frozen import FrozenEncodings, StoredDocuments, stored_documents
from mixencoder.training.objective import Objective, Teacher
from mixencoder.training.snapshots import Snapshots, check_snapshots
from mixencoder.training.start import BUNDLED, Start, checkpoint_path, identity, new_model, trained_model
from mixencoder.training.trainer import ObjectiveTrainer, PartialState, TrainingArguments

__all__ = ["RECORD", "DataSpec", "TrainConfig", "train"]

logger = logging.getLogger(__name__)

_MOST_WARMUP = 100
"""Steps of the warm-up of a stable schedule."""


def train(config: TrainConfig) -> Engine:
    """Train and save a model.

    Under torchrun or ``accelerate launch`` every process calls this; each gets its share of every batch.

    Raises:
        DataError, InputError, CheckpointError: something in the configuration cannot be used; raised before any
            training.
        NonFiniteError: the loss became NaN or infinite; earlier checkpoints stay.
    """
    config = checked(config)
    check_launcher()
    specs = data_specs(config)
    check_snapshots(Path(config.output), config.snapshots, config.steps, resume=config.resume)
    # without a GPU, accelerate connects the processes of torchrun only if told to use the CPU
    state = PartialState(cpu=not torch.cuda.is_available())
    # not asdict, which would copy rows given as data
    fields = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    settings = json.loads(json.dumps(fields, default=_as_json))
    folder = RunFolder(Path(config.output), settings, resume=config.resume)
    with _default_torch_state(), folder.held() if state.is_main_process else nullcontext():
        if state.is_main_process and folder.is_done:
            folder.remove()
        state.wait_for_everyone()
        if not is_vacant(folder.output):
            # the interrupted run was finished
            return load_engine(config.output, device="cpu")
        return _run(config, specs, state, folder)


def _run(config: TrainConfig, specs: list[DataSpec], state: PartialState, folder: RunFolder) -> Engine:
    """Train, from the last checkpoint if there is one, and save."""
    prepared = _prepare(config, specs)
    if state.is_main_process:
        folder.begin(prepared.read)
    state.wait_for_everyone()
    checkpoint = last_checkpoint(folder.path)
    engine = prepared.engine
    try:
        trainer = _trainer(config, prepared, folder.path)
        start = time.perf_counter()
        with warnings.catch_warnings():
            # the configuration chooses to truncate training texts
            warnings.simplefilter("ignore", TruncationWarning)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        engine.model.requires_grad_(True).eval()
        if state.is_main_process:
            record = _record(config, trainer, specs, time.perf_counter() - start)
            save(engine.model, engine.tokenizer, folder.output, beside={RECORD: record})
            folder.remove()
        state.wait_for_everyone()
    finally:
        if state.is_main_process and last_checkpoint(folder.path) is None:
            folder.remove()
    return engine


@contextmanager
def _default_torch_state() -> Generator[None]:
    """Train as in a fresh process, whatever default dtype, autocast or gradient mode the caller has set."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in {"cpu", "cuda" if torch.cuda.is_available() else "cpu"}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


class _Prepared(NamedTuple):
    """What training needs, read and checked."""

    engine: Engine
    sources: list[Source]
    collator: Collator
    objective: Objective
    read: dict[str, str]
    """{name: hash} of everything that was read."""


def _prepare(config: TrainConfig, specs: list[DataSpec]) -> _Prepared:
    torch.manual_seed(config.seed)
    engine, read = _start(config, specs)
    label2id = engine.config.class_numbers
    sources = [
        read_source(spec.source, weight=spec.weight, label2id=label2id, task=spec.task, name=spec.name)
        for spec in specs
    ]
    if config.model is not None and "ranking" not in engine.config.heads and (names := ranking_sources(sources)):
        logger.info("%s gets a ranking head for %s", config.model, ", ".join(names))
        engine = engine.with_head("ranking")
    check_heads(engine, sources, "this model")
    sources = with_known_answers(sources)
    check_texts(sources, engine.tokenizer, config.on_empty, documents=config.index is None)
    for source in sources:
        logger.info("%s: %d examples, %s", source.name, len(source.examples), source.task)
    _freeze(engine, config)
    in_batch = not engine.reads_jointly if config.in_batch is None else config.in_batch
    negatives = config.negatives if config.negatives is not None else (1 if in_batch else 4)
    if not in_batch and negatives < 1:
        raise InputError("negatives is 0 without in_batch, so that lists hold no wrong document; expected at least 1")
    check_contrast(sources, config.batch_size, PartialState().num_processes, negatives)
    stored = None
    if config.index is not None:
        assert isinstance(engine, MixEncoder), "freezing has checked the architecture"
        # not with the limits of training, but with those that the index was made with
        stored = stored_documents(engine, config.index, sources)
    collator = Collator(
        _inputs(config, engine, sources, stored),
        negatives,
        config.seed,
        in_batch=in_batch,
        graded_list=config.graded_list,
        with_lists=config.teacher is not None,
    )
    teacher = _load_teacher(config, sources, label2id)
    objective = Objective(
        interaction_loss_weight=config.interaction_loss_weight,
        teacher=teacher,
        distillation=config.distillation,
        distillation_weight=config.distillation_weight,
        temperature=config.temperature,
        mini_batch_size=config.mini_batch_size,
    )
    contents = {f"data {source.name}": content_hash(source) for source in sources}
    contents["model" if config.model is not None else "backbone"] = read
    if stored is not None:
        contents["index"] = stored.content_hash()
    if teacher is not None:
        contents["teacher"] = identity(teacher.engine.model, teacher.engine.tokenizer)
    return _Prepared(engine, sources, collator, objective, contents)


def _trainer(config: TrainConfig, prepared: _Prepared, folder: Path) -> ObjectiveTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **_schedule(config),
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
    return ObjectiveTrainer(
        model=prepared.engine.model,
        args=arguments,
        train_dataset=ExampleDataset(prepared.sources),
        data_collator=prepared.collator,
        sources=prepared.sources,
        objective=prepared.objective,
        head_learning_rate=config.head_learning_rate,
        callbacks=[Snapshots(prepared.engine, Path(config.output), config.snapshots)],
    )


def _schedule(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of TrainingArguments that say how rates rise and fall."""
    tenth = config.steps // 10
    if config.schedule == "linear":
        return {"warmup_steps": tenth, "lr_scheduler_type": "linear"}
    return {
        "warmup_steps": min(tenth, _MOST_WARMUP),
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": tenth, "decay_type": "linear"},
    }


def _start(config: TrainConfig, specs: list[DataSpec]) -> Start:
    sources = [spec.source for spec in specs]
    if config.model is not None:
        return trained_model(config.model, config.architecture, config.config, sources)
    return new_model(config.architecture or "mixencoder", config.backbone or BUNDLED, config.config, sources)


def _freeze(engine: Engine, config: TrainConfig) -> None:
    """Exclude from training what the configuration says.

    Raises:
        InputError: freeze_encoder with an architecture other than mixencoder.
    """
    model = engine.model
    if config.freeze_embeddings:
        model.backbone.embeddings.requires_grad_(False)
    for layer in encoder_layers(model.backbone)[: config.freeze_layers]:
        layer.requires_grad_(False)
    if config.freeze_encoder:
        if not isinstance(model, MixEncoderModel):
            raise InputError(
                f"freeze_encoder is True, but the model is a {type(engine).__name__}; expected a mixencoder, whose "
                "layers on top of the encoder can be trained alone"
            )
        frozen = model.encoder_weights()
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)


def _inputs(config: TrainConfig, engine: Engine, sources: list[Source], stored: StoredDocuments | None) -> ModelInputs:
    """Return what makes the model's inputs: token ids, or encodings that are made now."""
    reader = _limited(engine, config)
    if not config.freeze_encoder:
        return TokenInputs(reader.read_query, reader.read_document, reader.tokenizer.pad_token_id)
    assert isinstance(reader, MixEncoder), "freezing has checked the architecture"
    # the trainer moves the model later; encoding on a CPU would take many times as long
    reader.model.to(PartialState().device)
    return FrozenEncodings(reader.model, reader.read_query, reader.read_document, sources, stored)


def _limited(engine: Engine, config: TrainConfig) -> Engine:
    return engine.with_limits(
        max_query_length=min(config.max_query_tokens, engine.read_query.max_length),
        max_document_length=min(config.max_document_tokens, engine.read_document.max_length),
    )


def _load_teacher(config: TrainConfig, sources: list[Source], label2id: dict[str, int] | None) -> Teacher | None:
    if config.teacher is None:
        return None
    engine = _limited(load_engine(checkpoint_path(config.teacher), device=PartialState().device), config)
    taught = [source for source in sources if source.task != "similarity"]
    if not taught:
        raise DataError("a teacher was given, but all data are scored pairs, which do not use one; expected no teacher")
    check_heads(engine, taught, f"the teacher {config.teacher}")
    if any(source.task == "classification" for source in sources):
        found = engine.config.class_numbers
        if found != label2id:
            raise DataError(f"the teacher {config.teacher} knows the classes {found}; expected {label2id}")
    return Teacher(engine)


def _record(config: TrainConfig, trainer: ObjectiveTrainer, specs: list[DataSpec], seconds: float) -> str:
    """Return how the model was trained, as JSON; with names instead of local paths."""
    settings = {
        entry.name: getattr(config, entry.name)
        for entry in dataclasses.fields(TrainConfig)
        if entry.name not in ("output", "data", "data_dir", "resume")
    }
    for name in ("model", "backbone", "teacher", "index"):
        settings[name] = settings[name] and Path(settings[name]).name
    record = {
        "settings": settings,
        "data": [{"name": spec.name, "weight": spec.weight} for spec in specs],
        "examples": {source.name: len(source.examples) for source in trainer.train_sources},
        "seconds": round(seconds, 1),
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "device": trainer.args.device.type,
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("mixencoder", "torch", "transformers", "accelerate")},
        "log": trainer.state.log_history,
    }
    return json.dumps(record, indent=2, default=_as_json) + "\n"


def _as_json(value: Any) -> Any:
    """Return a value that JSON cannot hold as its fields or a name, without local paths."""
    if isinstance(value, DataSpec):
        return dataclasses.asdict(dataclasses.replace(value, source=_as_json(value.source)))
    return value.name if isinstance(value, Path) else type(value).__name__
