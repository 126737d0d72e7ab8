"""transformers' Trainer with this package's batches, loss and learning rates, and with crash-safe checkpoints."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mixencoder.data.sources import Source
from mixencoder.durable import sync_files, sync_folder
from mixencoder.errors import CheckpointError, MissingExtraError, NonFiniteError
from mixencoder.training.batches import SourceBatchSampler
from mixencoder.training.folders import COMPLETE, checkpoints, last_checkpoint
from mixencoder.training.objective import Objective

try:
    from accelerate import PartialState
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise MissingExtraError(f"training needs the extra: pip install 'mixencoder[train]' ({error})") from error

__all__ = ["ObjectiveTrainer", "PartialState", "TrainingArguments"]

_SHOWN = 8
"""Most rows of a batch that a message names."""


class ObjectiveTrainer(Trainer):
    """Trains any of the architectures on batches that each come from one source.

    Args:
        sources: the data, in the order of the dataset.
        objective: computes the loss of a batch.
        head_learning_rate: peak rate of everything on top of the backbone.
        options: arguments of transformers' Trainer.
    """

    def __init__(
        self, *, sources: list[Source], objective: Objective, head_learning_rate: float, **options: Any
    ) -> None:
        super().__init__(**options)
        # losses are means over a batch, so transformers must average them over accumulated batches
        self.model_accepts_loss_kwargs = False
        self.train_sources = sources
        self._objective = objective
        self._head_learning_rate = head_learning_rate
        self._rows: list[str] = []

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this process."""
        sampler = SourceBatchSampler(
            self.train_sources,
            batch_size=self.args.per_device_train_batch_size,
            steps=self.args.max_steps * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            process=self.args.process_index,
            processes=self.args.world_size,
        )
        assert self.train_dataset is not None, "training has a dataset"
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with two rates; biases, norms and single vectors are not decayed."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        trained = self.model if model is None else model
        assert trained is not None, "training has a model"
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                in_backbone = name.removeprefix("module.").startswith("backbone.")
                rate = self.args.learning_rate if in_backbone else self._head_learning_rate
                decay = self.args.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
            fused=True,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of a batch; with return_outputs also the scores.

        Raises:
            NonFiniteError: the loss is NaN or infinite; the message names the step and the batch's rows.
        """
        # PyTorch drops autocast's casts of weights when the outermost autocast ends. Inside one of the caller's, a step
        # would compute with the weights of an earlier one
        torch.clear_autocast_cache()
        loss, scores = self._objective(model, inputs)
        self._rows += inputs["where"]
        if not torch.isfinite(loss):
            raise self._non_finite(f"the loss is {loss.item()}", inputs["task"], inputs["where"])
        return (loss, scores) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Return the gradient's norm; raise if it is not finite, as the step would make all weights NaN.

        Raises:
            NonFiniteError: the message names the step and the rows of its batches.
        """
        norm, rows = super()._get_grad_norm(model, grad_norm=grad_norm), self._rows
        self._rows = []
        if norm is not None and not math.isfinite(norm):
            raise self._non_finite(f"the gradient's norm is {float(norm)}", "its loss is finite", rows)
        return norm

    def _non_finite(self, found: str, detail: str, rows: list[str]) -> NonFiniteError:
        shown = "; ".join(rows[:_SHOWN]) + (f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        return NonFiniteError(
            f"{found} at step {self.state.global_step} ({detail}); the batch holds {shown}; nothing more is saved. "
            "A lower learning_rate, or float32 instead of bf16, may help"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; remove the earlier ones once it is complete and on the disk.

        Raises:
            CheckpointError: it cannot be written; the one before it stays.
        """
        assert self.args.output_dir is not None, "TrainingArguments fills it in"
        folder = Path(self.args.output_dir)
        written = folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sync_files(written)
                (written / COMPLETE).touch()
                # the mark must be on the disk before earlier checkpoints are removed
                sync_folder(written)
                sync_folder(folder)
                for other in checkpoints(folder):
                    if other != written:
                        shutil.rmtree(other)
        except (OSError, SafetensorError) as error:
            kept = last_checkpoint(folder)
            left = f"{kept} is complete, and resume continues from it" if kept else "there was none before it"
            raise CheckpointError(f"{written} cannot be written: {error}; {left}") from error
        self.accelerator.wait_for_everyone()
