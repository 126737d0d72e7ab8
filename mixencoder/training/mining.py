"""Mine hard negatives: wrong documents that a trained model ranks highest, written as candidate lists."""

import gzip
import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path

import torch

from mixencoder.base.encoding import EncodingEngine
from mixencoder.base.engine import Engine
from mixencoder.base.inputs import positive_integer
from mixencoder.data.answers import right_documents
from mixencoder.data.sources import RANKINGS, Example, Source
from mixencoder.durable import replacing
from mixencoder.errors import DataError, InputError
from mixencoder.progress import progress_bar

logger = logging.getLogger(__name__)


def mine_negatives(
    engine: Engine,
    source: Source,
    *,
    documents: Sequence[str] = (),
    negatives: int = 8,
    skip: int = 0,
    margin: float | None = None,
    score: str = "full",
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> list[Example]:
    """Return a source's examples with the wrong documents that a model ranks highest as their negatives.

    A document that is right for the query in any row is never a negative. Warns if queries are left without negatives.

    Args:
        engine: a trained model that encodes documents ahead of time.
        source: ranking examples; their documents may become negatives of other queries.
        documents: further documents that may become negatives.
        negatives: most negatives of each query.
        skip: skip this many of the highest wrong documents; they may be unlabelled positives.
        margin: a negative scores at least this much below the lowest right document of its query, so that queries that
            the model gets wrong have few or none. None: no limit.
        score: part of the score to rank by, one of the model's `score_terms`.
        batch_size, show_progress_bar: as in `EncodingEngine.encode_document`.

    Raises:
        InputError: the model cannot encode documents ahead of time, or a number is out of range.
        DataError: the source holds no ranking examples.
    """
    if not isinstance(engine, EncodingEngine):
        raise InputError(
            f"a {type(engine).__name__} cannot encode documents ahead of time, and would read every document with "
            "every query; expected another architecture"
        )
    negatives = positive_integer(negatives, "negatives")
    skip = 0 if skip == 0 and not isinstance(skip, bool) else positive_integer(skip, "skip")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, Real) or not math.isfinite(margin)):
        raise InputError(f"margin is {margin!r}; expected a number or None")
    if source.task not in RANKINGS:
        raise DataError(f"{source.name} holds examples of {source.task}; expected ranking")
    pool = list(dict.fromkeys([text for e in source.examples for text in (*e.positives, *e.negatives)] + [*documents]))
    position = {text: number for number, text in enumerate(pool)}
    # texts that differ only in surrounding whitespace are one document
    copies: dict[str, list[int]] = defaultdict(list)
    for text, number in position.items():
        copies[text.strip()].append(number)
    known = right_documents(source.examples)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    encoded = engine.encode_document(pool, **options)
    mined = []
    with progress_bar(len(source.examples), "Mining", "query", show_progress_bar) as bar:
        for start in range(0, len(source.examples), batch_size):
            examples = source.examples[start : start + batch_size]
            queries = engine.encode_query([example.query for example in examples], batch_size=batch_size)
            for example, scores in zip(examples, engine.interact(queries, encoded, score=score), strict=True):
                right = [number for text in known[example.query.strip()] for number in copies[text]]
                # a copy, so as not to write into an engine's result
                allowed = scores.clone()
                if margin is not None:
                    own = [position[text] for text in example.positives]
                    allowed[scores > scores[own].min() - margin] = -torch.inf
                allowed[right] = -torch.inf
                best = allowed.topk(min(skip + negatives, len(pool)))
                found = best.indices[skip:][torch.isfinite(best.values[skip:])]
                mined.append(example._replace(negatives=tuple(pool[number] for number in found.tolist())))
                bar.update()
    bare = [example for example in mined if not example.negatives]
    if bare:
        logger.warning(
            "%d of %d queries are left without negatives (margin, skip, or no other document); the first: %s",
            len(bare),
            len(mined),
            bare[0].where or repr(bare[0].query),
        )
    return mined


def check_output(path: Path, read: Iterable[str | Path]) -> None:
    """Check that candidate lists can be written to a file; to be called before mining.

    Args:
        path: the file.
        read: files that are read, which must not be overwritten.

    Raises:
        InputError: it is a folder, is one of the files that are read, or cannot be written.
    """
    try:
        if any(path.exists() and Path(other).exists() and path.samefile(other) for other in read):
            raise InputError(f"{path} is a file that is read here; name another output")
        if path.is_dir():
            raise InputError(f"{path} is a folder; expected a file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be written: {error}") from error


def write_candidate_lists(examples: Sequence[Example], path: Path) -> None:
    """Write ranking examples as JSON lines with query, candidates and labels, completely or not at all.

    Raises:
        DataError: it cannot be written.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with replacing(path) as draft, open_file(draft, "wt", encoding="utf-8") as file:
            for example in examples:
                grades = example.grades or (1,) * len(example.positives)
                row = {
                    "query": example.query,
                    "candidates": [*example.positives, *example.negatives],
                    "labels": [*grades, *(0 for _ in example.negatives)],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
