"""The model types in checkpoints of this library, and the class that loads each."""

from typing import Any

CLASS_NAMES = {
    "mixencoder": "MixEncoder",
    "cross-encoder": "CrossEncoder",
    "dual-encoder": "DualEncoder",
    "poly-encoder": "PolyEncoder",
    "late-interaction": "LateInteraction",
    "deformer": "DeFormer",
}
"""From an architecture's name, as on the command line, to its engine class."""


def architecture_of(model_type: Any) -> str | None:
    """Return the architecture for the model type in a config.json; None if it is not of this library.

    The type is "mixencoder", or "mixencoder-" followed by the name of another architecture.
    """
    if model_type == "mixencoder":
        return "mixencoder"
    name = model_type.removeprefix("mixencoder-") if isinstance(model_type, str) else None
    return name if name in CLASS_NAMES and model_type != name else None
