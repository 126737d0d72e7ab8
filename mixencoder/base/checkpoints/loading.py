"""Build models from a folder: sizes are checked first, and every failure becomes a `CheckpointError`."""

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mixencoder.base.backbones import max_positions
from mixencoder.base.checkpoints.weight_files import WeightFiles, check_finite_weights
from mixencoder.base.configuration import MIN_TOKENS
from mixencoder.errors import CheckpointError, MixEncoderError
from mixencoder.progress import logger

_bars_lock = threading.RLock()


@contextmanager
def as_checkpoint_errors(name_or_path: str | Path) -> Generator[None]:
    """Turn errors of other libraries into a `CheckpointError` of one line that names the checkpoint.

    Raises:
        CheckpointError: an error was raised that is not a `MixEncoderError`.
    """
    try:
        yield
    except MixEncoderError:
        raise
    # a damaged or hostile file may cause errors of any class in transformers, tokenizers and torch
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if not reason or not isinstance(error, ValueError | OSError | RuntimeError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise CheckpointError(f"{name_or_path} cannot be loaded: {reason}") from error


@contextmanager
def hidden_progress_bars() -> Generator[None]:
    """Hide the progress bars of transformers and the hub meanwhile, unless this library shows its own."""
    if logger.getEffectiveLevel() <= logging.INFO:
        yield
        return
    with _bars_lock:
        shown, hub_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        if shown:
            transformers_logging.disable_progress_bar()
        if hub_shown:
            disable_progress_bars()
        try:
            yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
                # the line above turns on those of the hub too
                if not hub_shown:
                    disable_progress_bars()
            if hub_shown:
                enable_progress_bars()


def load_weights(
    folder: Path,
    files: WeightFiles,
    config: PreTrainedConfig,
    build: Callable[[Any], PreTrainedModel],
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """Load a model; a folder's files must hold all of its weights.

    Args:
        folder: of the checkpoint, for messages.
        files: the weight files.
        config: of the model.
        build: builds the model from its configuration; called on the meta device, to list the weights it expects.
        dtype: of the loaded weights.
        options: for the constructor of the model's class.

    Raises:
        CheckpointError: weights are missing, have another shape, are left over or are not finite.
    """
    encoder = getattr(config, "backbone_config", config)
    # ALBERT's layers share weights by groups
    count = getattr(encoder, "num_hidden_groups", encoder.num_hidden_layers)
    if count > len(files):
        raise CheckpointError(f"{folder} holds {len(files):,} weights, but its config.json asks for {count:,} layers")
    with torch.device("meta"):
        empty = build(config)
    state = files.read({name: tensor.shape for name, tensor in empty.state_dict().items()})
    with hidden_progress_bars():
        # without a path, so that transformers reads nothing else in the folder
        model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    check_finite_weights(model, folder)
    return model


def check_sizes(encoder: PreTrainedConfig, folder: Path) -> None:
    """Check an encoder's sizes, which transformers does not check before the first text or at all.

    Raises:
        CheckpointError: a size is not a positive integer, sizes do not fit each other, or it is a decoder.
    """
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        value = getattr(encoder, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{folder} has {name} {value!r} in its config.json; expected a positive integer")
    if encoder.hidden_size % encoder.num_attention_heads:
        raise CheckpointError(
            f"{folder} has hidden_size {encoder.hidden_size} and num_attention_heads {encoder.num_attention_heads} in "
            "its config.json; expected num_attention_heads to divide hidden_size"
        )
    if getattr(encoder, "is_decoder", False):
        raise CheckpointError(f"{folder} is a decoder according to its config.json (is_decoder); expected an encoder")
    if max_positions(encoder) < MIN_TOKENS:
        raise CheckpointError(
            f"{folder} has positions for {max_positions(encoder)} tokens according to its config.json; expected at "
            f"least {MIN_TOKENS}"
        )
