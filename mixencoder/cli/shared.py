"""What the commands share: common options, results on standard output, errors as one message and exit code 2."""

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixencoder.base.texts import printable
from mixencoder.cli.messages import escape_unencodable, print_warnings, say
from mixencoder.errors import InputError, MixEncoderError
from mixkernels.errors import MixKernelsError

if TYPE_CHECKING:
    from mixencoder.base.results import RankResult


def expand_home(value: Any) -> Any:
    """Return a path, or a list of paths, with a leading ``~`` replaced by the home folder; anything else unchanged.

    Raises:
        InputError: the home folder is not known.
    """
    if isinstance(value, list | tuple):
        return [expand_home(part) for part in value]
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    # imported here, as it imports torch
    from mixencoder.base.inputs import local_path

    return type(value)(local_path(value))


ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint directory or hub id.", show_default="the bundled default")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="For example cpu or cuda.", show_default="a GPU if there is one")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, or auto: bfloat16 where the device multiplies it faster, else float32.",
        show_default="float32",
    ),
]
BackendOption = Annotated[str, typer.Option(help="auto, triton, torch or reference.")]

CandidatesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help=".txt (one candidate a line), .jsonl (text, optional id), .csv, .tsv or .parquet (--column), the first "
        "four also with .gz, or - for stdin.",
    ),
]
ColumnOption = Annotated[str | None, typer.Option(help="Column of a table that holds the texts.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Format of the file: txt, jsonl, csv, tsv or parquet.",
        show_default="by the file's ending; txt for stdin",
    ),
]
OnEmptyOption = Annotated[
    str,
    typer.Option(
        metavar="special|error",
        help="Texts without a token: special reads the tokenizer's special tokens alone, error stops at the first.",
    ),
]

_PATHS = ("backbone", "candidates", "data", "data_dir", "documents", "model", "output", "teacher")
"""Text parameters that may be paths, but also a hub id, - or PATH=WEIGHT."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command with the handling of errors, warnings and paths that all commands share.

    Errors of the project, of files and of memory end with one message and exit code 2, ctrl-c with 130; each warning is
    printed once; a leading ``~`` of a path is the home folder.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        escape_unencodable()
        try:
            with print_warnings():
                _quiet_transformers()
                paths = {
                    name: expand_home(value)
                    for name, value in kwargs.items()
                    if name in _PATHS or not isinstance(value, str)
                }
                function(*args, **{**kwargs, **paths})
        except (MixEncoderError, MixKernelsError) as error:
            _fail(str(error))
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except MemoryError:
            _fail(_NO_MEMORY)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # the reader of the pipe has ended, as head does; typer exits quietly
                raise
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except RuntimeError as error:
            # PyTorch's allocators share no error type
            if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
                raise
            _fail(_NO_MEMORY)

    return run


_NO_MEMORY = "out of memory; expected fewer or shorter texts, or a smaller --batch-size"


def _fail(message: str) -> None:
    say(f"error: {message}")
    raise typer.Exit(2) from None


def print_ranking(query: str, results: "Sequence[RankResult]") -> None:
    """Print the results of `MixEncoder.rank` for a query, with their texts, as a table on standard output."""
    title = Text(f"“{printable(query)}”", style="italic")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    has_probabilities = "probability" in results[0]
    if has_probabilities:
        table.add_column("probability", justify="right", no_wrap=True)
    has_ids = "id" in results[0]
    if has_ids:
        table.add_column("id", overflow="fold")
    # on a narrow terminal, break words instead of leaving some out
    table.add_column("candidate", overflow="fold")
    for number, result in enumerate(results, start=1):
        names = [result["id"]] if has_ids else []
        numbers = [f"{result['score']:.2f}"] + ([f"{result['probability']:.0%}"] if has_probabilities else [])
        texts = [Text(printable(text)) for text in (*names, result.get("text") or "")]
        table.add_row(str(number), *numbers, *texts)
    Console(highlight=False).print(table)


def print_json(value: Any) -> None:
    """Print JSON on standard output; control characters, and what its encoding lacks, are escaped.

    Raises:
        InputError: as `json_text`.
    """
    text = json_text(value, getattr(sys.stdout, "encoding", None) or "utf-8")
    if printable(text) != text:
        # json does not escape DEL
        text = json.dumps(value, indent=2).replace("\x7f", "\\u007f")
    typer.echo(text)


def json_text(value: Any, encoding: str = "utf-8") -> str:
    """Return a result as JSON, escaped if the encoding cannot hold it.

    Raises:
        InputError: a number is NaN or infinite, which JSON does not know.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(f"the result cannot be written as JSON: {error}") from error
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=2)
    return text


def _quiet_transformers() -> None:
    """Keep transformers' load reports and bars off the terminal; it reads these when a command first imports it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
