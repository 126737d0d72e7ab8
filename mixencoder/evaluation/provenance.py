"""What stands beside figures so that they can be found again: model, data, machine, versions; no path of a machine."""

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
    """Return what is written as JSON.

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
        name_or_path: where its weights came from, those of the encoder if it is untrained; None for the default.
        tasks: measured.
        untrained: whether the model was started from an encoder.
        seed: of the bootstrap.
        options: further fields, such as limits.
    """
    device = engine.device
    return {
        "model": "bundled default" if name_or_path is None else _name(name_or_path),
        "architecture": engine.config.model_type.removeprefix("mixencoder-"),
        "untrained": untrained,
        "weights_sha256": _weights(default_checkpoint() if name_or_path is None else name_or_path),
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


def _name(name_or_path: str | Path) -> str:
    path = local_path(name_or_path)
    return path.resolve().name if path.is_dir() else str(name_or_path)


def _weights(name_or_path: str | Path) -> dict[str, str]:
    """Return {file: sha256} of the weights in a directory, or of a hub id's in the cache, none if it is not there."""
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
    """Return the commit of the checkout that this package lies in, with -dirty after changes; None outside of one."""
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
