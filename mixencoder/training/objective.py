"""The training objective: the loss of a batch, with or without a teacher."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixencoder.base.engine import Engine
from mixencoder.training.losses import (
    classification_loss,
    graded_loss,
    listwise_kl,
    margin_mse,
    ranking_loss,
    similarity_loss,
)

DISTILLATIONS = ("kl", "margin-mse")


@dataclass
class Teacher:
    """A trained model whose scores are learned; every pair is scored once.

    Args:
        engine: the model, for example a cross-encoder.
        batch_size: pairs scored at once.
    """

    engine: Engine
    batch_size: int = 64
    _cache: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)

    def score(self, pairs: list[tuple[str, str]], head: str) -> Tensor:
        """Return scores (R,) or logits (R, num_labels) on the teacher's device, float32."""
        missing = list(dict.fromkeys(pair for pair in pairs if (head, *pair) not in self._cache))
        if missing:
            scores = self.engine.predict(
                missing, head=head, batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
            )
            # copied, as autograd cannot use tensors made in inference mode
            self._cache.update(
                {(head, *pair): score for pair, score in zip(missing, scores.clone().unbind(), strict=True)}
            )
        return torch.stack([self._cache[head, *pair] for pair in pairs])


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Args:
        interaction_loss_weight: weight of the ranking losses on ``h . e`` alone, if there is a dual term.
        teacher: model whose scores are learned along with the labels; None for labels alone.
        distillation: loss on the teacher's scores, one of `DISTILLATIONS`; class logits always use "kl".
        distillation_weight: weight of the teacher's loss; that of the labels' loss is 1 minus it.
        temperature: temperature of "kl".
        mini_batch_size: GradCache chunk size, in texts (see `MixEncoderModel.forward`).
    """

    interaction_loss_weight: float = 0.5
    teacher: Teacher | None = None
    distillation: str = "kl"
    distillation_weight: float = 0.5
    temperature: float = 1.0
    mini_batch_size: int | None = None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the loss and the scores or logits of a batch, as `Collator` makes it."""
        task = batch["task"]
        head = "classification" if task == "classification" else "ranking"
        inputs = {name: value for name, value in batch.items() if name.startswith(("query_", "document_"))}
        out = model(
            **inputs,
            candidates_per_query=batch["candidates_per_query"],
            head=head,
            mini_batch_size=self.mini_batch_size,
        )
        if head == "classification":
            logits = out.squeeze(1)
            return self._classify(logits, batch), logits
        loss = self._rank(out.full, batch)
        if out.dual is not None and task in ("ranking", "graded"):
            loss = loss + self.interaction_loss_weight * self._rank(out.interaction, batch)
        return loss, out.full

    def _rank(self, scores: Tensor, batch: dict[str, Any]) -> Tensor:
        task, targets = batch["task"], batch["targets"]
        if task == "similarity":
            return similarity_loss(scores.squeeze(1), targets)
        compute = ranking_loss if task == "ranking" else graded_loss
        loss = compute(scores, targets, batch["excluded"])
        if self.teacher is None:
            return loss
        lists, excluded = batch["lists"], batch["lists_excluded"]
        wanted = self._teach(self.teacher, batch, scores.device)
        found = scores.gather(1, lists)
        if self.distillation == "kl":
            taught = listwise_kl(found, wanted, excluded, self.temperature)
        else:
            taught = margin_mse(found, wanted, excluded)
        return (1 - self.distillation_weight) * loss + self.distillation_weight * taught

    def _teach(self, teacher: Teacher, batch: dict[str, Any], device: torch.device) -> Tensor:
        """Return the teacher's scores (B, c) of the batch's lists."""
        lists, count = batch["lists"], batch["candidates_per_query"]
        # if every query has its own documents, these come list by list
        columns = lists if count is None else lists + count * torch.arange(len(lists), device=lists.device).unsqueeze(1)
        pairs = [
            (query, batch["documents"][column])
            for query, row in zip(batch["queries"], columns.tolist(), strict=True)
            for column in row
        ]
        return teacher.score(pairs, "ranking").to(device).view(lists.shape)

    def _classify(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        loss = classification_loss(logits, batch["targets"])
        if self.teacher is None:
            return loss
        wanted = self.teacher.score(list(zip(batch["queries"], batch["documents"], strict=True)), "classification")
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        taught = listwise_kl(logits, wanted.to(logits.device), excluded, self.temperature)
        return (1 - self.distillation_weight) * loss + self.distillation_weight * taught
