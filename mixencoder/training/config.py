"""What `train` is told: the fields of a run, checked and brought to plain types, and where its data lie."""

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
    """Of `mixencoder.data.examples.TASKS`; None reads it off the data."""
    name: str | None = None
    """What to call it; None takes the file's name."""


@dataclass(frozen=True)
class TrainConfig:
    """What `mixencoder train` needs; the fields of its YAML file and its flags."""

    output: str | Path
    """Directory for the trained model; must not hold one yet. Until the end ``OUTPUT.unfinished`` holds checkpoints."""
    data: Any = field(default_factory=list)
    """Files and BEIR folders, one or a list: a path, ``path=weight``, rows, a `DataSpec`, or a mapping with ``source``
    and fields of `DataSpec`."""
    data_dir: str | Path = ""
    """Folder that relative data paths start from."""
    architecture: str | None = None
    """Of `mixencoder.architectures.ARCHITECTURES`; None is that of `model`, or mixencoder."""
    model: str | Path | None = None
    """A trained model to go on from: a directory, a hub id, or "bundled". It gets a head that the data need and it
    lacks; all other weights go on as they are."""
    backbone: str | Path | None = None
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
    """Peak rate of the backbone."""
    head_learning_rate: float = 2e-4
    """Peak rate of everything on top of the backbone."""
    schedule: str = "linear"
    """How learning rates fall, of `SCHEDULES`. "linear": warm up over the first tenth, then fall to zero at the last
    step. "stable": warm up over the first tenth, at most 100 steps, stay at the peak, and fall to zero over the last
    tenth, so that `snapshots` are points of one learning curve."""
    interaction_loss_weight: float = 0.5
    """MixEncoder with the dual term: weight of the same ranking loss on ``h . e`` alone. The dual term starts so good
    that without it the interaction learns next to nothing (docs/training.md)."""
    teacher: str | Path | None = None
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
    on_empty: str = "special"
    """What becomes of texts in which the tokenizer finds no token: "special" reads its special tokens alone and says
    how many there are, "error" refuses the data. Rankings without a query or a right document are left out before."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False
    """Autocast to bfloat16; pays off where the processor has it."""
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    """Steps between checkpoints, from which an interrupted run can go on."""
    snapshots: list[int] = field(default_factory=list)
    """Steps after which the model is saved, too, beside the output: as ``OUTPUT.step-N``."""
    resume: bool = False
    """Go on from the last checkpoint of ``OUTPUT.unfinished``, with the weights of a run that was never interrupted."""


def checked(config: TrainConfig) -> TrainConfig:
    """Return a configuration with every field of its plain type: strings for paths, ints for numpy's, a list of data.

    Raises:
        DataError: no data was named.
        InputError: a field cannot be used; the message names it, what was found and what was expected.
    """
    plain = {name: _plain(name, getattr(config, name), kind) for name, kind in _kinds().items() if name != "data"}
    config = TrainConfig(**plain, data=_listed(config.data))
    if not config.output:
        raise InputError("output is empty; expected a directory for the trained model")
    if config.model is not None and config.backbone is not None:
        raise InputError("expected either a model to go on from or a backbone to start from, not both")
    if config.model is not None and not set(config.config) <= set(CLASS_FIELDS):
        raise InputError(
            f"config is {config.config}, but a model to go on from has its own; expected nothing but the classes of a "
            f"head that it is to get ({', '.join(CLASS_FIELDS)})"
        )
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) is not None and value not in choices:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    if config.distillation_weight > 1:
        raise InputError(f"distillation_weight is {config.distillation_weight}; expected a number from 0 to 1")
    if config.temperature == 0:
        raise InputError(f"temperature is {config.temperature}; expected a positive number")
    if config.seed > _MOST_SEED:
        raise InputError(f"seed is {config.seed}; expected an integer of at most {_MOST_SEED}")
    if not config.data:
        raise DataError("no training data was named; expected files in one of the shapes of docs/training.md")
    return config


def data_specs(config: TrainConfig) -> list[DataSpec]:
    """Return a checked configuration's sources of data, their paths complete, under names that differ.

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
        # files of one name in two folders, which the record tells apart
        found = next(candidate for candidate in _numbered(name) if candidate not in names)
        names.add(found)
        specs.append(dataclasses.replace(spec, name=found))
    return specs


