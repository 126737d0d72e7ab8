"""sentence-transformers: `AsCrossEncoder` gives an engine the methods of its `CrossEncoder`, for its evaluators.

The library itself is not imported. Encoders that it saved are backbones as they are: `MixEncoder.from_backbone` reads
their modules and pooling (docs/checkpoints.md).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from mixencoder.base.engine import Engine
from mixencoder.base.results import Activation, RankResult
from mixencoder.errors import InputError
from mixencoder.integrations.shared import Model, engine_of


class AsCrossEncoder:
    """An engine behind the methods that sentence-transformers' evaluators call, in its order of arguments.

    Arguments about prompts, several devices and pools must be None: a MixEncoder has no prompts.

    Args:
        model: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        head: "ranking" or "classification"; None takes the configuration's default.
        activation_fn: applied to scores and logits where a call names none; None leaves them as they are, whereas a
            `CrossEncoder` of one label applies a sigmoid.
        options: device and dtype, as in `MixEncoder.from_pretrained`.

    Attributes:
        metrics: what evaluators measured, by name.
    """

    def __init__(
        self, model: Model = None, *, head: str | None = None, activation_fn: Activation | None = None, **options: Any
    ) -> None:
        self.engine: Engine = engine_of(model, **options)
        self.head = self.engine.model.check_head(head)
        self.activation_fn = activation_fn
        self.metrics: dict[str, Any] = {}

    @property
    def num_labels(self) -> int:
        """Number of classes, 1 for the ranking head."""
        return 1 if self.head == "ranking" else self.engine.config.num_classes

    @property
    def model_card_data(self) -> "AsCrossEncoder":
        """Where evaluators store what they measured: this object."""
        return self

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Store what an evaluator measured."""
        self.metrics.update(metrics)

    def predict(
        self,
        inputs: Iterable[Any],
        prompt_name: None = None,
        prompt: None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: None = None,
        pool: None = None,
        chunk_size: None = None,
    ) -> Any:
        """As `mixencoder.base.engine.Engine.predict`.

        Raises:
            InputError: an argument is not supported, or as there.
        """
        _check_none(prompt_name=prompt_name, prompt=prompt, device=device, pool=pool, chunk_size=chunk_size)
        return self.engine.predict(
            inputs,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            head=self.head,
            activation_fn=activation_fn or self.activation_fn,
            apply_softmax=bool(apply_softmax),
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
        )

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: None = None,
        prompt: None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], Any] | None = None,
        device: None = None,
        pool: None = None,
        chunk_size: None = None,
    ) -> list[RankResult]:
        """As `mixencoder.base.engine.Engine.rank`.

        Raises:
            InputError: an argument is not supported, or as there.
        """
        _check_none(prompt_name=prompt_name, prompt=prompt, device=device, pool=pool, chunk_size=chunk_size)
        return self.engine.rank(
            query,
            documents,
            top_k,
            return_documents=return_documents,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn or self.activation_fn,
        )


def _check_none(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise InputError(f"{name} is {value!r}; a MixEncoder has no such setting, expected None")
