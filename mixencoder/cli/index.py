"""``mixencoder index build | first-stage | merge | add | project | remove | info | verify | compact | repair``."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixencoder.base.texts import printable
from mixencoder.cli.messages import on_terminal, say
from mixencoder.cli.shared import (
    BackendOption,
    CandidatesOption,
    ColumnOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    ModelOption,
    OnEmptyOption,
    command,
)
from mixencoder.errors import InputError

app = typer.Typer(
    help="Keep candidates on disk, encoded once (docs/candidate-index.md).", no_args_is_help=True, add_completion=False
)

PathArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the index.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Texts encoded at once.")]


@app.command()
@command
def build(
    path: PathArgument,
    candidates: CandidatesOption = None,
    column: ColumnOption = None,
    format: FormatOption = None,
    on_empty: OnEmptyOption = "special",
    precision: Annotated[str, typer.Option(help="float32, float16, bfloat16 or int8.")] = "float16",
    layout: Annotated[
        str, typer.Option(help="projected, or compact: less disk space, more time per query.")
    ] = "projected",
    on_overflow: Annotated[
        str, typer.Option(help="What to do with documents that are too long: truncate, chunk or error.")
    ] = "truncate",
    store_text: Annotated[bool, typer.Option(help="Also store the texts.")] = True,
    first_stage: Annotated[
        str | None,
        typer.Option(metavar="usearch|faiss", help="Also build a first stage, as mixencoder index first-stage does."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only estimate bytes and time.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Build shards on many workers with Ray; FILE may be a pattern or a URI.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="With --ray: a cluster; auto finds one.", show_default="a new one, here")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: how many.", show_default="what the cluster has room for")
    ] = None,
    worker_cpus: Annotated[int, typer.Option(min=1, help="With --ray: cores of a worker.")] = 1,
    worker_gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of a worker.")] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="With --ray: most candidates of a shard.")] = 100_000,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: BatchOption = 32,
) -> None:
    """Encode the candidates of a file into a new index; if interrupted, run the same command to continue."""
    from mixencoder.data.candidates import read_candidates
    from mixencoder.fast import MixEncoder

    where = _required(candidates)
    engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    engine = engine.with_limits(on_empty=on_empty)
    if not ray and (address is not None or workers is not None):
        raise InputError("--address and --workers are for --ray; expected neither without it")
    if first_stage is not None:
        from mixencoder.first_stage.libraries import library_of

        # before texts are encoded, which may take hours
        library_of(first_stage)
        if not engine.config.dual_term:
            raise InputError("--first-stage searches the vectors of the dual term, but this model has none")
    if dry_run:
        texts = read_candidates(where, column=column, format=format).texts
        options = {"precision": precision, "layout": layout, "on_overflow": on_overflow, "batch_size": batch_size}
        found = engine.estimate_index(texts, **options)
        typer.echo(
            f"{found.documents:,} candidates: {_size(found.array_bytes)} of arrays, "
            f"about {_size(found.catalogue_bytes)} of ids and texts, about {found.seconds:,.0f} s"
        )
        return
    options = {"precision": precision, "layout": layout, "on_overflow": on_overflow, "store_text": store_text}
    if ray:
        from mixencoder.distributed.ray_build import Workers, build_index

        found = Workers(workers, worker_cpus, worker_gpus)
        cluster = {"shard_rows": shard_size, "workers": found, "address": address, "batch_size": batch_size}
        result = build_index(engine, path, where, column=column, format=format, **options, **cluster)
        say(f"{path} holds {result.documents:,} candidates in {result.shards:,} shards")
        if first_stage is not None:
            _build_first_stage(path, kind=first_stage)
        return
    texts, ids = _columns(where, column, format)
    progress = {"batch_size": batch_size, "show_progress_bar": on_terminal()}
    with engine.index(texts, ids, path, **options, **progress) as index:
        say(f"{path} holds {len(index):,} candidates")
    if first_stage is not None:
        _build_first_stage(path, kind=first_stage)


@app.command("first-stage")
@command
def first_stage(
    path: PathArgument,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write, or to replace.", show_default="first-stage in DIR")
    ] = None,
    kind: Annotated[str, typer.Option(help="usearch or faiss; each is an extra of this name.")] = "usearch",
    factory: Annotated[
        str | None,
        typer.Option(help="With faiss: its factory string, such as IVF4096,PQ48.", show_default="HNSW32"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="With usearch: float32, float16 or bfloat16.", show_default="float16")
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How much a search looks at: vectors of a graph, or inverted lists.",
            show_default="256, or the square root of the number of lists",
        ),
    ] = None,
) -> None:
    """Build a vector index that chooses candidates without reading all; again after each change. See docs/scale.md."""
    _build_first_stage(path, output, kind=kind, factory=factory, precision=precision, effort=effort)


@app.command()
@command
def add(
    path: PathArgument,
    candidates: CandidatesOption = None,
    column: ColumnOption = None,
    format: FormatOption = None,
    on_empty: OnEmptyOption = "special",
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: BatchOption = 32,
) -> None:
    """Add the candidates of a file; without ids, those already in the index are skipped."""
    from mixencoder.fast import MixEncoder

    texts, ids = _columns(_required(candidates), column, format)
    engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    with engine.with_limits(on_empty=on_empty).open_index(path) as index:
        result = index.add(texts, ids, batch_size=batch_size, show_progress_bar=on_terminal())
        say(f"{result.added:,} added, {result.skipped:,} held already, {result.cut:,} cut; now {len(index):,}")


@app.command()
@command
def project(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of an index of the same encoder.")],
    path: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new index.")],
    precision: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or int8.", show_default="that of SOURCE")
    ] = None,
    layout: Annotated[str, typer.Option(help="projected or compact.")] = "projected",
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Copy an index for a model with the same encoder, without encoding texts again; see docs/candidate-index.md."""
    from mixencoder.fast import MixEncoder

    engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    options = {"precision": precision, "layout": layout, "show_progress_bar": on_terminal()}
    with engine.open_index(source, read_only=True) as index, engine.project_index(index, path, **options) as made:
        say(f"{path} holds {len(made):,} candidates")


