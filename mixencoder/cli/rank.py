"""``mixencoder rank``: the candidates of a file for a query, best first."""

import time
from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mixencoder.base.texts import unicode_fault
from mixencoder.cli.messages import notice, on_terminal, say
from mixencoder.cli.shared import (
    BackendOption,
    CandidatesOption,
    ColumnOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    ModelOption,
    OnEmptyOption,
    print_json,
    print_ranking,
)
from mixencoder.errors import InputError


def rank(
    query: Annotated[str, typer.Argument(help="Text to rank candidates for.")],
    candidates: CandidatesOption = None,
    index: Annotated[
        Path | None, typer.Option(help="Index to rank instead of a file (mixencoder index build).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="How many to show.", show_default="all")] = None,
    prefilter: Annotated[
        str,
        typer.Option(
            metavar="auto|all|N",
            help="With an index: fully score only the N best by dual score, or all; auto depends on --top-k.",
        ),
    ] = "auto",
    first_stage: Annotated[
        str | None,
        typer.Option(
            metavar="auto|DIR",
            help="With an index: let its first stage choose these N (mixencoder index first-stage); auto finds it.",
        ),
    ] = None,
    column: ColumnOption = None,
    format: FormatOption = None,
    on_empty: OnEmptyOption = "special",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list on stdout.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
) -> None:
    """Rank the candidates of a file or an index for a query, best first."""
    from mixencoder.base.empty_texts import check_on_empty, report_tokenless, tokenless
    from mixencoder.data.candidates import read_candidates

    _check_query(query)
    kept = _prefilter(prefilter)
    check_on_empty(on_empty)
    if (candidates is None) == (index is None):
        raise InputError("expected either --candidates FILE or --index DIR")
    found = None
    if candidates is not None:
        if isinstance(kept, int):
            raise InputError("--prefilter is for an index; make one with mixencoder index build")
        if first_stage is not None:
            raise InputError("--first-stage is for an index; make one with mixencoder index build")
        found = read_candidates(candidates, column=column, format=format)
    elif not (column is format is None):
        raise InputError("--column and --format are for --candidates; expected neither with an index")
    with notice("loading ..."):
        from mixencoder.fast import MixEncoder

        start = time.perf_counter()
        engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    if tokenless(engine.tokenizer, [query]):
        raise InputError(f"the query {query!r} holds no token; expected some text")
    times = [f"loading the model {_milliseconds(time.perf_counter() - start)}"]
    start = time.perf_counter()
    options: dict[str, Any] = {}
    if found is not None:
        of = _count(found.texts)
        report_tokenless(engine.tokenizer, found.suspects, on_empty=on_empty, of=of)
        documents = engine.encode_document(found.texts, batch_size=batch_size, show_progress_bar=on_terminal())
        spent = _milliseconds(time.perf_counter() - start)
        times.append(f"encoding {of} {spent} (once, ahead of time)")
        options["ids"] = found.ids
        texts_at: Callable[[list[int]], Iterable[str | None]] = partial(map, found.texts.__getitem__)
    else:
        assert index is not None, "either candidates or an index is given"
        documents = engine.open_index(index, read_only=True)
        if len(documents) == 0:
            raise InputError(f"{index} holds no candidate; add some with mixencoder index add")
        # one commit, whose texts are read after ranking
        view = documents.snapshot()
        if first_stage is not None:
            options["first_stage"] = engine.open_first_stage(view, _first_stage(first_stage, index))
        documents = view
        times.append(f"opening {_count(documents)} {_milliseconds(time.perf_counter() - start)}")
        texts_at = documents.texts
        options["prefilter"] = kept
    options["return_probabilities"] = engine.config.calibration is not None
    start = time.perf_counter()
    results = engine.rank(query, documents, top_k=top_k, **options)
    times.append(f"ranking {_milliseconds(time.perf_counter() - start)} (per query)")
    texts = texts_at([result["corpus_id"] for result in results])
    for result, text in zip(results, texts, strict=True):
        # an index may hold no text of a candidate
        if text is not None:
            result["text"] = text
    if as_json:
        print_json(results)
    else:
        print_ranking(query, results)
    say(", ".join(times))


def _check_query(query: str) -> None:
    if not query.strip():
        raise InputError("the query is empty; expected some text")
    if (fault := unicode_fault(query)) is not None:
        raise InputError(f"the query {fault}; expected text in the terminal's encoding")


def _prefilter(value: str) -> int | str | None:
    """Return the option as `MixEncoder.rank` takes it."""
    if value in ("auto", "all"):
        return None if value == "all" else value
    if value.isascii() and value.isdigit() and int(value) > 0:
        return int(value)
    raise InputError(f"--prefilter is {value!r}; expected auto, all or a positive integer")


def _first_stage(value: str, index: Path) -> Path:
    """Return the folder that the option names."""
    from mixencoder.first_stage.vector_index import FOLDER

    return index / FOLDER if value == "auto" else Path(value)


def _count(candidates: Sized) -> str:
    return f"{len(candidates):,} candidate" + ("" if len(candidates) == 1 else "s")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
