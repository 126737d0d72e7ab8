"""Copies of a model that a run saves on its way, beside its output."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mixencoder.base.checkpoints.checkpoint import save
from mixencoder.base.engine import Engine
from mixencoder.durable import is_vacant
from mixencoder.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def snapshot_path(output: Path, step: int) -> Path:
    """Return where a run saves its model after a step."""
    return output.with_name(f"{output.name}.step-{step}")


def check_snapshots(output: Path, steps: list[int], last: int, *, resume: bool) -> None:
    """Raise if snapshots cannot be written.

    Args:
        output: directory for the trained model.
        steps: after which the model is saved.
        last: the run's last step.
        resume: whether an earlier run may have written some of them.

    Raises:
        InputError: a step comes after the last one, or a folder is in the way.
    """
    if steps and steps[-1] > last:
        raise InputError(f"snapshots are saved after steps {steps}, but the run ends at step {last}")
    for step in steps:
        path = snapshot_path(output, step)
        if not resume and not is_vacant(path):
            raise InputError(f"{path} exists and is not empty; name another output, or move it away")


class Snapshots(TrainerCallback):
    """Saves the model after some steps, from the first process.

    Args:
        engine: over the model that is trained.
        output: directory for the trained model.
        steps: after which it is saved.
    """

    def __init__(self, engine: Engine, output: Path, steps: list[int]) -> None:
        self._engine, self._output, self._steps = engine, output, set(steps)

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> None:
        """Save the model if it is time.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if state.global_step in self._steps and state.is_world_process_zero:
            save(self._engine.model, self._engine.tokenizer, snapshot_path(self._output, state.global_step))
