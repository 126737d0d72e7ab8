"""The settings of a training run: its fields, their checks, and the data sources that they name."""

import dataclasses
import itertools
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mixencoder.architectures import ARCHITECTURES
from mixencoder.base.empty_texts import ON_EMPTY
from mixencoder.base.inputs import local_path
from mixencoder.data.examples import Data
from mixencoder.data.sources import TASKS
from mixencoder.data.tables import source_name
from mixencoder.errors import DataError, InputError
from mixencoder.training.objective import DISTILLATIONS
from mixencoder.training.start import CLASS_FIELDS

SCHEDULES = ("linear", "stable")


@dataclass(frozen=True)
class DataSpec:
    """A source of training data."""

    source: Data
    """A file, a BEIR folder, or rows, for example a `datasets.Dataset`."""
    weight: float = 1.0
    """How often batches come from here, relative to the other sources."""
    task: str | None = None
    """One of `mixencoder.data.sources.TASKS`; None infers it from the data."""
    name: str | None = None
    """Name of the source; None takes the file's name."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `mixencoder train`: the fields of its YAML file and its flags."""

    output: str | Path
    """Directory for the trained model; must be new or empty. Until the end ``OUTPUT.unfinished`` holds checkpoints."""
    data: Any = field(default_factory=list)
    """Files and BEIR folders, one or a list: a path, ``path=weight``, rows, a `DataSpec`, or a mapping with ``source``
    and fields of `DataSpec`."""
    data_dir: str | Path = ""
    """Folder that relative paths of data start from."""
    architecture: str | None = None
    """One of `mixencoder.architectures.ARCHITECTURES`; None is that of `model`, or mixencoder."""
    model: str | Path | None = None
    """Trained model to continue from: a directory, a hub id, or "bundled". A head that the data need and it lacks is
    added; training continues from all its other weights."""
    backbone: str | Path | None = None
    """Encoder to start from instead, or a trained model whose encoder to use. None: the bundled model's encoder."""
    config: dict[str, Any] = field(default_factory=dict)
    """With backbone: fields of the architecture's configuration; heads and class names that are left out come from the
    data. With model: only `CLASS_FIELDS`, for a new classification head whose data hold class numbers, not names."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Examples of a batch in each process."""
    mini_batch_size: int | None = None
    """GradCache chunk size, in texts: large batches in little memory, for a third more time. None: all at once."""
    gradient_accumulation_steps: int = 1
    """Batches per optimiser step. Unlike a larger batch_size, more batches per step add no in-batch negatives."""
    in_batch: bool | None = None
    """Score every query of a ranking batch with all documents of the batch. None: True, unless every pair takes its own
    pass (cross-encoder, DeFormer)."""
    negatives: int | None = None
    """Most listed negatives drawn for each query. None: 1 with in_batch, else 4. Without in_batch, other queries'
    documents fill up shorter lists."""
    graded_list: int = 8
    """Most documents of a graded list."""
    learning_rate: float = 2e-5
    """Peak rate of the backbone."""
    head_learning_rate: float = 2e-4
    """Peak rate of everything on top of the backbone."""
    schedule: str = "linear"
    """How learning rates fall, of `SCHEDULES`. "linear": warm up over the first tenth, then fall to zero at the last
    step. "stable": warm up over the first tenth, at most 100 steps, stay at the peak, and fall to zero over the last
    tenth, so that `snapshots` are points of one learning curve."""
    interaction_loss_weight: float = 0.5
    """With the dual term: weight of a second ranking loss, on ``h . e`` alone. Without that loss the interaction learns
    almost nothing, as the dual term ranks well from the start (docs/training.md)."""
    teacher: str | Path | None = None
    """Trained model of any architecture, usually a cross-encoder, whose scores are learned along with the labels."""
    distillation: str = "kl"
    """Loss on the teacher's ranking scores: "kl" (listwise) or "margin-mse"."""
    distillation_weight: float = 0.5
    """Weight of the teacher's loss, from 0 to 1; the labels' loss gets the rest."""
    temperature: float = 1.0
    """Temperature of "kl"."""
    freeze_encoder: bool = False
    """For a mixencoder: train only the layers on top of the encoder. Every text is encoded once, before the first step,
    and stored context embeddings stay as they are: an index of the model also serves the trained one."""
    index: str | Path | None = None
    """With freeze_encoder: an index of the model. Documents in the data are ids of this index, and its stored vectors
    are used, so that no texts of documents are needed."""
    freeze_embeddings: bool = True
    """Do not train the backbone's token and position embeddings."""
    freeze_layers: int = 0
    """Number of the backbone's lowest layers that are not trained."""
    max_query_tokens: int = 64
    """Most tokens of a query in training, up to the model's own limit, which does not change."""
    max_document_tokens: int = 128
    """The same for a document."""
    on_empty: str = "special"
    """Texts in which the tokenizer finds no token: "special" reads its special tokens alone and warns, "error" raises.
    Rankings without a query or a right document are left out before."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False
    """Autocast to bfloat16; faster on a processor that supports it."""
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    """Steps between checkpoints, from which an interrupted run can be resumed."""
    snapshots: list[int] = field(default_factory=list)
    """Steps after which the model is also saved, next to the output, as ``OUTPUT.step-N``."""
    resume: bool = False
    """Continue from the last checkpoint of ``OUTPUT.unfinished``; the weights will equal an uninterrupted run's."""


