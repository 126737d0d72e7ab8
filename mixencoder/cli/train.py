"""``mixencoder train``: a model of any architecture from data files."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mixencoder.cli.shared import say
from mixencoder.errors import DataError, InputError


def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with the fields of TrainConfig; flags win.")] = None,
    output: Annotated[str | None, typer.Option(help="Directory for the trained model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data file or BEIR folder, optionally =WEIGHT; repeat for several (docs/training.md)."),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that relative data paths start from.")] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="mixencoder, cross-encoder, dual-encoder, poly-encoder, late-interaction or deformer.",
            show_default="mixencoder",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='Trained model to go on from; "bundled" is the default one.')
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
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    mini_batch_size: Annotated[int | None, typer.Option(help="Texts encoded at once, to save memory.")] = None,
    negatives: Annotated[int | None, typer.Option(help="Listed negatives drawn for each query.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of the backbone.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Peak rate of everything on top of it.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Trained model, such as a cross-encoder, whose scores are learned too.")
    ] = None,
    distillation: Annotated[str | None, typer.Option(help="How: kl or margin-mse.")] = None,
    distillation_weight: Annotated[
        float | None, typer.Option(help="Of the teacher's loss, 0 to 1; the labels' weighs the rest.")
    ] = None,
    bf16: Annotated[bool | None, typer.Option(help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[bool | None, typer.Option(help="Go on with an interrupted run.")] = None,
) -> None:
    """Train a model from data files, given by flags or a YAML file; torchrun runs it in several processes."""
    # first, so that these are the parameters alone
    flags = {name: value for name, value in locals().items() if name not in ("config", "settings")}
    fields = _read_yaml(config) if config is not None else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if settings:
        fields["config"] = {**(fields.get("config") or {}), **dict(map(_setting, settings))}
    if "output" not in fields:
        raise InputError("no output directory was named (--output, or output: in the YAML file)")
    from mixencoder.training.run import TrainConfig
    from mixencoder.training.run import train as run_training

    known = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(fields.keys() - known.keys()):
        raise DataError(
            f"{config} has unknown fields {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    # YAML reads 2e-5, without a point, as text
    fields |= {name: _number(value) for name, value in fields.items() if known[name] is float}
    run_training(TrainConfig(**fields))
    say(f"saved to {fields['output']}")


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, found, value = text.partition("=")
    if not found or not name:
        raise InputError(f"--set {text}: expected NAME=VALUE")
    return name, yaml.safe_load(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds a {type(fields).__name__}; expected fields with values")
    return fields
