"""Texts, ids and what a model says of them."""

from typing import Any

from mixencoder import MixEncoder

QUERY = "how to undo a git commit"
OTHER_QUERY = "what is the capital of france"
DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "dog sat", "boil water"]
IDS = ["rice", "git", "../../etc/passwd", "dog?x=1", "水 1"]
METADATA = [{"topic": "food", "rank": 1}, {"topic": "git"}, None, None, {"liquid": True}]


def expected(
    model: MixEncoder, query: str, documents: Any = None, *, raw: bool = False, **options: Any
) -> list[tuple[Any, float]]:
    """Return (id or position, score) best first, as the model itself ranks."""
    ranking = model.rank(query, DOCUMENTS if documents is None else documents, return_probabilities=not raw, **options)
    return [(entry.get("id", entry["corpus_id"]), entry["score" if raw else "probability"]) for entry in ranking]