def checked(config: TrainConfig) -> TrainConfig:
    """Check all fields and return them in plain types: str for paths, int for NumPy's integers, a list for data.

    Raises:
        DataError: no data are named.
        InputError: a field cannot be used; the message names it, what was found and what was expected.
    """
    plain = {name: _plain(name, getattr(config, name), kind) for name, kind in _field_types().items() if name != "data"}
    config = TrainConfig(**plain, data=_listed(config.data))
    if not config.output:
        raise InputError("output is empty; expected a directory for the trained model")
    if config.model is not None and config.backbone is not None:
        raise InputError("expected either a model to continue from or a backbone to start from, not both")
    if config.model is not None and not set(config.config) <= set(CLASS_FIELDS):
        raise InputError(
            f"config is {config.config}, but a trained model has its own; expected only the classes of a new head "
            f"({', '.join(CLASS_FIELDS)})"
        )
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) is not None and value not in choices:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    if config.index is not None and not config.freeze_encoder:
        raise InputError(
            f"index is {config.index!r}, but freeze_encoder is False; the vectors of an index stay as they are, so "
            "expected freeze_encoder=True"
        )
    if config.index is not None and config.teacher is not None:
        raise InputError("index and teacher were both given; a teacher reads texts, which an index may lack")
    if config.distillation_weight > 1:
        raise InputError(f"distillation_weight is {config.distillation_weight}; expected a number from 0 to 1")
    if config.temperature == 0:
        raise InputError(f"temperature is {config.temperature}; expected a positive number")
    if config.seed > _MAX_SEED:
        raise InputError(f"seed is {config.seed}; expected an integer of at most {_MAX_SEED}")
    if not config.data:
        raise DataError("no training data are named; expected files in one of the shapes of docs/training.md")
    return config


def data_specs(config: TrainConfig) -> list[DataSpec]:
    """Return the data sources of a checked configuration, with full paths and unique names.

    Raises:
        InputError: an entry cannot be used, or one file is named twice.
    """
    specs, names, files = [], set(), {}
    for item in config.data:
        spec = _spec(item, Path(config.data_dir))
        if isinstance(spec.source, Path):
            if (path := spec.source.resolve()) in files:
                raise InputError(f"{spec.source} is named twice; a weight says how often batches come from it")
            files[path] = spec
        name = spec.name or (source_name(spec.source) if isinstance(spec.source, Path) else "rows")
        # files in different folders may share a name
        found = next(candidate for candidate in _numbered(name) if candidate not in names)
        names.add(found)
        specs.append(dataclasses.replace(spec, name=found))
    return specs


_MINIMUMS = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "graded_list": 2, "log_every": 1}
_MINIMUMS |= {"save_every": 1, "snapshots": 1, "mini_batch_size": 1, "max_query_tokens": 3, "max_document_tokens": 3}
_MAX_SEED = 2**32 - 1
"""NumPy's largest seed."""
_CHOICES = {"architecture": tuple(ARCHITECTURES), "distillation": DISTILLATIONS, "on_empty": ON_EMPTY}
_CHOICES |= {"schedule": SCHEDULES}


def _field_types() -> dict[str, tuple[Any, ...]]:
    """Return {field: the types that it may have}."""
    kinds = {}
    for entry in dataclasses.fields(TrainConfig):
        is_union = isinstance(entry.type, types.UnionType)
        kinds[entry.name] = typing.get_args(entry.type) if is_union else (typing.get_origin(entry.type) or entry.type,)
    return kinds


