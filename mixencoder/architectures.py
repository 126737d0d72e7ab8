"""The six architectures by name, and the engine class of each. A class's module is imported on first use."""

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
"""Names, as on the command line."""


def engine_class(architecture: str) -> "type[MixEncoder] | type[Peer]":
    """Return the engine class of an architecture, for example to call its `from_backbone`.

    Raises:
        InputError: there is no architecture of that name.
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
    **hub: Any,
) -> "MixEncoder | Peer":
    """Load a checkpoint of any architecture, as an engine of the class that fits it.

    Args:
        name_or_path: a directory, a hub id, or None for the default that the package bundles.
        device, dtype: as in `MixEncoder.from_pretrained`.
        backend: the mixkernels backend of a MixEncoder; the other architectures have no backends.
        hub: revision, token, cache_dir, local_files_only, subfolder, as in `MixEncoder.from_pretrained`.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its model is not of this library.
        InputError: the device or the dtype does not exist, or backend is given for another architecture.
    """
    from mixencoder.base.checkpoints.checkpoint import model_type_of
    from mixencoder.base.checkpoints.locations import HubOptions, located
    from mixencoder.bundled import default_checkpoint

    path = default_checkpoint() if name_or_path is None else name_or_path
    found = model_type_of(located(path, HubOptions(**hub)))
    architecture = architecture_of(found)
    if architecture is None:
        raise CheckpointError(
            f'{path} holds a model of type "{found}"; expected a checkpoint of one of {", ".join(ARCHITECTURES)}. '
            "To build one on top of an encoder use from_backbone, or mixencoder train --backbone"
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype, **hub}
    if architecture == "mixencoder":
        options["backend"] = backend
    elif backend != "auto":
        raise InputError(f"backend is {backend!r}, but only a MixEncoder has backends; {path} holds a {architecture}")
    return engine_class(architecture).from_pretrained(path, **options)
