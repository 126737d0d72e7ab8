"""Upload a checkpoint's folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi

from mixencoder.base.checkpoints.loading import hidden_progress_bars
from mixencoder.base.checkpoints.model_card import CARD
from mixencoder.durable import readable_folder
from mixencoder.errors import CheckpointError

_UPLOADED = ["*.json", "*.txt", "*.model", "*.safetensors", CARD, "training.yaml"]
"""Files to upload: those of a checkpoint, and nothing else that the folder may hold."""


def upload(
    folder: Path,
    repo_id: str,
    message: str,
    *,
    token: str | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    exist_ok: bool,
    replace_model_card: bool,
) -> str:
    """Upload a folder, and return the address of the commit or pull request; arguments as in `push_to_hub`.

    Raises:
        CheckpointError: the folder holds no checkpoint, or the hub refused or could not be reached.
    """
    folder = readable_folder(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; expected the folder of a checkpoint")
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=exist_ok or create_pr).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = [] if replace_model_card or not api.file_exists(repo_id, CARD, revision=revision) else [CARD]
        with hidden_progress_bars():
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=_UPLOADED,
                ignore_patterns=kept,
            )
    # network libraries raise errors of many classes
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{repo_id} could not be uploaded to the Hugging Face hub: {reason}") from error
    return commit.pr_url or commit.commit_url
