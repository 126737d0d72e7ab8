"""``mixencoder explain``: the score of one document for one query, and what attends to what."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixencoder.base.texts import printable, unicode_fault
from mixencoder.cli.messages import notice
from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, ModelOption, print_json
from mixencoder.errors import InputError

if TYPE_CHECKING:
    from mixencoder.explanation.result import PairExplanation, WordWeight

_SHADES = ("on #fff0c2", "on #ffd866", "on #ffb020", "on #f08000")
"""Backgrounds of words, from little weight to much; the words are black, so they can be read on any terminal."""
_LEAST = 0.25
"""Words with less than this share of the largest weight get no background."""


def explain(
    query: Annotated[str, typer.Argument(help="The query.")],
    document: Annotated[str, typer.Argument(help="The document that is scored for it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object on stdout.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the attention into this file, such as x.png or x.svg.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="In the picture, draw a row for each attention head.")] = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Explain the score of a document for a query: its terms, and what the interaction layers attend to."""
    from mixencoder.base.empty_texts import tokenless

    for role, text in (("query", query), ("document", document)):
        if not text.strip():
            raise InputError(f"the {role} is empty; expected some text")
        if (fault := unicode_fault(text)) is not None:
            raise InputError(f"the {role} {fault}; expected text in the terminal's encoding")
    if heads and picture is None:
        raise InputError("--heads is for a picture; name its file with --picture FILE")
    with notice("loading ..."):
        from mixencoder.fast import MixEncoder

        engine = MixEncoder.from_pretrained(model, device=device, dtype=dtype, backend=backend)
    for role, text in (("query", query), ("document", document)):
        if tokenless(engine.tokenizer, [text]):
            raise InputError(f"the {role} {text!r} holds no token; expected some text")
    explanation = engine.explain(query, document)
    if picture is not None:
        _save_picture(explanation, picture, heads=heads)
    if as_json:
        print_json(explanation.as_dict())
    else:
        _print(explanation)


def _save_picture(explanation: "PairExplanation", path: Path, *, heads: bool) -> None:
    figure = explanation.plot(heads=heads)
    try:
        figure.savefig(path)
    except ValueError as error:
        # matplotlib's message lists the formats
        raise InputError(f"--picture is {path}: {error}") from error


def _print(explanation: "PairExplanation") -> None:
    console = Console(highlight=False)
    console.print(explanation.summary(), style="bold")
    texts = Table(box=None, show_header=False, pad_edge=False)
    texts.add_column(no_wrap=True)
    texts.add_column(overflow="fold")
    texts.add_row("query", _shaded(explanation.query, explanation.query_words()))
    texts.add_row("document", _shaded(explanation.document, explanation.document_words()))
    console.print(texts)
    console.print()
    console.print(_attention_table(explanation))
    notes = ["Each column sums to 100%; it is the mean over the attention heads."]
    if explanation.context_attention is not None:
        notes.append("A context is one of the document's vectors.")
    if explanation.state_attention is not None:
        notes.append("The state becomes the vector that the contexts are compared with.")
    console.print(" ".join(notes), style="dim")


def _shaded(text: str, words: "Sequence[WordWeight]") -> Text:
    """Return a text whose words have a background by their weight."""
    # control characters are replaced one by one, so positions stay
    shaded = Text(printable(text))
    largest = max((word.weight for word in words), default=0.0)
    for word in words:
        share = word.weight / largest if largest > 0 else 0.0
        if word.start is not None and share >= _LEAST:
            shade = _SHADES[min(int((share - _LEAST) / (1 - _LEAST) * len(_SHADES)), len(_SHADES) - 1)]
            shaded.stylize(f"black {shade}", word.start, word.end)
    return shaded


def _attention_table(explanation: "PairExplanation") -> Table:
    """Return a table with a row for each query token, and a column for each layer's state and context embeddings."""
    table = Table(box=None, pad_edge=False)
    table.add_column("attention to", no_wrap=True)
    columns = []
    for number in range(len(explanation.layers)):
        layer = f"layer {number + 1} " if len(explanation.layers) > 1 else ""
        if explanation.state_attention is not None:
            columns.append((f"{layer}state", explanation.state_attention[number].mean(axis=0)))
        if explanation.context_attention is not None:
            contexts = explanation.context_attention[number].mean(axis=0)
            columns += [(f"{layer}context {row + 1}", values) for row, values in enumerate(contexts)]
    for name, _ in columns:
        table.add_column(name, justify="right")
    for number, token in enumerate(explanation.query_tokens):
        table.add_row(Text(printable(token.text)), *(f"{values[number]:.1%}" for _, values in columns))
    if explanation.context_attention is not None:
        m = len(explanation.query_tokens)
        own = (f"{values[m:].sum():.1%}" if len(values) > m else "" for _, values in columns)
        table.add_row("contexts", *own)
    return table
