"""Find the folder of a checkpoint from the name that a user gives: a local folder, or a hub id, which is downloaded."""

import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from mixencoder.base.checkpoints.loading import hidden_progress_bars
from mixencoder.base.checkpoints.sentence_transformers import encoder_folder
from mixencoder.base.inputs import local_path
from mixencoder.durable import readable_folder, shared
from mixencoder.errors import CheckpointError, InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DOWNLOADED = ["*.json", "*.txt", "*.model", "model*.safetensors", "0_Transformer/*.safetensors"]
"""Files to download from the hub: no code, and no weights in other formats."""
_NOT_DOWNLOADED = ["onnx/*", "openvino/*", "coreml/*"]


@dataclass(frozen=True)
class HubOptions:
    """How a hub id becomes a folder; for a local folder only `subfolder` matters."""

    revision: str | None = None
    """Branch, tag or commit."""
    token: str | bool | None = field(default=None, repr=False)
    """None and True: the token that was stored by ``hf auth login``; False: none."""
    cache_dir: str | Path | None = None
    """None: the hub's own cache."""
    local_files_only: bool = False
    """Whether to take what is in the cache, without asking the hub."""
    subfolder: str = ""
    """Folder below that holds the checkpoint."""


def located(name_or_path: str | Path, hub: HubOptions) -> str | Path:
    """Return a checkpoint's folder if there are options, else the name as it is, to be looked up by its readers.

    Raises:
        CheckpointError: as `checkpoint_root`, or there is no such subfolder.
        InputError: subfolder leads out of the folder.
    """
    if hub == HubOptions():
        return name_or_path
    below = PurePosixPath(hub.subfolder)
    if below.is_absolute() or ".." in below.parts:
        raise InputError(f"subfolder is {hub.subfolder!r}; expected a folder below {name_or_path}")
    folder = checkpoint_root(name_or_path, hub) / below
    if not folder.is_dir():
        raise CheckpointError(f"{name_or_path} holds no folder {hub.subfolder!r}")
    return folder


def checkpoint_root(name_or_path: str | Path, hub: HubOptions = HubOptions()) -> Path:
    """Return a checkpoint's folder, without the subfolder; a hub model is downloaded unless it is in the cache.

    Raises:
        CheckpointError: there is no such folder or model, or the hub cannot be reached.
    """
    try:
        path = local_path(name_or_path)
        if path.is_dir():
            return readable_folder(path)
        is_id = isinstance(name_or_path, str) and not path.exists() and _HUB_ID.fullmatch(name_or_path)
    except (OSError, RuntimeError, ValueError) as error:
        # an unknown home folder, a name that is too long, or a NUL in it
        raise CheckpointError(f"{str(name_or_path)!r} cannot name a directory: {error}") from error
    if not is_id:
        raise CheckpointError(
            f"{name_or_path} is not a directory; expected a checkpoint's directory, or a hub id such as owner/model"
        )
    return _downloaded(name_or_path, hub)


def model_folder(name_or_path: str | Path) -> Path:
    """Return the folder that holds a checkpoint's config.json and weights: `checkpoint_root`, or one below it.

    Raises:
        CheckpointError: there is no such folder or model, or the hub cannot be reached.
    """
    return encoder_folder(checkpoint_root(name_or_path))


@contextmanager
def locked_for_reading(name_or_path: str | Path) -> Generator[None]:
    """Keep others from replacing a checkpoint while its configuration, weights and tokenizer are read."""
    with ExitStack() as stack:
        # a folder that cannot be locked gives a better error when it is read
        with suppress(OSError, RuntimeError, ValueError):
            stack.enter_context(shared(local_path(name_or_path)))
        yield


def full_name(name_or_path: str | Path) -> str:
    """Return the name to store for a checkpoint: a folder's path with ``~`` expanded, or the hub id as it is."""
    path = local_path(name_or_path)
    return str(path if path.is_dir() else name_or_path)


def _downloaded(hub_id: str, hub: HubOptions) -> Path:
    start = f'there is no folder "{hub_id}", so it was looked up on the Hugging Face hub, '
    end = "To load a checkpoint from this machine, name its folder"
    below = [str(PurePosixPath(hub.subfolder) / pattern) for pattern in _DOWNLOADED]
    try:
        with hidden_progress_bars():
            folder = snapshot_download(
                hub_id,
                allow_patterns=below,
                ignore_patterns=_NOT_DOWNLOADED,
                revision=hub.revision,
                token=hub.token,
                cache_dir=hub.cache_dir,
                local_files_only=hub.local_files_only,
            )
            return Path(folder)
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{start}which has no model of that name, or none that you may read. {end}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{start}which has no revision {hub.revision!r} of it. {end}") from error
    # network libraries raise errors of many classes
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if hub.local_files_only:
            raise CheckpointError(
                f'there is no folder "{hub_id}", and no earlier download of it with these options ({reason}). Allow '
                "the download (local_files_only=False), or name a folder"
            ) from error
        raise CheckpointError(
            f"{start}which could not be reached ({reason}), and no earlier download was found. {end}"
        ) from error
