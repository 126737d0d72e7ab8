"""The six architectures by name: which class is the front door of which checkpoint. Nothing is imported before use."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixencoder.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from mixencoder.fast import MixEncoder
    from mixencoder.peers.base import Peer

ARCHITECTURES = {
    "mixencoder": ("mixencoder.fast", "MixEncoder"),
    "cross-encoder": ("mixencoder.peers.cross_encoder", "CrossEncoder"),
    "dual-encoder": ("mixencoder.peers.dual_encoder", "DualEncoder"),
    "poly-encoder": ("mixencoder.peers.poly_encoder", "PolyEncoder"),
    "late-interaction": ("mixencoder.peers.late_interaction", "LateInteraction"),
    "deformer": ("mixencoder.peers.deformer", "DeFormer"),
}
"""Name, as the command line takes it -> module and class of the front door."""


def front_door(architecture: str) -> "type[MixEncoder] | type[Peer]":
    """Return the class that loads and starts models of an architecture.

    Raises:
        InputError: there is none of that name.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture]
    return getattr(importlib.import_module(module), name)


def class_of(model_type: Any) -> str | None:
    """Return the name of the class that loads checkpoints of a model type, None if it is none of this library's."""
    if not isinstance(model_type, str) or model_type.partition("-")[0] != "mixencoder":
        return None
    _, name = ARCHITECTURES.get(model_type.removeprefix("mixencoder-"), (None, None))
    return name


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
    from mixencoder.bundled import default_checkpoint
    from mixencoder.checkpoint import model_type_of

    path = default_checkpoint() if name_or_path is None else name_or_path
    found = model_type_of(path)
    architecture = "mixencoder" if found == "mixencoder" else found.removeprefix("mixencoder-")
    if architecture not in ARCHITECTURES:
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
