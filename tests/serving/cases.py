"""Texts, ids and what a model says of them. Importing this skips a test file where the extra is missing."""

from typing import Any

import pytest

from mixencoder import MixEncoder

for name in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(name, reason="the extra serve is not installed")
pytest.importorskip("httpx", reason="fastapi's TestClient needs httpx")

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
