"""The six architectures by name: which class is the front door of which checkpoint. Nothing is imported before use."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixencoder.base.checkpoints.model_types import CLASS_NAMES, architecture_of
from mixencoder.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from mixencoder.fast import MixEncoder
    from mixencoder.peers.base import Peer

_MODULES = {
    "mixencoder": "mixencoder.fast",
    "cross-encoder": "mixencoder.peers.cross_encoder",
    "dual-encoder": "mixencoder.peers.dual_encoder",
    "poly-encoder": "mixencoder.peers.poly_encoder",
    "late-interaction": "mixencoder.peers.late_interaction",
    "deformer": "mixencoder.peers.deformer",
}

ARCHITECTURES = tuple(CLASS_NAMES)
"""Names, as the command line takes them."""


def front_door(architecture: str) -> "type[MixEncoder] | type[Peer]":
    """Return the class that loads and starts models of an architecture.

    Raises:
        InputError: there is none of that name.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    return getattr(importlib.import_module(_MODULES[architecture]), CLASS_NAMES[architecture])


def load_engine(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
) -> "MixEncoder | Peer":
    """Load a checkpoint of any architecture behind its front door.

    Args:
        name_or_path: a directory, a hub id, or None for the default that the package bundles.
        device, dtype: as in `MixEncoder.from_pretrained`.
        backend: of a MixEncoder's attention; the other architectures have no such choice.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it holds none of the architectures.
        InputError: the device or the dtype does not exist, or a backend was named for another architecture.
    """
    from mixencoder.base.checkpoints.checkpoint import model_type_of
    from mixencoder.bundled import default_checkpoint

    path = default_checkpoint() if name_or_path is None else name_or_path
    found = model_type_of(path)
    architecture = architecture_of(found)
    if architecture is None:
        raise CheckpointError(
            f'{path} holds a model of type "{found}"; expected a checkpoint of one of {", ".join(ARCHITECTURES)}. '
            "To build one on top of an encoder use from_backbone, or mixencoder train --backbone"
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if architecture == "mixencoder":
        options["backend"] = backend
    elif backend != "auto":
        raise InputError(f"backend is {backend!r}, but only a MixEncoder runs on one; {path} holds a {architecture}")
    return front_door(architecture).from_pretrained(path, **options)
