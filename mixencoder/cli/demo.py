"""``mixencoder demo``: type a query, see a bundled list of short answers ranked for it."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mixencoder.cli.messages import notice, say
from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, ModelOption, print_ranking
from mixencoder.errors import InputError

ANSWERS = Path(__file__).with_name("demo.txt")
"""The bundled list, one answer a line."""


def demo(
    query: Annotated[str | None, typer.Option(help="Rank for this one query.", show_default="asks")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many to show.")] = 5,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Rank a bundled list of short answers for the queries that you type; an empty line or ctrl-d ends it.

    If standard input is not a terminal, each of its lines is a query.
    """
    from mixencoder.base.empty_texts import tokenless
    from mixencoder.data.candidates import read_candidates

    if query is not None and not query.strip():
        raise InputError("the query is empty; expected some text")
    answers = read_candidates(str(ANSWERS)).texts
    with notice("loading ..."):
        from mixencoder.fast import MixEncoder

        engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    start = time.perf_counter()
    documents = engine.encode_document(answers)
    say(f"{len(answers)} answers on everyday and computing matters encoded, once, in {_milliseconds(start)}")
    calibrated = engine.config.calibration is not None
    asks = query is None and sys.stdin.isatty()
    for text in _queries(asks=asks) if query is None else [query]:
        start = time.perf_counter()
        try:
            if tokenless(engine.tokenizer, [text]):
                raise InputError(f"the query {text!r} holds no token; expected some text")
            results = engine.rank(text, documents, top_k=top_k, return_probabilities=calibrated)
        except InputError as error:
            if not asks:
                raise
            say(f"error: {error}")
            continue
        spent = _milliseconds(start)
        for result in results:
            result["text"] = answers[result["corpus_id"]]
        print_ranking(text, results)
        say(f"{len(answers)} answers ranked in {spent}")


def _queries(*, asks: bool) -> Iterator[str]:
    """Yield queries up to the first empty one, typed or from standard input."""
    from mixencoder.data.candidates import read_stdin

    return takewhile(str.strip, _typed() if asks else (line for _, line in read_stdin()))


def _typed() -> Iterator[str]:
    console = Console(highlight=False)
    with suppress(EOFError):
        while True:
            yield console.input("\n[bold]query:[/bold] ")


def _milliseconds(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1000:,.1f} ms"
