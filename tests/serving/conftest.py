"""A calibrated tiny model, an index of it, and servers of both, asked in this process.

The imports that need the extra are in the fixtures: without it the tests are skipped, by `tests.serving.cases`.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mixencoder import CandidateIndex, MixEncoder


@pytest.fixture(scope="session")
def model(checkpoint: str) -> MixEncoder:
    """Return a tiny model whose scores are calibrated."""
    engine = MixEncoder.from_pretrained(checkpoint)
    engine.config.calibration = {"temperature": 2.0, "bias": -0.5}
    return engine


@pytest.fixture(scope="session")
def stored(model: MixEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an index, to be read or copied."""
    from tests.serving.cases import DOCUMENTS, IDS, METADATA

    path = tmp_path_factory.mktemp("stored") / "index"
    model.index(DOCUMENTS, IDS, path, metadata=METADATA).close()
    return path


@pytest.fixture(scope="session")
def calibrated(model: MixEncoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of the model's checkpoint, for a server process."""
    path = tmp_path_factory.mktemp("calibrated") / "tiny"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """Return a copy of the index to change."""
    return Path(shutil.copytree(stored, tmp_path / "index"))


@pytest.fixture
def open_index(model: MixEncoder) -> Iterator[Callable[..., CandidateIndex]]:
    """Return a function that opens an index as the server does."""
    from mixencoder.serving.ranking import quiet_engine

    with ExitStack() as stack:
        yield lambda path, **options: stack.enter_context(quiet_engine(model).open_index(path, **options))


@pytest.fixture
def serve(model: MixEncoder, open_index: Callable[..., CandidateIndex]) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a server with settings and returns a client of it."""
    from fastapi.testclient import TestClient

    from mixencoder.serving.app import create_app
    from mixencoder.serving.settings import ServeConfig

    with ExitStack() as stack:

        def start(path: Path | None = None, engine: MixEncoder = model, **settings: Any) -> TestClient:
            config = ServeConfig(**settings)
            index = None if path is None else open_index(path, read_only=not config.allow_writes)
            return stack.enter_context(TestClient(create_app(config, engine, index), raise_server_exceptions=False))

        yield start


@pytest.fixture
def client(serve: Callable[..., Any], stored: Path) -> Any:
    """Return a client of a read-only server with an index."""
    return serve(stored)
