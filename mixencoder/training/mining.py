"""Hard negatives: wrong documents that a trained model takes for right ones, written as candidate lists."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mixencoder.engine import EncodingEngine, Engine
from mixencoder.errors import DataError, InputError
from mixencoder.progress import progress_bar
from mixencoder.training.examples import Example, Source


def mine_negatives(
    engine: Engine,
    source: Source,
    *,
    documents: Sequence[str] = (),
    negatives: int = 8,
    skip: int = 0,
    margin: float = 0.0,
    score: str = "full",
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> list[Example]:
    """Return a source's examples with the wrong documents that a model ranks highest as their negatives.

    Args:
        engine: a trained model that encodes documents ahead of time.
        source: ranking examples; all their documents may serve as negatives of others.
        documents: further ones that may.
        negatives: how many for each query, at most.
        skip: so many of the highest are passed over, as they may be right without being marked so.
        margin: a negative scores at least so much less than the lowest right document of its query.
        score: by which part of the score, of the model's `score_terms`.
        batch_size, show_progress_bar: as in `EncodingEngine.encode_document`.

    Raises:
        InputError: the model cannot encode documents ahead of time, or a number is out of range.
        DataError: the source holds no ranking examples.
    """
    if not isinstance(engine, EncodingEngine):
        raise InputError(
            f"a {type(engine).__name__} encodes nothing ahead of time, so that it would read every document with every "
            "query; mine with another architecture"
        )
    for name, value, least in (("negatives", negatives, 1), ("skip", skip, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
    if source.task not in ("ranking", "graded"):
        raise DataError(f"{source.name} holds examples of {source.task}; expected ranking")
    pool = list(dict.fromkeys([text for e in source.examples for text in (*e.positives, *e.negatives)] + [*documents]))
    number = {text: place for place, text in enumerate(pool)}
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    encoded = engine.encode_document(pool, **options)
    mined = []
    with progress_bar(len(source.examples), "Mining", "query", show_progress_bar) as bar:
        for start in range(0, len(source.examples), batch_size):
            examples = source.examples[start : start + batch_size]
            queries = engine.encode_query([example.query for example in examples], batch_size=batch_size)
            for example, scores in zip(examples, engine.interact(queries, encoded, score=score), strict=True):
                right = torch.tensor([number[text] for text in example.positives], device=scores.device)
                ceiling = scores[right].min() - margin
                scores = scores.masked_fill(scores > ceiling, -torch.inf)
                scores[right] = -torch.inf
                best = scores.topk(min(skip + negatives, len(pool)))
                places = best.indices[skip:][torch.isfinite(best.values[skip:])]
                mined.append(example._replace(negatives=tuple(pool[place] for place in places.tolist())))
                bar.update()
    return mined


def write_candidate_lists(examples: Sequence[Example], path: Path) -> None:
    """Write ranking examples as JSON lines with query, candidates and labels; the file is there whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(temporary, "wt", encoding="utf-8") as file:
            for example in examples:
                grades = example.grades or (1,) * len(example.positives)
                row = {
                    "query": example.query,
                    "candidates": [*example.positives, *example.negatives],
                    "labels": [*grades, *(0 for _ in example.negatives)],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error}") from error
