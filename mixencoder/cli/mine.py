"""``mixencoder mine``: hard negatives by a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from mixencoder.cli.messages import on_terminal, say
from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, ModelOption, OnEmptyOption
from mixencoder.errors import InputError


def mine(
    data: Annotated[Path, typer.Argument(help="Training pairs or candidate lists, or a BEIR folder.")],
    output: Annotated[Path, typer.Option(help="File of candidate lists to write, .jsonl or .jsonl.gz.")],
    documents: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Further possible negatives: .txt, .jsonl, .csv or .tsv."),
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="Most negatives per query.")] = 8,
    skip: Annotated[int, typer.Option(min=0, help="Skip the N highest; they may be unlabelled positives.")] = 0,
    margin: Annotated[
        float | None,
        typer.Option(
            help="A negative scores at least this much below the right documents; drops what the model gets wrong.",
            show_default="none",
        ),
    ] = None,
    score: Annotated[str, typer.Option(help="Part of the score: full, interaction or dual.")] = "full",
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 32,
    on_empty: OnEmptyOption = "special",
) -> None:
    """Mine hard negatives: the wrong documents that a trained model ranks highest for each query."""
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"output is {output}; expected a name ending in .jsonl or .jsonl.gz")
    from mixencoder.architectures import load_engine
    from mixencoder.base.empty_texts import check_on_empty
    from mixencoder.base.inputs import local_path
    from mixencoder.data.candidates import read_candidates
    from mixencoder.data.examples import read_source
    from mixencoder.data.sources import Example, Source
    from mixencoder.training.checks import check_texts
    from mixencoder.training.mining import check_output, mine_negatives, write_candidate_lists

    check_on_empty(on_empty)
    data, output = local_path(data), local_path(output)
    check_output(output, [data, *([documents] if documents else [])])
    source = read_source(data)
    others = read_candidates(documents).texts if documents else ()
    engine = load_engine(model, device=device, dtype=dtype, backend=backend)
    further = Source(str(documents), "ranking", [Example(text, (), where=str(documents)) for text in others])
    check_texts([source, further], engine.tokenizer, on_empty)
    mined = mine_negatives(
        engine,
        source,
        documents=others,
        negatives=negatives,
        skip=skip,
        margin=margin,
        score=score,
        batch_size=batch_size,
        show_progress_bar=on_terminal(),
    )
    write_candidate_lists(mined, output)
    found = sum(len(example.negatives) for example in mined)
    say(f"{found} negatives for {len(mined)} queries written to {output}")
