"""Write TREC run files and reports, each completely or not at all."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixencoder.durable import replace_file
from mixencoder.errors import InputError
from mixencoder.evaluation.model_scores import Ranking
from mixencoder.evaluation.tasks import RankingTask


def check_writable(folder: Path) -> None:
    """Make a folder if it is missing, and check that it can be written; to be called before hours of work.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; expected a folder for results") from error


def check_output(file: Path, inputs: Sequence[Path]) -> None:
    """Check that a file of results can be written and is not one of the data; make its folder if it is missing.

    Raises:
        InputError: it cannot be written, or is one of the data.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a file for results")
    check_writable(file.parent)
    if any(file.exists() and file.samefile(path) for path in inputs if path.exists()):
        raise InputError(f"{file} is among the data; expected another file for results")


def check_run_ids(task: RankingTask) -> None:
    """Check that a task's ids can be written to a run file, whose columns are separated by spaces.

    Raises:
        InputError: an id is empty or holds whitespace.
    """
    for name in itertools.chain(task.query_ids, *task.document_ids):
        if len(name.split()) != 1:
            raise InputError(f"{task.source}: id {name!r} cannot be written to a run file; expected ids without spaces")


def write_run(folder: Path, task: RankingTask, score: str, rankings: list[Ranking], tag: str) -> Path:
    """Write TASK.SCORE.run in TREC's format (qid Q0 docid rank score tag) and return its path.

    Args:
        folder: folder to write to.
        task: the task that was ranked.
        score: part of the score that it was ranked by.
        rankings: the ranking of every query.
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
    """Write a file completely or not at all (`mixencoder.durable.replace_file`).

    Raises:
        InputError: it cannot be written.
    """
    try:
        replace_file(path, text)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
