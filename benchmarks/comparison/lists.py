"""Make longer candidate lists from shorter ones, to measure quality as lists grow."""

import json
import random
from pathlib import Path

from mixencoder.data.examples import read_ranking_rows
from mixencoder.evaluation.files import write_text


def write_long_lists(source: Path, target: Path, candidates: int, seed: int) -> None:
    """Extend every list of a file with candidates of its other lists, drawn at random.

    No candidate occurs twice, and none is drawn that is part of the query.

    Args:
        source: file of candidate lists (query, candidates, labels).
        target: JSON lines, written whole or not at all.
        candidates: length of the lists afterwards.
        seed: of the draw.

    Raises:
        ValueError: the file holds fewer distinct candidates for a query.
    """
    rows = list(read_ranking_rows(source))
    pool = sorted({text for _, texts, _ in rows for text in texts})
    generator = random.Random(seed)
    lines = []
    for query, texts, labels in rows:
        # repeated texts would always tie
        own = dict(zip(reversed(texts), reversed(labels), strict=True))
        # a text inside the query, such as a message of the same dialogue, would score high just for that
        others = [text for text in pool if text not in own and text not in query]
        if (found := len(own) + len(others)) < candidates:
            raise ValueError(
                f"{source} holds {found} distinct candidates; expected at least {candidates} for {query[:40]!r}"
            )
        drawn = generator.sample(others, candidates - len(own))
        row = {"query": query, "candidates": [*own, *drawn], "labels": [*map(float, own.values()), *[0] * len(drawn)]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "".join(lines))
