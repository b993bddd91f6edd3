"""Snapshots of the Hugging Face hub: cached ones, and downloads with their errors."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from nalora_jax.errors import NaloraError
from nalora_jax.weights.hf import INDEX, SafetensorsFolder

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "1_Pooling/config.json",
    "*.safetensors",
    INDEX,
)


def _snapshot(repository: str, file: str, *, local: bool) -> Path:
    """Returns a repository's folder, with ``file`` only or with the model's files.

    Copies of the weights in subfolders are left out.
    """
    patterns, unwanted = [*HUB_FILES], ["*/*.safetensors", "consolidated*"]
    if file:
        patterns, unwanted = [file], []
    return Path(
        huggingface_hub.snapshot_download(
            repository, local_files_only=local, allow_patterns=patterns, ignore_patterns=unwanted
        )
    )


def cached_snapshot(
    repository: str, file: str = "", needed: tuple[str, ...] = ("config.json", "tokenizer.json")
) -> Path | None:
    """Returns the hub's cached copy if it is complete; another program may have cached a part.

    Args:
      repository: its id.
      file: the only file that is needed; by default the files ``needed``, and weights.
      needed: files that a complete copy has.
    """
    try:
        folder = _snapshot(repository, file, local=True)
    except (OSError, ValueError):
        return None
    if (folder / file).is_file() or (not file and _is_complete(folder, needed)):
        return folder
    return None


def _is_complete(folder: Path, needed: tuple[str, ...]) -> bool:
    if not all((folder / name).is_file() for name in needed):
        return False
    try:
        SafetensorsFolder(folder)
    except NaloraError:
        return False
    return True


def download_snapshot(repository: str, file: str = "") -> Path:
    """Downloads the model's files from the hub.

    Raises:
      NaloraError: the hub refuses (unknown repository, licence not accepted), cannot be reached,
        or is switched off.
    """
    try:
        return _snapshot(repository, file, local=False)
    except errors.HFValidationError as error:
        raise NaloraError(repository, expected="a hub id like owner/name", found=error) from error
    except (
        OSError,
        ValueError,
        errors.HfHubHTTPError,
    ) as error:  # no network, a full disk, a server's failure
        refused = _refusal(repository, error)
        if refused is not None:
            raise refused from error
        expected = "the hub to deliver the model"
        remedy = "check the network, or give a local folder or .gguf file"
        raise NaloraError(repository, expected=expected, found=reason_of(error), remedy=remedy) from error


def reason_of(error: Exception) -> str:
    """Returns why the hub does not answer, in one line."""
    if constants.HF_HUB_OFFLINE:
        return "it is switched off by HF_HUB_OFFLINE"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refusal(repository: str, error: Exception) -> NaloraError | None:
    """Returns the error for a repository that the hub denies; None for other failures."""
    causes = (getattr(each, "response", None) for each in (error, error.__cause__))
    status = next((each.status_code for each in causes if each is not None), 0)
    missing = isinstance(error, errors.RepositoryNotFoundError)  # GatedRepoError is a subclass
    if isinstance(error, errors.DisabledRepoError) or not (missing or status in (401, 403)):
        return None
    token = "one whose account has no access"
    if not missing:
        token = f"one that the hub refuses ({status})"
    if not huggingface_hub.get_token():
        token = "none"
    page = f"{constants.ENDPOINT}/{repository}"
    state, step = "a gated repository", f"accept its terms at {page}"
    if missing and not isinstance(error, errors.GatedRepoError):
        state, step = "none of that name, or a private one", f"check that {page} exists"
    return NaloraError(
        repository,
        expected="a model of the hub that your token may read",
        found=f"{state}, and as token {token}",
        remedy=f"{step}, then set HF_TOKEN on every host to a token that may read it, or log in with `hf auth login`",
    )
