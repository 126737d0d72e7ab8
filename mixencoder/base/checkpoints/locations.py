"""Where a checkpoint lies that a user named: a folder, the encoder's folder inside it, or a model of the hub."""

import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from mixencoder.base.checkpoints.loading import quiet_bars
from mixencoder.base.checkpoints.sentence_transformers import encoder_folder
from mixencoder.base.inputs import local_path
from mixencoder.durable import readable_folder, shared
from mixencoder.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_READ = ["*.json", "*.txt", "*.model", "model*.safetensors", "0_Transformer/*.safetensors"]
"""What is fetched of a model of the hub: no code, and no weights in other formats."""
_LEFT_OUT = ["onnx/*", "openvino/*", "coreml/*"]


def root_of(name_or_path: str | Path) -> Path:
    """Return the folder that a name stands for, a model of the hub fetched first if need be.

    Raises:
        CheckpointError: nothing is there, or the hub cannot be reached.
    """
    try:
        path = local_path(name_or_path)
        if path.is_dir():
            return readable_folder(path)
        is_id = isinstance(name_or_path, str) and not path.exists() and _HUB_ID.fullmatch(name_or_path)
    except (OSError, RuntimeError, ValueError) as error:
        # nobody's home folder, a name too long, a NUL in it
        raise CheckpointError(f"{str(name_or_path)!r} names no directory: {error}") from error
    if not is_id:
        raise CheckpointError(
            f"{name_or_path} is not a directory; expected a checkpoint's directory, or a hub id such as owner/model"
        )
    return _fetched(name_or_path)


def located(name_or_path: str | Path) -> Path:
    """Return the folder to read a model from: where saving was interrupted, the one that holds the whole checkpoint.

    Raises:
        CheckpointError: nothing is there, or the hub cannot be reached.
    """
    return encoder_folder(root_of(name_or_path))


@contextmanager
def held(name_or_path: str | Path) -> Generator[None]:
    """Keep savers from replacing a checkpoint while configuration, weights and tokenizer are read one after another."""
    with ExitStack() as stack:
        # what cannot be opened is refused where it is read, with the reason
        with suppress(OSError, RuntimeError, ValueError):
            stack.enter_context(shared(local_path(name_or_path)))
        yield


def shown_name(name_or_path: str | Path) -> str:
    """Return a name that stands for the same wherever it is kept: a folder's path without ``~``, or a hub id."""
    path = local_path(name_or_path)
    return str(path if path.is_dir() else name_or_path)


def _fetched(hub_id: str) -> Path:
    start = f'there is no folder "{hub_id}", so it was taken for a model of the Hugging Face hub, '
    end = "To load a checkpoint from this machine, name its folder"
    try:
        with quiet_bars():
            return Path(snapshot_download(hub_id, allow_patterns=_READ, ignore_patterns=_LEFT_OUT))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{start}which has none of that name, or none that you may read. {end}") from error
    # whatever goes wrong in a network, its libraries have an error of their own for
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{start}which could not be reached ({reason}), and which was not fetched earlier. {end}"
        ) from error