@app.command()
@command
def merge(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged index.")],
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Folders of indexes of one encoder.")],
    single: Annotated[
        bool, typer.Option("--single", help="Copy all candidates into one index; else OUT only lists the shards.")
    ] = False,
) -> None:
    """Read several indexes, built anywhere with the same model and settings, as one; see docs/scale.md."""
    from mixencoder.index.sharded_index import list_shards, merge_shards

    if single:
        with merge_shards(path, shards, show_progress_bar=on_terminal()) as index:
            count = len(index)
    else:
        count = list_shards(path, shards)
    say(f"{path} holds {count:,} candidates" + ("" if single else f" in {len(shards):,} shards"))


@app.command()
@command
def remove(path: PathArgument, ids: Annotated[list[str], typer.Argument(help="Ids of candidates.")]) -> None:
    """Remove candidates by id; their bytes stay until compact."""
    from mixencoder.index import CandidateIndex

    with CandidateIndex.open(path, None) as index:
        say(f"{index.remove(ids):,} removed; now {len(index):,}")


@app.command()
@command
def info(
    path: PathArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Print what an index holds and what made it."""
    from mixencoder.index.sharded_index import open_any

    with open_any(path) as index:
        found = index.info()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        if name != "fields":
            table.add_row(name.replace("_", " "), Text(printable(_shown(name, value))))
    Console(highlight=False, soft_wrap=True).print(table)


@app.command()
@command
def verify(path: PathArgument) -> None:
    """Check all data against their checksums; exit code 2 if something is damaged."""
    from mixencoder.index.sharded_index import open_any

    with open_any(path, check_sizes=False) as index:
        report = index.verify()
    typer.echo(printable(str(report)))
    if not report.ok:
        raise typer.Exit(2)


@app.command()
@command
def compact(path: PathArgument) -> None:
    """Rewrite the index without removed candidates."""
    from mixencoder.index import CandidateIndex

    with CandidateIndex.open(path, None) as index:
        say(f"{_size(index.compact())} freed")


@app.command()
@command
def repair(
    path: PathArgument,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: BatchOption = 32,
) -> None:
    """Encode damaged candidates again from their stored texts, remove those without a text, and compact."""
    from mixencoder.fast import MixEncoder

    engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    with engine.open_index(path, check_sizes=False) as index:
        result = index.repair(batch_size=batch_size)
    say(
        f"{len(result.encoded):,} encoded again, {len(result.lost):,} lost"
        + "".join(f"\n{printable(id)}" for id in result.lost)
    )


def _build_first_stage(path: Path, output: Path | None = None, *, kind: str, **options: Any) -> None:
    """Build the first stage of an index, single or sharded, of any model."""
    from mixencoder.first_stage.libraries import Options
    from mixencoder.first_stage.vector_index import FOLDER, VectorIndex
    from mixencoder.index.sharded_index import open_any
    from mixencoder.ranking.dual_vectors import pooled

    with open_any(path) as index:
        progress = {"show_progress_bar": on_terminal()}
        made = VectorIndex.build(index.snapshot(), pooled, kind, Options(**options), **progress)
    made.save(path / FOLDER if output is None else output)
    info = made.info()
    say(f"{info['path']} holds {info['rows']:,} vectors of {info['documents']:,} candidates, {_size(info['bytes'])}")


def _required(candidates: str | None) -> str:
    if candidates is None:
        raise InputError("no candidates were named (--candidates FILE)")
    return candidates


def _columns(source: str, column: str | None, format: str | None) -> tuple[Iterable[str], Iterable[str] | None]:
    """Return two iterables, a file's texts and its ids (None if it has none), which read the file as they advance."""
    from mixencoder.data.candidates import iterate_candidates

    rows = iterate_candidates(source, column=column, format=format)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{source} holds no candidate")
    texts, ids = itertools.tee(itertools.chain([first], rows))
    return (text for text, _ in texts), None if first[1] is None else (name for _, name in ids if name is not None)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value):,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if name.endswith("_bytes"):
        return _size(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
