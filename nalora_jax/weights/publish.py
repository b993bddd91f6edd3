"""Uploads a folder of this library, with its card, to the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from nalora_jax.errors import NaloraError
from nalora_jax.files import write_atomically
from nalora_jax.paths import refuse_link_out
from nalora_jax.redaction import is_hub_id
from nalora_jax.tokenizer import read_json
from nalora_jax.weights.hub_snapshots import reason_of
from nalora_jax.weights.peft_config import CONFIG_NAME

CARD = "README.md"
# Files that are uploaded: an adapter's three files, or a merged model with its tokenizer.
FILES = (CARD, "*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")


def push_folder(
    folder: Path,
    repository: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    message: str = "",
) -> str:
    """Uploads an adapter or a merged model as one commit; creates the repository if there is none.

    Args:
      folder: contains ``README.md``, and ``adapter_config.json`` or ``config.json`` with their
        weights; it is not changed.
      repository: hub id, ``owner/name``.
      base_model: hub id that an adapter's uploaded files name as their base, instead of the name
        in ``folder``.
      private: visibility of a new repository.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      NaloraError: the folder is not an adapter or a merged model, has no card, contains a link
        that leaves it, or names a base that is not on the hub; there is no token; or the hub
        refuses or cannot be reached.
    """
    _check_repository(repository)
    is_adapter = _check_folder(folder)
    kind = "Merged model"
    if is_adapter:
        kind = "Adapter"
        _check_base(folder, base_model)
    if huggingface_hub.get_token() is None:
        expected = "one that may write to the hub"
        remedy = "log in with `hf auth login`, or set HF_TOKEN"
        raise NaloraError("token", expected=expected, found="none", remedy=remedy)
    with _prepared(folder, base_model) as ready, _complaints(repository):
        api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, library_name="nalora_jax")
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=ready,
            allow_patterns=list(FILES),
            commit_message=message or f"{kind} by nalora_jax",
        )
    return str(commit.commit_url)


def _check_repository(repository: str) -> None:
    if not is_hub_id(repository):
        raise NaloraError("--repo", expected="a hub id like owner/name", found=repr(repository))


def _check_folder(folder: Path) -> bool:
    """Returns True for an adapter, False for a merged model; raises an error for others and for links out of them."""
    for path in folder.rglob("*"):
        refuse_link_out(folder, path.relative_to(folder))
    is_adapter = (folder / CONFIG_NAME).is_file()
    if not is_adapter and not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        expected = "the folder of a run, an adapter or a merged model"
        raise NaloraError(str(folder), expected=expected, found="none of these")
    if not (folder / CARD).is_file():
        remedy = "nalora export or nalora import writes the adapter again, with one"
        raise NaloraError(str(folder), expected=f"a card ({CARD})", found="none", remedy=remedy)
    return is_adapter


def _check_base(folder: Path, base_model: str | None) -> None:
    """Raises an error if an adapter would be uploaded without a base that others can load."""
    name = base_model or read_json(folder / CONFIG_NAME).get("base_model_name_or_path") or ""
    if not is_hub_id(str(name)):
        raise NaloraError(
            f"{folder / CONFIG_NAME}: base_model_name_or_path",
            expected="a base model on the hub, which others can load",
            found=repr(name),
            remedy="name it with --base-model owner/name: the very weights that the adapter was trained on",
        )


@contextmanager
def _prepared(folder: Path, base_model: str | None) -> Iterator[Path]:
    """Yields the folder itself, or a copy whose config and card name another base."""
    if base_model is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        shutil.copytree(folder, copy)
        if (copy / CONFIG_NAME).is_file():
            settings = read_json(copy / CONFIG_NAME)
            settings["base_model_name_or_path"] = base_model
            write_atomically(copy / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        card = huggingface_hub.RepoCard.load(copy / CARD, ignore_metadata_errors=True)
        card.data.base_model = base_model
        write_atomically(copy / CARD, str(card))
        yield copy


@contextmanager
def _complaints(repository: str) -> Iterator[None]:
    """Converts the hub's errors to `NaloraError`."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = {
            401: (
                "a token that the hub knows",
                "log in again with `hf auth login`, or set HF_TOKEN",
            ),
            403: (
                "a token that may write there",
                "make one with write access to this owner's repositories",
            ),
            404: ("an owner that exists", "check the spelling of owner/name"),
        }
        expected, remedy = advice.get(status or 0, ("the hub to take the files", "try again later"))
        message = (str(error.server_message or error).strip().splitlines() or [type(error).__name__])[0]
        raise NaloraError(
            repository, expected=expected, found=f"{status}: {message}", remedy=remedy
        ) from error
    except (OSError, errors.HFValidationError, ValueError) as error:
        expected, found = "the hub to take the files", reason_of(error)
        raise NaloraError(repository, expected=expected, found=found, remedy="check the network") from error