def _plain(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return a field's value as the first of its types, or as None if that is one of them."""
    kind, may_be_none = kinds[0], types.NoneType in kinds
    if value is None and may_be_none:
        return None
    or_none = " or None" if may_be_none else ""
    if kind is bool:
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name} is {value!r}; expected true or false{or_none}")
        return bool(value)
    if kind is dict:
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{name} is {value!r}; expected fields with values")
        return dict(value or {})
    if kind is list:
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InputError(f"{name} is {value!r}; expected a list of steps")
        return sorted({_plain_integer(name, step, "") for step in value})
    if kind is str:
        return _plain_text(name, value, or_none, may_be_path=Path in kinds)
    if kind is int:
        return _plain_integer(name, value, or_none)
    number = _number(value)
    if number < 0:
        raise InputError(f"{name} is {value!r}; expected a number of at least 0")
    return number


def _plain_text(name: str, value: Any, or_none: str, *, may_be_path: bool) -> str:
    if isinstance(value, os.PathLike) and may_be_path:
        value = os.fspath(value)
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r}; expected {'a path' if may_be_path else 'a name'}{or_none}")
    if "\0" in value:
        raise InputError(f"{name} is {value!r}; expected a text without NUL characters")
    return str(local_path(value)) if may_be_path and value.startswith("~") else value


def _number(value: Any) -> float:
    """Return a finite number as a float, -1 for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return -1.0
    number = float(value)
    return number if math.isfinite(number) else -1.0


def _plain_integer(name: str, value: Any, or_none: str) -> int:
    minimum = _MINIMUMS.get(name, 0)
    try:
        number = minimum - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {minimum}{or_none}")
    return number


def _listed(data: Any) -> list[Any]:
    """Return data as a list of entries; a single entry may come without a list."""
    if isinstance(data, str | os.PathLike | Mapping | DataSpec):
        return [data]
    if isinstance(data, list | tuple | np.ndarray):
        data = list(data)
        if data and all(isinstance(item, Mapping) and "query" in item for item in data):
            raise InputError(
                "data is a list of rows; expected files or folders, or rows as one entry: data=[DataSpec(rows)]"
            )
        return data
    if isinstance(data, Iterable):
        # one entry of rows, such as a datasets.Dataset
        return [DataSpec(data)]
    raise InputError(f"data is {data!r}; expected files or folders")


def _spec(item: Any, data_dir: Path) -> DataSpec:
    if isinstance(item, str | os.PathLike):
        item = _parse_weight(os.fspath(item), data_dir)
    elif isinstance(item, Mapping):
        known = [entry.name for entry in dataclasses.fields(DataSpec)]
        if "source" not in item or not set(item) <= set(known):
            raise InputError(
                f"data entry {dict(item)} cannot be used; expected {', '.join(known)}, of which source is required"
            )
        item = DataSpec(**item)
    elif not isinstance(item, DataSpec):
        if not isinstance(item, Iterable) or isinstance(item, bytes):
            raise InputError(f"data entry {item!r} is a {type(item).__name__}; expected a path, rows or a mapping")
        item = DataSpec(item)
    source, weight = item.source, item.weight
    if isinstance(source, str | os.PathLike):
        source = _joined(data_dir, os.fspath(source))
    elif isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise InputError(f"source of data is {source!r}; expected a path or rows")
    elif isinstance(source, Iterator):
        # an iterator can be read once, but rows are read twice: for class names, and for examples
        source = list(source)
    named = source if isinstance(source, Path) else item.name or "rows"
    if _number(weight) <= 0:
        raise InputError(f"weight of {named} is {weight!r}; expected a positive number")
    if item.name is not None and not isinstance(item.name, str):
        raise InputError(f"name of {named} is {item.name!r}; expected a text")
    if item.task is not None and item.task not in TASKS:
        raise InputError(f"task of {named} is {item.task!r}; expected one of {', '.join(TASKS)}")
    return DataSpec(source, float(weight), item.task, item.name)


def _parse_weight(text: str, data_dir: Path) -> DataSpec:
    """Read ``path`` or ``path=weight``; if the whole text is the path of a file, it has no weight."""
    if "=" not in text or _joined(data_dir, text).exists():
        return DataSpec(text)
    path, _, weight = text.rpartition("=")
    if not path or Path(weight).suffix in _SUFFIXES or "/" in weight:
        # the "=" is part of the path, as in partitioned folders (year=2024/...)
        return DataSpec(text)
    try:
        return DataSpec(path, float(weight))
    except ValueError as error:
        raise InputError(f"weight of {path} is {weight!r}; expected a number") from error


_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".gz")


def _joined(data_dir: Path, text: str) -> Path:
    if not text or "\0" in text:
        raise InputError(f"data is {text!r}; expected a path")
    return data_dir / local_path(text)


def _numbered(name: str) -> Iterator[str]:
    """Yield NAME, NAME-2, NAME-3 and so on."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))
