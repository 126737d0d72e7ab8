"""Engines of several architectures over a tiny backbone, for tests of `predict`, `rank` and encoding."""

from pathlib import Path

import torch

from mixencoder.architectures import engine_class
from mixencoder.base.engine import Engine


def untrained(architecture: str, backbone: Path, **fields: object) -> Engine:
    """Return an engine with the same random weights at every call."""
    torch.manual_seed(0)
    return engine_class(architecture).from_backbone(backbone, **fields)
