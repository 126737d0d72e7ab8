"""MixEncoder: cross-attention quality for ranking many candidates, with the candidates encoded ahead of time.

`MixEncoder` is the front door; public names are bound on first use, so that importing the package is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixencoder.configuration import MixEncoderConfig
    from mixencoder.fast import MixEncoder
    from mixencoder.modeling import MixEncoderModel, QueryState

_HOMES = {
    "MixEncoder": "fast",
    "MixEncoderConfig": "configuration",
    "MixEncoderModel": "modeling",
    "QueryState": "modeling",
}

__all__ = ["MixEncoder", "MixEncoderConfig", "MixEncoderModel", "QueryState"]

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
