"""MixEncoder: cross-attention quality for ranking many candidates, with the candidates encoded ahead of time.

`MixEncoder` is the class to start with. Public names are imported on first use, so that importing the package is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixencoder.base.results import RankResult
    from mixencoder.configuration import MixEncoderConfig
    from mixencoder.errors import (
        CheckpointError,
        DataError,
        DuplicateIdError,
        EmptyTextWarning,
        ForkedProcessError,
        IndexDamagedError,
        IndexLockedError,
        IndexMismatchError,
        IndexStateError,
        IndexStorageError,
        InputError,
        MissingExtraError,
        MixEncoderError,
        NonFiniteError,
        TruncationWarning,
        UnknownIdError,
        UnsupportedBackboneError,
    )
    from mixencoder.explanation.result import PairExplanation
    from mixencoder.fast import MixEncoder
    from mixencoder.index import CandidateIndex, Snapshot
    from mixencoder.modeling import MixEncoderModel, QueryState

# the module of each public name
_HOMES = {
    "CandidateIndex": "index",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DuplicateIdError": "errors",
    "EmptyTextWarning": "errors",
    "ForkedProcessError": "errors",
    "IndexDamagedError": "errors",
    "IndexLockedError": "errors",
    "IndexMismatchError": "errors",
    "IndexStateError": "errors",
    "IndexStorageError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "MixEncoder": "fast",
    "MixEncoderConfig": "configuration",
    "MixEncoderError": "errors",
    "MixEncoderModel": "modeling",
    "NonFiniteError": "errors",
    "PairExplanation": "explanation.result",
    "QueryState": "modeling",
    "RankResult": "base.results",
    "Snapshot": "index",
    "TruncationWarning": "errors",
    "UnknownIdError": "errors",
    "UnsupportedBackboneError": "errors",
}

__all__ = [
    "CandidateIndex",
    "CheckpointError",
    "DataError",
    "DuplicateIdError",
    "EmptyTextWarning",
    "ForkedProcessError",
    "IndexDamagedError",
    "IndexLockedError",
    "IndexMismatchError",
    "IndexStateError",
    "IndexStorageError",
    "InputError",
    "MissingExtraError",
    "MixEncoder",
    "MixEncoderConfig",
    "MixEncoderError",
    "MixEncoderModel",
    "NonFiniteError",
    "PairExplanation",
    "QueryState",
    "RankResult",
    "Snapshot",
    "TruncationWarning",
    "UnknownIdError",
    "UnsupportedBackboneError",
]

try:
    __version__ = version("mixencoder")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """Import the module that holds a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
