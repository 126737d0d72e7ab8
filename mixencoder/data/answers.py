"""Right documents across rows: what is right for a query in one row is wrong for it in no other."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mixencoder.data.sources import RANKINGS, Example, Source

logger = logging.getLogger(__name__)


def right_documents(examples: Iterable[Example]) -> dict[str, set[str]]:
    """Return the right documents of every query, both without the blanks around them, over all rows."""
    right: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        right[example.query.strip()].update(map(str.strip, example.positives), example.known_right)
    return dict(right)


def with_known_answers(sources: Sequence[Source]) -> list[Source]:
    """Return sources whose rankings know every right document of their queries, in whatever row and source it stands.

    Listed wrong documents that are right elsewhere are taken off the lists, counted and said.
    """
    right = right_documents(example for source in sources if source.task in RANKINGS for example in source.examples)
    shared = {query: frozenset(documents) for query, documents in right.items()}
    return [_informed(source, shared) if source.task in RANKINGS else source for source in sources]


def _informed(source: Source, right: Mapping[str, frozenset[str]]) -> Source:
    examples, dropped, first = [], 0, ""
    for example in source.examples:
        known = right[example.query.strip()]
        wrong = tuple(text for text in example.negatives if text.strip() not in known)
        if len(wrong) < len(example.negatives):
            dropped, first = dropped + len(example.negatives) - len(wrong), first or example.where
        told = len(known) == len({text.strip() for text in example.positives})
        examples.append(example._replace(negatives=wrong, known_right=frozenset() if told else known))
    if dropped:
        logger.warning(
            "%s: %d listed wrong documents are right for their query, in their own row or another, and are left out; "
            "the first: %s",
            source.name,
            dropped,
            first,
        )
    return dataclasses.replace(source, examples=examples)
