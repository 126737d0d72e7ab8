"""The command line: ``mixencoder rank | train | evaluate | info``.

Results go to standard output; times, progress and warnings to standard error. Every error of the project, and bad
usage, ends with exit code 2 and one message; the model's own modules are imported by the command that needs them.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixencoder import __version__
from mixencoder.errors import DataError, InputError, MixEncoderError
from mixkernels.errors import MixKernelsError

app = typer.Typer(
    name="mixencoder",
    help="Rank many candidates for a query with cross-attention, the candidates encoded ahead of time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint directory or hub id.", show_default="the bundled default")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="For example cpu or cuda.", show_default="a GPU if there is one")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="float32")]
BackendOption = Annotated[str, typer.Option(help="auto, triton, torch or reference.")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the project's errors into one message and exit code 2, and its warnings into one line each."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            _quiet_transformers()
            function(*args, **kwargs)
        except (MixEncoderError, MixKernelsError) as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from None

    return run


def _say(text: str) -> None:
    _errors.print(text, markup=False)


def _quiet_transformers() -> None:
    """Keep transformers' load reports and bars off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command()
@_command
def rank(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    candidates: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help=".txt (a candidate a line), .jsonl (text, optional id), .csv or .tsv (--column), or - for stdin.",
        ),
    ],
    top_k: Annotated[int | None, typer.Option(min=1, help="How many to show.", show_default="all")] = None,
    column: Annotated[str | None, typer.Option(help="Column of a .csv or .tsv file that holds the texts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list on stdout.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
) -> None:
    """Rank the candidates of a file for a query, best first."""
    from mixencoder.candidates import read_candidates

    if not query.strip():
        raise InputError("the query is empty; expected some text")
    texts, ids = read_candidates(candidates, column=column)
    from mixencoder.fast import MixEncoder

    start = time.perf_counter()
    engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    loaded = time.perf_counter()
    encoded = engine.encode_document(texts, batch_size=batch_size, show_progress_bar=sys.stderr.isatty())
    encoded_at = time.perf_counter()
    results = engine.rank(query, encoded, top_k=top_k, ids=ids)
    ranked = time.perf_counter()
    for result in results:
        result["text"] = texts[result["corpus_id"]]
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False, indent=2))
    else:
        _print_ranking(query, results)
    count = f"{len(texts)} candidate" + ("s" if len(texts) > 1 else "")
    _say(
        f"loading the model {_milliseconds(loaded - start)}, encoding {count} {_milliseconds(encoded_at - loaded)} "
        f"(once, ahead of time), ranking {_milliseconds(ranked - encoded_at)} (per query)"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def _print_ranking(query: str, results: list[dict[str, Any]]) -> None:
    table = Table(title=f"“{query}”", title_justify="left", box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    has_ids = "id" in results[0]
    if has_ids:
        table.add_column("id")
    table.add_column("candidate")
    for place, result in enumerate(results, start=1):
        names = [result["id"]] if has_ids else []
        table.add_row(str(place), f"{result['score']:.2f}", *map(_literal, [*names, result["text"]]))
    Console(highlight=False).print(table)


def _literal(text: str) -> Any:
    """Keep square brackets of a text from being read as markup."""
    from rich.text import Text

    return Text(text)


@app.command()
@_command
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with the fields of TrainConfig; flags win.")] = None,
    output: Annotated[str | None, typer.Option(help="Directory for the trained model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data file or BEIR folder, optionally =WEIGHT; repeat for several (docs/training.md)."),
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that relative data paths start from.")] = None,
    model: Annotated[str | None, typer.Option(help="MixEncoder to go on from.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder to start from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    negatives: Annotated[int | None, typer.Option(help="Listed negatives drawn for each query.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of the backbone.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
) -> None:
    """Train a MixEncoder from data files, given by flags or a YAML file."""
    fields = _read_yaml(config) if config is not None else {}
    flags = {
        "output": output,
        "data": data,
        "data_dir": data_dir,
        "model": model,
        "backbone": backbone,
        "steps": steps,
        "batch_size": batch_size,
        "negatives": negatives,
        "learning_rate": learning_rate,
        "bf16": bf16,
        "seed": seed,
    }
    fields.update({name: value for name, value in flags.items() if value is not None})
    if "output" not in fields:
        raise InputError("no output directory was named (--output, or output: in the YAML file)")
    from mixencoder.training.trainer import TrainConfig
    from mixencoder.training.trainer import train as run_training

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(fields) - known):
        raise DataError(
            f"{config} has unknown fields {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    run_training(TrainConfig(**fields))
    _say(f"saved to {fields['output']}")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds a {type(fields).__name__}; expected fields with values")
    return fields


@app.command()
@_command
def evaluate(
    data: Annotated[list[Path], typer.Argument(help="Rank files, or folders in BEIR layout with a first-stage run.")],
    model: ModelOption = None,
    backbone: Annotated[
        str | None, typer.Option(help="Evaluate an untrained MixEncoder with dual term on this encoder instead.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="Part of the score: full, interaction, dual; repeat for several.")
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="Measure that ir-measures knows; repeat for several.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many queries alone.")] = None,
    max_document_length: Annotated[int | None, typer.Option(min=3, help="Cut documents after so many tokens.")] = None,
    split: Annotated[str, typer.Option(help="Split of a BEIR folder.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Measure ranking quality on rank files and BEIR-layout folders."""
    from mixencoder.evaluation import DEFAULT_MEASURES, evaluate_ranking, read_ranking_task
    from mixencoder.fast import MixEncoder

    scores, measures = score or ["full"], measure or list(DEFAULT_MEASURES)
    where = {"device": device, "dtype": dtype, "backend": backend}
    engine = (
        MixEncoder.from_backbone(backbone, dual_term=True, **where)
        if backbone
        else MixEncoder.from_pretrained(model, **where)
    )
    if max_document_length is not None:
        engine = engine.with_limits(max_document_length=max_document_length)
    tasks = [read_ranking_task(path, split=split, limit=limit) for path in data]
    results = {}
    for task in tasks:
        results[task.name] = evaluate_ranking(
            engine, task, measures=measures, scores=scores, show_progress_bar=sys.stderr.isatty()
        )
    if as_json:
        provenance = {
            "model": Path(backbone or model or "bundled default").name,
            "untrained": backbone is not None,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "device": engine.device.type,
            "max_document_length": engine.read_document.max_length,
            "queries": {task.name: len(task.queries) for task in tasks},
            "versions": {
                "mixencoder": __version__,
                **{name: version(name) for name in ("torch", "transformers", "ir_measures")},
            },
        }
        typer.echo(json.dumps({"provenance": provenance, "results": results}, indent=2))
        return
    table = Table("task", "score", *measures, box=None, pad_edge=False)
    for name, by_score in results.items():
        for part, values in by_score.items():
            table.add_row(name, part, *(f"{values[measure]:.4f}" for measure in values))
    Console(highlight=False).print(table)


@app.command()
@_command
def info() -> None:
    """Print versions, devices, the attention backend and why."""
    import torch

    from mixencoder.checkpoint import default_checkpoint
    from mixkernels import BACKENDS, not_supported_reasons

    table = Table(show_header=False, box=None, pad_edge=False)
    for package in ("mixencoder", "torch", "triton", "transformers", "numpy", "safetensors"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "installed" if importlib.util.find_spec(package) else "not installed"
        table.add_row(package, found)
    table.add_row("python", sys.version.split()[0])
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    cpu = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    table.add_row("devices", ", ".join([*devices, cpu]))
    for name in BACKENDS:
        reasons = not_supported_reasons(name)
        table.add_row(f"backend {name}", "can run" if not reasons else f"cannot run: {', '.join(reasons)}")
    chosen = "triton" if not not_supported_reasons("triton") and torch.cuda.is_available() else "torch"
    why = "a GPU is there" if chosen == "triton" else "the fastest backend that can run on a CPU"
    table.add_row("backend auto", f"{chosen}: {why}")
    try:
        table.add_row("default model", str(default_checkpoint()))
    except MixEncoderError as error:
        table.add_row("default model", str(error))
    Console(highlight=False, soft_wrap=True).print(table)
