"""Training data in memory: sources and their examples."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

TASKS = ("ranking", "graded", "classification", "similarity")
RANKINGS = ("ranking", "graded")
"""The tasks whose documents are right or wrong."""


class Example(NamedTuple):
    """One training example of any task."""

    query: str
    positives: tuple[str, ...]
    """The right documents; for labelled and scored pairs the pair's one document."""
    negatives: tuple[str, ...] = ()
    """Listed wrong documents."""
    target: float = 0.0
    """Class number or similarity score; unused for ranking."""
    grades: tuple[float, ...] = ()
    """Grade of each positive, above 0; only for graded ranking."""
    where: str = ""
    """File and line, or row, for messages."""
    known_right: frozenset[str] = frozenset()
    """The query's right documents in all rows, without surrounding whitespace; empty if this row lists them all."""


@dataclass(frozen=True)
class Source:
    """One data file, or one BEIR folder, checked and in memory."""

    name: str
    task: str
    """One of `TASKS`."""
    examples: list[Example]
    weight: float = 1.0
    """How often batches come from here, relative to the other sources."""


def content_hash(source: Source) -> str:
    """Return the number of a source's examples, and a hash of its task and examples (without `where`)."""
    content = hashlib.sha256(source.task.encode())
    for example in source.examples:
        content.update(repr(example[: Example._fields.index("where")]).encode())
    return f"{len(source.examples)} {content.hexdigest()}"
