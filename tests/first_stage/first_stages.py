"""First stages that need no library: an exact one of the protocol, and a library that searches all vectors in NumPy."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixencoder import MixEncoder
from mixencoder.first_stage.libraries import Library, Options
from tests.conftest import WORDS

N = 700
QUERIES = ["how to cook rice", "undo the git commit", "paris"]
NAMES = [f"id{number}" for number in range(N)]
KEPT = 128
"""What prefilter="auto" chooses for ten results."""


def long_texts():
    """N distinct texts, of which most are longer than the model reads."""
    random_words = random.Random(0)
    return [" ".join(random_words.choices(WORDS, k=10 + number % 110)) for number in range(N)]


def embeddings(count=N, seed=0, k=2):
    return torch.randn(count, k, 32, generator=torch.Generator().manual_seed(seed))


def made(path, *, dual_term=True, scale=0.5, seed=0, **options):
    torch.manual_seed(seed)
    # a small dual term, so that the best by dual score are not the best by full score
    config = {"num_context_embeddings": 2, "dual_term": dual_term, "dual_scale_init": scale, **options}
    return MixEncoder.from_backbone(path, **config)


def exact(positions, vectors, queries, count):
    """Positions of the vectors with the largest inner products, (Q, count), best first; -1 where there are no more."""
    order = np.argsort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1, kind="stable")[:, :count]
    found = np.full((len(queries), count), -1, dtype=np.int64)
    found[:, : order.shape[1]] = positions[order]
    return found


class Searched:
    """A first stage over all vectors of an index; each result may be changed before it is returned."""

    def __init__(self, engine, index, change=lambda found: found):
        parts = list(engine.dual_vectors(index, size=100))
        self.positions = np.concatenate([part.positions for part in parts])
        self.vectors = np.concatenate([part.vectors for part in parts])
        self.change, self.calls = change, []

    def search(self, vectors, count):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        self.calls.append((len(vectors), count))
        return self.change(exact(self.positions, self.vectors, vectors, count))


class ExactLibrary(Library):
    """Searches all vectors."""

    kind = "exact"

    def __init__(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        self.positions, self.vectors = positions, vectors

    @classmethod
    def module(cls) -> Any:
        return np

    @classmethod
    def make(cls, options: Options, dimension: int, *, repeats: bool) -> "ExactLibrary":
        return cls(np.empty(0, np.int64), np.empty((0, dimension), np.float32))

    @classmethod
    def load(cls, path: Path, options: Options) -> "ExactLibrary":
        with path.open("rb") as file:
            return cls(np.load(file), np.load(file))

    def add(self, positions: np.ndarray, vectors: np.ndarray) -> None:
        self.positions = np.concatenate([self.positions, positions])
        self.vectors = np.concatenate([self.vectors, vectors])

    def search(self, vectors: np.ndarray, count: int) -> np.ndarray:
        return exact(self.positions, self.vectors, vectors, count)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, self.positions)
            np.save(file, self.vectors)

    def size(self) -> tuple[int, int]:
        return self.vectors.shape
