"""Upload an export to the hub of Hugging Face, or another at ``HF_ENDPOINT``."""

from __future__ import annotations

from pathlib import Path

from ser_ray.schema import UserError, reason_of


def check(name: str) -> None:
    """Raises UserError, before any work, for a name that no repository can have, and where nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {reason_of(error, 160)}; give USER/NAME") from None
    if name.count("/") != 1:
        raise UserError(f"--push {name}: give USER/NAME, such as anna/emotions")
    if get_token() is None:
        raise UserError("--push: not logged in to the hub; run hf auth login, or set HF_TOKEN to one that may write")


def upload(directory: Path, name: str) -> str:
    """Upload all files of ``directory`` to the repository ``name``; returns its address.

    One that is not there is made private: whether a model of people's voices is published is decided there, by a
    person. Raises UserError where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Exported by ser_ray")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(
            f"--push {name}: {reason_of(error, 200)}; the export is in {directory}, and the same command tries again"
        ) from None
    return str(address)
