"""``mixencoder evaluate``: quality on ranking data and on labelled or scored pairs, of every architecture."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixencoder.base.texts import printable
from mixencoder.cli.messages import notice, on_terminal, say
from mixencoder.cli.shared import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OnEmptyOption,
    json_text,
    print_json,
)
from mixencoder.errors import InputError

if TYPE_CHECKING:
    from mixencoder.base.engine import Engine
    from mixencoder.evaluation import Evaluation

INIT_SEED = 0
"""Seed of the random weights of an untrained model."""


def evaluate(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files of candidate lists, labelled pairs or scored pairs, or folders in BEIR layout with a "
            "first-stage run; told apart by their columns.",
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Evaluate an untrained model on this encoder instead (a MixEncoder with dual term)."),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="With --backbone: mixencoder, cross-encoder, dual-encoder, poly-encoder, late-interaction, deformer.",
            show_default="mixencoder",
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="Part of the score: full, interaction, dual; repeat for several.", show_default="full"),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="For rankings any measure of ir-measures; for labelled pairs accuracy, macro-F1; for scored pairs "
            "Pearson, Spearman. Repeat for several. Kinds of data without a measure here use the default.",
            show_default="nDCG@10, RR@10, R@1, R@10, Success@1; all measures of pairs",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N queries or pairs.")] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="SEED", help="With --limit: draw the N at random with this seed instead.")
    ] = None,
    max_query_length: Annotated[int | None, typer.Option(min=3, help="Cut queries after N tokens.")] = None,
    max_document_length: Annotated[int | None, typer.Option(min=3, help="Cut documents after N tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded, or pairs scored, at once.")] = 32,
    split: Annotated[str, typer.Option(help="Split of a BEIR folder.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON object to a file.")] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write rankings to this folder, as TASK.SCORE.run in TREC's format."),
    ] = None,
    on_empty: OnEmptyOption = "special",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap's resamples.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Measure a model on data that it was not trained on; figures have 95% bootstrap intervals.

    Ties count against the model. Queries without a right document count as 0.
    """
    with notice("loading ..."):
        from mixencoder.evaluation import evaluate as measure_tasks
        from mixencoder.evaluation import read_tasks
    from mixencoder.base.empty_texts import check_on_empty
    from mixencoder.evaluation.files import check_output, check_run_ids, check_writable, write_run, write_text
    from mixencoder.evaluation.provenance import describe, report
    from mixencoder.evaluation.tasks import RankingTask

    check_on_empty(on_empty)
    with notice("loading ..."):
        engine = _load(model, backbone, architecture, device=device, dtype=dtype, backend=backend)
    engine = engine.with_limits(max_query_length=max_query_length, max_document_length=max_document_length)
    label2id = engine.config.class_numbers
    tasks = read_tasks(data, split=split, limit=limit, sample=sample, label2id=label2id)
    rankings = [task for task in tasks if isinstance(task, RankingTask)]
    if run_dir is not None and not rankings:
        raise InputError("--run-dir is for rankings, but none of the data are candidate lists; expected no --run-dir")
    if run_dir is not None:
        for task in rankings:
            check_run_ids(task)
        check_writable(run_dir)
    if output is not None:
        check_output(output, [file for task in tasks for file in task.files])
    options = {
        "limit": limit,
        "sample": sample,
        "split": split,
        "batch_size": batch_size,
        "backend": backend,
        "on_empty": on_empty,
    }
    if backbone:
        options["init_seed"] = INIT_SEED
    provenance = describe(engine, backbone or model, tasks, untrained=backbone is not None, seed=seed, options=options)
    found = measure_tasks(
        engine,
        tasks,
        measures=measure or (),
        scores=score or ("full",),
        seed=seed,
        batch_size=batch_size,
        show_progress_bar=on_terminal(),
        on_empty=on_empty,
    )
    results = report(found, provenance)
    if run_dir is not None:
        for task in rankings:
            for part, ranked in found[task.name].rankings.items():
                write_run(run_dir, task, part, ranked, provenance["architecture"])
        say(f"rankings written to {run_dir}")
    if output is not None:
        write_text(output, f"{json_text(results)}\n")
    if as_json:
        print_json(results)
    else:
        _print_figures(found)


def _load(model: str | None, backbone: str | None, architecture: str | None, **where: Any) -> "Engine":
    import torch

    from mixencoder.architectures import engine_class, load_engine

    if backbone is None:
        if architecture is not None:
            raise InputError("--architecture is for an untrained model; expected --backbone with it")
        return load_engine(model, **where)
    if model is not None:
        raise InputError("--model and --backbone were both given; expected one of them")
    architecture = architecture or "mixencoder"
    if architecture == "mixencoder":
        where["dual_term"] = True
    elif where.pop("backend") != "auto":
        raise InputError(f"--backend chooses a MixEncoder's attention; expected none with a {architecture}")
    torch.manual_seed(INIT_SEED)
    return engine_class(architecture).from_backbone(backbone, **where)


def _print_figures(found: "dict[str, Evaluation]") -> None:
    parts = list(dict.fromkeys(part for evaluation in found.values() for part in evaluation.figures))
    table = Table("task", "measure", *parts, box=None, pad_edge=False)
    for name, evaluation in found.items():
        measures = dict.fromkeys(measure for figures in evaluation.figures.values() for measure in figures)
        for measure in measures:
            cells = (str(evaluation.figures.get(part, {}).get(measure, "")) for part in parts)
            table.add_row(printable(name), measure, *cells)
    # a file or a pipe does not limit the width of a line
    width = None if sys.stdout is not None and sys.stdout.isatty() else 60 + 24 * len(parts)
    Console(highlight=False, markup=False, width=width).print(table)
