"""Uploading an exported model to the hub of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from gspo_lightning.errors import UserError


def check_push(repository: str | None, *, exported: bool, private: bool) -> None:
    """Refuses, before a run begins, an upload that cannot succeed at its end.

    Raises:
        UserError: nothing is exported or uploaded, the name is malformed, or there is no token.
    """
    if repository is None:
        if not private:
            raise UserError("export.private=false has no effect without export.push_to_hub; set that, or remove it")
        return
    key = f"export.push_to_hub={repository}"
    if not exported:
        raise UserError(f"{key} has no effect with export.enabled=false; remove one of them")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{key}: not the name of a repository, such as me/my-model") from error
    if get_token() is None:
        raise UserError(f"{key} needs a token: hf auth login, or the environment variable HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a folder and returns its address; the repository is created if it does not exist.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with gspo_lightning")
    except Exception as error:  # each library below that of the hub has errors of its own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"export.push_to_hub={repository}: {why}; the model is in {folder}") from error
    return address
