"""``mixencoder export``: a model as files that other programs run."""

from pathlib import Path
from typing import Annotated

import typer

from mixencoder.cli.messages import say
from mixencoder.cli.shared import ModelOption
from mixencoder.errors import InputError


def export(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="Format: onnx.")] = "onnx",
    model: ModelOption = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise weights to int8; scores change.")] = False,
) -> None:
    """Export a model as ONNX graphs that rank without PyTorch; see docs/onnx.md."""
    from mixencoder.export import export_onnx
    from mixencoder.fast import MixEncoder

    if format != "onnx":
        raise InputError(f"format is {format!r}; expected onnx")
    difference = export_onnx(MixEncoder.from_pretrained(model, device="cpu"), output, int8=int8)
    say(f"{output} holds the graphs; their scores differ from the model's by at most {difference:.2g}")
