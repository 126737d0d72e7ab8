"""One cell of the comparison: a contender trained on a task and measured, with its record."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.comparison.lists import write_long_lists
from benchmarks.comparison.settings import (
    ABLATED,
    ABLATIONS,
    CONTENDERS,
    JOINT_NEGATIVES,
    LONG,
    LONG_CANDIDATES,
    LONG_SOURCE,
    READ_JOINTLY,
    SAMPLE_SEED,
    SETTINGS,
    TASKS,
    TRAINING,
    ComparedTask,
    Contender,
    Report,
    Setting,
)
from mixencoder.architectures import load_engine
from mixencoder.base.engine import Engine
from mixencoder.errors import InputError
from mixencoder.evaluation import evaluate, read_tasks
from mixencoder.evaluation.files import write_text
from mixencoder.evaluation.provenance import describe, report
from mixencoder.evaluation.tasks import Task
from mixencoder.training.run import RECORD, TrainConfig, train


class Paths(NamedTuple):
    """Paths of data, backbone and work folder."""

    data: Path
    """The public data."""
    backbone: Path
    """The encoder that all contenders start from."""
    work: Path
    """Trained models and generated lists."""

    def model(self, setting: str, task: str, name: str, seed: int) -> Path:
        """Return the folder of a trained contender."""
        return self.work / setting / task / f"{name}.{seed}"


class Cell(NamedTuple):
    """A contender, a task and a seed: one record."""

    task: str
    name: str
    """Name of the contender or ablation."""
    contender: Contender
    seed: int
    long_lists: bool = True
    """Whether to measure on the long lists too."""

    @property
    def file_name(self) -> str:
        """File name of the record."""
        return f"{self.task}.{self.name}.{self.seed}.json"

    def learns_from(self, other: "Cell") -> bool:
        """Whether another cell trains this one's teacher."""
        return (other.task, other.name, other.seed) == (self.task, self.contender.teacher, self.seed)


def wanted_cells(what: str, setting: str, contenders: list[str] | None = None) -> list[Cell]:
    """Return the cells of a task, of all, or of the ablations."""
    ablations = what == "ablations"
    known = ABLATIONS if ablations else CONTENDERS
    tasks = [ABLATED] if ablations else list(TASKS) if what == "all" else [what]
    names = contenders or [name for name in known if ablations or SETTINGS[setting].students or not known[name].teacher]
    return [
        Cell(task, name, known[name], seed, long_lists=not ablations)
        for task in tasks
        for seed in SETTINGS[setting].seeds
        for name in names
    ]


def run_cell(cell: Cell, setting: str, paths: Paths) -> dict[str, Any]:
    """Train, measure and return the record. A model that an earlier run trained is only measured.

    Raises:
        InputError: the contender's teacher is not trained yet.
    """
    task, name, contender, seed, long_lists = cell
    compared, scale = TASKS[task], SETTINGS[setting]
    output = paths.model(setting, task, name, seed)
    training = _training(compared, contender, setting)
    start = time.perf_counter()
    if not (output / RECORD).is_file():
        teacher = contender.teacher and paths.model(setting, task, contender.teacher, seed)
        if teacher and not (teacher / RECORD).is_file():
            raise InputError(f"{name} learns from {contender.teacher}, expected at {teacher}; run that first")
        config = TrainConfig(
            output=str(output),
            data=list(compared.train),
            data_dir=str(paths.data),
            architecture=contender.architecture,
            backbone=str(paths.backbone),
            config={"query_truncation_side": "left", **contender.config},
            teacher=teacher and str(teacher),
            seed=seed,
            resume=True,
            **training,
        )
        train(config)
    trained = time.perf_counter()
    engine = load_limited(output, training)
    found = {}
    for entry in compared.reports:
        if entry.path == LONG and not long_lists:
            continue
        found |= measure(engine, output, entry, scale, paths)
    return {
        "task": task,
        "contender": name,
        "setting": setting,
        "seed": seed,
        "training": json.loads((output / RECORD).read_text(encoding="utf-8")),
        "threads": torch.get_num_threads(),
        "seconds": {"train": trained - start, "measure": time.perf_counter() - trained},
        "reports": found,
    }


def make_record(cell: Cell, setting: str, paths: Paths, folder: Path) -> dict[str, Any]:
    """Run a cell, write its record into a folder and return it."""
    record = run_cell(cell, setting, paths)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / cell.file_name, json.dumps(record, indent=1) + "\n")
    return record


def _training(compared: ComparedTask, contender: Contender, setting: str) -> dict[str, Any]:
    """Return the fields of `TrainConfig` for a contender on a task."""
    fields = {
        **TRAINING,
        "steps": compared.steps[setting],
        "batch_size": compared.batch_size * SETTINGS[setting].batch_factor,
    }
    fields["learning_rate"] = compared.learning_rate
    fields["bf16"] = SETTINGS[setting].bf16
    if contender.architecture in READ_JOINTLY:
        fields["negatives"] = JOINT_NEGATIVES
    return {**fields, **contender.training}


def load_limited(model: Path, training: dict[str, Any]) -> Engine:
    """Load a trained model, which reads texts up to the lengths that it was trained with."""
    engine = load_engine(model)
    return engine.with_limits(
        max_query_length=min(training["max_query_tokens"], engine.read_query.max_length),
        max_document_length=min(training["max_document_tokens"], engine.read_document.max_length),
    )


def measure(engine: Engine, model: Path, entry: Report, scale: Setting, paths: Paths) -> dict[str, Any]:
    """Return {task name: figures with provenance} of one report."""
    path = paths.data / entry.path
    limit = scale.queries
    if entry.path == LONG:
        path = paths.work / LONG
        if not path.is_file():
            write_long_lists(paths.data / LONG_SOURCE, path, LONG_CANDIDATES, SAMPLE_SEED)
        if engine.reads_jointly:
            limit = scale.joint_long_queries
    if entry.measure == "accuracy":
        limit = scale.pairs
    label2id = engine.config.label2id if "classification" in engine.config.heads else None
    options = {} if limit is None else {"limit": limit, "sample": SAMPLE_SEED}
    tasks: list[Task] = read_tasks([path], label2id=label2id, **options)
    scores = ("full",)
    if tasks[0].kind == "ranking":
        scores = tuple(term for term in engine.score_terms if term != "dual" or engine.config.dual_term)
    start = time.perf_counter()
    found = evaluate(engine, tasks, scores=scores, batch_size=scale.measured_at_once, show_progress_bar=False)
    seconds = time.perf_counter() - start
    provenance = describe(engine, model, tasks, untrained=False, seed=0, options=options)
    return {tasks[0].name: {"measure": entry.measure, "seconds": seconds, **report(found, provenance)}}
