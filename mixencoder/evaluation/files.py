"""Writing results down: TREC run files and reports, whole or not at all."""

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixencoder.errors import InputError
from mixencoder.evaluation.model_scores import Ranking
from mixencoder.evaluation.tasks import RankingTask


def check_writable(folder: Path) -> None:
    """Make a folder if it is missing; meant to be called before hours of work, not after.

    Raises:
        InputError: it cannot be made, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; expected a folder for results") from error


def check_output(file: Path, inputs: Sequence[Path]) -> None:
    """Check that a file of results can be written and is none of the data; makes its folder if it is missing.

    Raises:
        InputError: it cannot, or it is.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a file for results")
    check_writable(file.parent)
    if any(file.exists() and file.samefile(path) for path in inputs if path.exists()):
        raise InputError(f"{file} is among the data; expected another file for results")


def check_run_ids(task: RankingTask) -> None:
    """Check that a task's ids can stand in a run file, whose columns blanks separate.

    Raises:
        InputError: one holds a blank.
    """
    for name in itertools.chain(task.query_ids, *task.document_ids):
        if len(name.split()) != 1:
            raise InputError(f"{task.source}: id {name!r} cannot stand in a run file; expected ids without blanks")


def write_run(folder: Path, task: RankingTask, score: str, rankings: list[Ranking], tag: str) -> Path:
    """Write TASK.SCORE.run in TREC's format (qid Q0 docid rank score tag) and return its path.

    Args:
        folder: where.
        task: ranked; its ids stand in the file.
        score: which part of the score ranked it.
        rankings: for every query.
        tag: name of the run, without spaces.

    Raises:
        InputError: the file cannot be written.
    """
    lines = [
        f"{query} Q0 {document} {rank} {value!r} {tag}\n"
        for query, ranking in zip(task.query_ids, rankings, strict=True)
        for rank, (document, value) in enumerate(ranking, start=1)
    ]
    path = folder / f"{task.name}.{score}.run"
    write_text(path, "".join(lines))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then move it there.

    Raises:
        InputError: it cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp keeps others from reading
            Path(temporary).chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
