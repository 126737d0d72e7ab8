"""The architectures that MixEncoder is compared with: complete models, with the methods of `MixEncoder`.

One file holds an architecture's configuration, torch module and engine. `base` has what the engines share, `modeling`
and `packed` what the torch modules of some share.

A public name is imported when it is first used, so that importing the package is quick. This also registers its
configuration and model with transformers' Auto classes.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixencoder.peers.cross_encoder import CrossEncoder
    from mixencoder.peers.deformer import DeFormer
    from mixencoder.peers.dual_encoder import DualEncoder
    from mixencoder.peers.late_interaction import LateInteraction
    from mixencoder.peers.poly_encoder import PolyEncoder

_HOMES = {
    "CrossEncoder": "cross_encoder",
    "DeFormer": "deformer",
    "DualEncoder": "dual_encoder",
    "LateInteraction": "late_interaction",
    "PolyEncoder": "poly_encoder",
}

__all__ = ["CrossEncoder", "DeFormer", "DualEncoder", "LateInteraction", "PolyEncoder"]


def __getattr__(name: str) -> object:
    """Import the module that holds a public name when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
