"""``nalora push``: uploads an adapter or a merged model, with its card, to the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class PushArgs:
    """Upload a run's adapter, an adapter or a merged model with its card to the hub, as one commit."""

    # Folder of a run, of a PEFT adapter, or of a merged model.
    folder: Positional[Path]
    # Repository on the hub, owner/name; it is created if it does not exist.
    repo: str
    # Hub id of the base to write into the adapter's files. By default the base that they name
    # already.
    base_model: str | None = None
    # Make the repository private.
    private: bool = False
    # Message of the commit.
    message: str = ""


def push(args: PushArgs) -> None:
    """Uploads and prints the address."""
    from nalora_jax import buckets
    from nalora_jax.weights.publish import push_folder

    folder = args.folder
    if buckets.bucket_url(folder):
        from nalora_jax.loading.adapted import adapter_folder, holds_adapter

        folder = adapter_folder(folder) if holds_adapter(folder) else buckets.local_path(folder)
    if (folder / "adapter").is_dir() and not (folder / "config.json").is_file():
        folder /= "adapter"
    print(
        push_folder(
            folder, args.repo, base_model=args.base_model, private=args.private, message=args.message
        )
    )
