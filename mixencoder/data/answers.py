"""Collect the right documents of each query over all rows, so that no row trains one of them as wrong."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mixencoder.data.sources import RANKINGS, Example, Source

logger = logging.getLogger(__name__)


def right_documents(examples: Iterable[Example]) -> dict[str, set[str]]:
    """Return {query: its right documents} over all rows, both without surrounding whitespace."""
    right: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        right[example.query.strip()].update(map(str.strip, example.positives), example.known_right)
    return dict(right)


def with_known_answers(sources: Sequence[Source]) -> list[Source]:
    """Return sources in which every ranking example knows all right documents of its query, from all rows and sources.

    A listed wrong document that is right in some row is dropped from the list; a warning gives the number.
    """
    right = right_documents(example for source in sources if source.task in RANKINGS for example in source.examples)
    shared = {query: frozenset(documents) for query, documents in right.items()}
    return [_add_known_answers(source, shared) if source.task in RANKINGS else source for source in sources]


def _add_known_answers(source: Source, right: Mapping[str, frozenset[str]]) -> Source:
    examples, dropped, first = [], 0, ""
    for example in source.examples:
        known = right[example.query.strip()]
        wrong = tuple(text for text in example.negatives if text.strip() not in known)
        if len(wrong) < len(example.negatives):
            dropped, first = dropped + len(example.negatives) - len(wrong), first or example.where
        is_complete = len(known) == len({text.strip() for text in example.positives})
        examples.append(example._replace(negatives=wrong, known_right=frozenset() if is_complete else known))
    if dropped:
        logger.warning(
            "%s: %d listed wrong documents are right for their query, in their own row or another, and are left out; "
            "the first: %s",
            source.name,
            dropped,
            first,
        )
    return dataclasses.replace(source, examples=examples)
