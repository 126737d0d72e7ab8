"""``mixencoder rank``: the candidates of a file for a query, best first."""

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, ModelOption, say
from mixencoder.errors import InputError


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
    say(
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
