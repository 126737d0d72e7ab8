"""How models are built from a folder: sizes checked first, quietly, and with every failure a `CheckpointError`."""

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

_bars = threading.RLock()


@contextmanager
def failures_named(name_or_path: str | Path) -> Generator[None]:
    """Turn whatever a stranger's files make libraries raise into one line that names the checkpoint.

    Raises:
        CheckpointError: something was raised that is no error of this library.
    """
    try:
        yield
    except MixEncoderError:
        raise
    # a damaged or hostile file ends in errors of any class, deep inside of transformers, tokenizers and torch
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if not reason or not isinstance(error, ValueError | OSError | RuntimeError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise CheckpointError(f"{name_or_path} cannot be loaded: {reason}") from error


@contextmanager
def quiet_bars() -> Generator[None]:
    """Show no progress bars of transformers and the hub, unless this library's own are shown; then as it was before."""
    if logger.getEffectiveLevel() <= logging.INFO:
        yield
        return
    with _bars:
        shows, shows_hub = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        if shows:
            transformers_logging.disable_progress_bar()
        if shows_hub:
            disable_progress_bars()
        try:
            yield
        finally:
            if shows:
                transformers_logging.enable_progress_bar()
                # the line above switches on the hub's too
                if not shows_hub:
                    disable_progress_bars()
            if shows_hub:
                enable_progress_bars()


def load_weights(
    folder: Path,
    files: WeightFiles,
    config: PreTrainedConfig,
    build: Callable[[Any], PreTrainedModel],
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """Load a model whose weights are all in a folder's files.

    Args:
        folder: names the checkpoint.
        files: the weights.
        config: of the model.
        build: makes the model; called without taking memory, to see what it asks for.
        dtype: of the loaded weights.
        options: of the model's class.

    Raises:
        CheckpointError: weights are missing, of another shape, left over or not finite.
    """
    encoder = getattr(config, "backbone_config", config)
    # layers in groups share their weights
    count = getattr(encoder, "num_hidden_groups", encoder.num_hidden_layers)
    if count > len(files):
        raise CheckpointError(f"{folder} holds {len(files):,} weights, but its config.json asks for {count:,} layers")
    with torch.device("meta"):
        empty = build(config)
    state = files.read({name: tensor.shape for name, tensor in empty.state_dict().items()})
    with quiet_bars():
        # no path, so that nothing in the folder is looked for beyond what was read above
        model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    check_finite_weights(model, folder)
    return model


def check_sizes(encoder: PreTrainedConfig, folder: Path) -> None:
    """Check of an encoder's sizes what transformers leaves to fail at the first text, or not at all.

    Raises:
        CheckpointError: a size is no positive integer, or sizes do not fit each other.
    """
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        value = getattr(encoder, name, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{folder} has {name} {value!r} in its config.json; expected a positive integer")
    if encoder.hidden_size % encoder.num_attention_heads:
        raise CheckpointError(
            f"{folder} has hidden_size {encoder.hidden_size} and num_attention_heads {encoder.num_attention_heads} in "
            "its config.json; expected heads that divide it"
        )
    if getattr(encoder, "is_decoder", False):
        raise CheckpointError(f"{folder} is a decoder by its config.json (is_decoder); expected an encoder")
    if max_positions(encoder) < MIN_TOKENS:
        raise CheckpointError(
            f"{folder} has positions for {max_positions(encoder)} tokens by its config.json; expected at least "
            f"{MIN_TOKENS}"
        )