_LEAST = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "graded_list": 2, "log_every": 1}
_LEAST |= {"save_every": 1, "snapshots": 1, "mini_batch_size": 1, "max_query_tokens": 3, "max_document_tokens": 3}
_MOST_SEED = 2**32 - 1
"""NumPy takes no larger one."""
_CHOICES = {"architecture": tuple(ARCHITECTURES), "distillation": DISTILLATIONS, "on_empty": ON_EMPTY}
_CHOICES |= {"schedule": SCHEDULES}


def _kinds() -> dict[str, tuple[Any, ...]]:
    """Return which types each field may have."""
    kinds = {}
    for entry in dataclasses.fields(TrainConfig):
        is_union = isinstance(entry.type, types.UnionType)
        kinds[entry.name] = typing.get_args(entry.type) if is_union else (typing.get_origin(entry.type) or entry.type,)
    return kinds


def _plain(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return a field's value as the first of its types, None where it may be None."""
    kind, may_be_none = kinds[0], types.NoneType in kinds
    if value is None and may_be_none:
        return None
    beside = " or None" if may_be_none else ""
    if kind is bool:
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name} is {value!r}; expected true or false{beside}")
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
        return _plain_text(name, value, beside, may_be_path=Path in kinds)
    if kind is int:
        return _plain_integer(name, value, beside)
    number = _number(value)
    if number < 0:
        raise InputError(f"{name} is {value!r}; expected a number of at least 0")
    return number


def _plain_text(name: str, value: Any, beside: str, *, may_be_path: bool) -> str:
    if isinstance(value, os.PathLike) and may_be_path:
        value = os.fspath(value)
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r}; expected {'a path' if may_be_path else 'a name'}{beside}")
    if "\0" in value:
        raise InputError(f"{name} is {value!r}; expected no zero character in it")
    return str(local_path(value)) if may_be_path and value.startswith("~") else value


def _number(value: Any) -> float:
    """Return a finite number as a float, -1 for what is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return -1.0
    number = float(value)
    return number if math.isfinite(number) else -1.0


def _plain_integer(name: str, value: Any, beside: str) -> int:
    least = _LEAST.get(name, 0)
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{name} is {value!r}; expected an integer of at least {least}{beside}")
    return number


def _listed(data: Any) -> list[Any]:
    """Return the entries of data, which may be one without a list around it."""
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
        # rows themselves, such as a datasets.Dataset
        return [DataSpec(data)]
    raise InputError(f"data is {data!r}; expected files or folders")


def _spec(item: Any, data_dir: Path) -> DataSpec:
    if isinstance(item, str | os.PathLike):
        item = _weighed(os.fspath(item), data_dir)
    elif isinstance(item, Mapping):
        known = [entry.name for entry in dataclasses.fields(DataSpec)]
        if "source" not in item or not set(item) <= set(known):
            raise InputError(f"data entry {dict(item)} cannot be used; expected {', '.join(known)}, source at least")
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
        # rows are read twice: for the names of classes, and for the examples
        source = list(source)
    named = source if isinstance(source, Path) else item.name or "rows"
    if _number(weight) <= 0:
        raise InputError(f"weight of {named} is {weight!r}; expected a positive number")
    if item.name is not None and not isinstance(item.name, str):
        raise InputError(f"name of {named} is {item.name!r}; expected a text")
    if item.task is not None and item.task not in TASKS:
        raise InputError(f"task of {named} is {item.task!r}; expected one of {', '.join(TASKS)}")
    return DataSpec(source, float(weight), item.task, item.name)


def _weighed(text: str, data_dir: Path) -> DataSpec:
    """Read ``path`` or ``path=weight``; a path that exists is one, whatever stands in it."""
    if "=" not in text or _joined(data_dir, text).exists():
        return DataSpec(text)
    path, _, weight = text.rpartition("=")
    if not path or Path(weight).suffix in _SUFFIXES or "/" in weight:
        # what follows is part of a name, as in folders by partition
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
    """Yield a name, then the same with 2, 3 and so on behind it."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))
