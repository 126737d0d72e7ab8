"""The model types that checkpoints of this library name, and the class that users load each with."""

from typing import Any

CLASS_NAMES = {
    "mixencoder": "MixEncoder",
    "cross-encoder": "CrossEncoder",
    "dual-encoder": "DualEncoder",
    "poly-encoder": "PolyEncoder",
    "late-interaction": "LateInteraction",
    "deformer": "DeFormer",
}
"""Architecture, as the command line takes it -> name of its class."""


def architecture_of(model_type: Any) -> str | None:
    """Return the architecture of a checkpoint by the model type in its config.json; None if it is not of this library.

    The type is "mixencoder", or "mixencoder-" and the name of another architecture.
    """
    if model_type == "mixencoder":
        return "mixencoder"
    name = model_type.removeprefix("mixencoder-") if isinstance(model_type, str) else None
    return name if name in CLASS_NAMES and model_type != name else None
