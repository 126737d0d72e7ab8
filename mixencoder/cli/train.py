"""``mixencoder train``: a model of any architecture from data files."""

import dataclasses
import logging
import os
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mixencoder.cli.shared import say
from mixencoder.errors import DataError, InputError, MixEncoderError


def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with the fields of TrainConfig; flags win.")] = None,
    output: Annotated[str | None, typer.Option(help="Directory for the trained model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data file or BEIR folder, optionally =WEIGHT; repeat for several (docs/training.md)."),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that relative paths of --data start from.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="mixencoder, cross-encoder, dual-encoder, poly-encoder, late-interaction or deformer.",
            show_default="mixencoder",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='Trained model to continue from; "bundled" is the default one.')
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Encoder to start from.", show_default="that of the bundled checkpoint")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Field of the architecture's configuration, such as dual_term=true."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a batch in each process.")] = None,
    mini_batch_size: Annotated[
        int | None, typer.Option(help="Texts encoded at once (GradCache), to save memory.")
    ] = None,
    negatives: Annotated[int | None, typer.Option(help="Most listed negatives drawn for each query.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the backbone.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the rest.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Trained model, such as a cross-encoder, whose scores are learned too.")
    ] = None,
    distillation: Annotated[str | None, typer.Option(help="Loss on the teacher's scores: kl or margin-mse.")] = None,
    distillation_weight: Annotated[
        float | None, typer.Option(help="Weight of the teacher's loss, 0 to 1; the labels' loss gets the rest.")
    ] = None,
    freeze_encoder: Annotated[
        bool | None,
        typer.Option(
            "--freeze-encoder",
            help="Train only what is on top of the encoder (mixencoder): texts are encoded once, indexes stay valid.",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="With --freeze-encoder: an index whose ids the data name as documents.")
    ] = None,
    bf16: Annotated[bool | None, typer.Option(help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    on_empty: Annotated[
        str | None,
        typer.Option(
            help="Texts without a token: special (read special tokens alone, and warn) or error.",
            show_default="special",
        ),
    ] = None,
    resume: Annotated[bool | None, typer.Option(help="Continue an interrupted run.")] = None,
) -> None:
    """Train a model from data files, given by flags or a YAML file; torchrun runs it in several processes."""
    # before other local variables exist, so that these are only the parameters
    flags = {name: value for name, value in locals().items() if name not in ("config", "settings")}
    from mixencoder.cli.settings_file import read_settings

    prefix = "" if config is None else f"{config}: "
    fields = {} if config is None else read_settings(config)
    if settings:
        chosen = fields.get("config") or {}
        if not isinstance(chosen, Mapping):
            raise DataError(f"{prefix}config is {chosen!r}; expected fields with values")
        fields["config"] = {**chosen, **dict(map(_setting, settings))}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if "output" not in fields:
        raise InputError("no output directory was given (--output, or output: in the YAML file)")
    from mixencoder.training.config import TrainConfig, checked, data_specs
    from mixencoder.training.folders import RECORD, last_checkpoint, unfinished_folder
    from mixencoder.training.run import train as run_training

    known = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise DataError(
            f"{config} has unknown fields {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    # YAML reads 2e-5, without a point, as text
    fields |= {name: _number(value) for name, value in fields.items() if known[name] is float}
    try:
        configured = checked(TrainConfig(**fields))
        data_specs(configured)
    except MixEncoderError as error:
        raise type(error)(f"{prefix}{error}") from error
    try:
        with _printed_logs(), _sigterm_interrupts():
            run_training(configured)
    except KeyboardInterrupt as stop:
        trained = Path(configured.output)
        if (trained / RECORD).is_file():
            left = f"the model was saved to {trained} before"
        elif kept := last_checkpoint(unfinished_folder(trained)):
            left = f"{kept} is complete, and the same command with --resume continues from it"
        else:
            left = "there was no checkpoint yet (save_every), so nothing is left"
        say(f"interrupted: {left}")
        raise typer.Exit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None
    say(f"saved to {configured.output}")


@contextmanager
def _printed_logs() -> Generator[None]:
    """Print the library's log messages on the terminal; processes after the first print only errors."""
    handler = _LogPrinter()
    logger = logging.getLogger("mixencoder")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _LogPrinter(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"warning: {record.getMessage()}" if record.levelno >= logging.WARNING else record.getMessage())


@contextmanager
def _sigterm_interrupts() -> Generator[None]:
    """Let SIGTERM, which batch systems send, end a run as Ctrl-C does."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _setting(text: str) -> tuple[str, Any]:
    from mixencoder.cli.settings_file import parse_value

    name, found, value = text.partition("=")
    if not found or not name:
        raise InputError(f"--set {text}: expected NAME=VALUE")
    return name, parse_value(value, f"--set {name}")
