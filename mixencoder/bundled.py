"""The folder of the bundled checkpoint. Imports no model code, so that looking it up is quick."""

from pathlib import Path

from mixencoder.errors import CheckpointError


def default_checkpoint() -> Path:
    """Return the folder of the checkpoint that the package bundles.

    Raises:
        CheckpointError: this installation has no bundled checkpoint.
    """
    path = Path(__file__).parent / "pretrained"
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"the bundled checkpoint is missing from {path}; reinstall mixencoder or name a checkpoint"
        )
    return path
