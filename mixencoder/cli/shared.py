"""What the commands share: common options, messages on standard error, errors as one message and exit code 2."""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixencoder.errors import MixEncoderError
from mixkernels.errors import MixKernelsError

if TYPE_CHECKING:
    from mixencoder.results import RankResult

_errors = Console(stderr=True, highlight=False, soft_wrap=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint directory or hub id.", show_default="the bundled default")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="For example cpu or cuda.", show_default="a GPU if there is one")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")]
BackendOption = Annotated[str, typer.Option(help="auto, triton, torch or reference.")]

CandidatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help=".txt (a candidate a line), .jsonl (text, optional id), .csv or .tsv (--column), or - for stdin.",
    ),
]
ColumnOption = Annotated[str | None, typer.Option(help="Column of a .csv or .tsv file that holds the texts.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the project's errors into one message and exit code 2, and its warnings into one line each."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            _quiet_transformers()
            function(*args, **kwargs)
        except (MixEncoderError, MixKernelsError) as error:
            say(f"error: {error}")
            raise typer.Exit(2) from None

    return run


def say(text: str) -> None:
    """Print a message on standard error."""
    _errors.print(text, markup=False)


def print_ranking(query: str, results: "Sequence[RankResult]") -> None:
    """Print what `MixEncoder.rank` gave for a query, with the texts, as a table on standard output."""
    table = Table(title=Text(f"“{query}”", style="italic"), title_justify="left", box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    has_probabilities = "probability" in results[0]
    if has_probabilities:
        table.add_column("probability", justify="right")
    has_ids = "id" in results[0]
    if has_ids:
        table.add_column("id")
    table.add_column("candidate")
    for place, result in enumerate(results, start=1):
        names = [result["id"]] if has_ids else []
        numbers = [f"{result['score']:.2f}"] + ([f"{result['probability']:.0%}"] if has_probabilities else [])
        table.add_row(str(place), *numbers, *map(Text, [*names, result.get("text") or ""]))
    Console(highlight=False).print(table)


def _quiet_transformers() -> None:
    """Keep transformers' load reports and bars off the terminal; it reads these when a command first imports it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
