"""Describe where figures come from, to reproduce them: model, data, machine and versions, without local paths."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from mixencoder import __version__
from mixencoder.base.checkpoints.locations import model_folder
from mixencoder.base.engine import Engine
from mixencoder.base.inputs import local_path
from mixencoder.bundled import default_checkpoint
from mixencoder.evaluation import bootstrap
from mixencoder.evaluation.evaluator import Evaluation
from mixencoder.evaluation.tasks import RankingTask, Task

_PACKAGES = ("torch", "transformers", "numpy", "scipy", "ir_measures", "scikit-learn")


def report(found: Mapping[str, Evaluation], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's figures and provenance, for JSON.

    "results" holds {task: {part of the score: {measure: value}}}, "intervals" the same with [low, high] or null.
    """
    return {
        "provenance": dict(provenance),
        "results": _figures(found, "value"),
        "intervals": _figures(found, "interval"),
    }


def describe(
    engine: Engine,
    name_or_path: str | Path | None,
    tasks: Sequence[Task],
    *,
    untrained: bool,
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the provenance of an evaluation.

    Args:
        engine: the model.
        name_or_path: the model's checkpoint, or its encoder's if it is untrained; None for the default model.
        tasks: the tasks that were measured.
        untrained: whether the model was made from an encoder without training.
        seed: seed of the bootstrap.
        options: further fields, such as limits.
    """
    device = engine.device
    return {
        "model": "bundled default" if name_or_path is None else _public_name(name_or_path),
        "architecture": engine.config.model_type.removeprefix("mixencoder-"),
        "untrained": untrained,
        "weights_sha256": _weight_hashes(default_checkpoint() if name_or_path is None else name_or_path),
        "queries": {task.name: len(task) for task in tasks},
        "without_right_document": {
            task.name: task.without_right_document for task in tasks if isinstance(task, RankingTask)
        },
        "files": {task.name: {path.name: _sha256(path) for path in task.files} for task in tasks},
        "max_query_length": engine.read_query.max_length,
        "max_document_length": engine.read_document.max_length,
        **options,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "bootstrap": {"seed": seed, "resamples": bootstrap.RESAMPLES, "level": bootstrap.LEVEL},
        "versions": {
            "mixencoder": __version__,
            "python": sys.version.split()[0],
            **{package: version(package) for package in _PACKAGES if _is_installed(package)},
        },
        "commit": _commit(),
    }


def _figures(found: Mapping[str, Evaluation], field: str) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        task: {
            score: {measure: getattr(figure, field) for measure, figure in figures.items()}
            for score, figures in evaluation.figures.items()
        }
        for task, evaluation in found.items()
    }


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _public_name(name_or_path: str | Path) -> str:
    path = local_path(name_or_path)
    return path.resolve().name if path.is_dir() else str(name_or_path)


def _weight_hashes(name_or_path: str | Path) -> dict[str, str]:
    """Return {file: sha256} of the weights in a directory, or of a hub id in the cache; empty if it is not cached."""
    if not local_path(name_or_path).is_dir():
        cached = try_to_load_from_cache(str(name_or_path), "config.json")
        if not isinstance(cached, str):
            return {}
        name_or_path = Path(cached).parent
    return {file.name: _sha256(file) for file in sorted(model_folder(name_or_path).glob("*.safetensors"))}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cpu() -> str:
    return f"cpu with {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """Return the git commit of this package, with -dirty after changes; None if it is not in a checkout of its own."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1]), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # a virtual environment may lie inside a checkout of something else
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
