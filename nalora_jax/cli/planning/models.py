"""Architectures by name for planning, from their ``config.json`` alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.rope_scaling import with_rope_scaling

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FOLDER = Path(__file__).parent / "released"  # its README.md states the sources
# ``config.json`` of released checkpoints, by lower-case name.
CONFIGS: dict[str, dict[str, Any]] = {
    file.stem.lower(): read_json(file)
    for file in sorted(_FOLDER.glob("*.json"), key=lambda file: file.stem.lower())
}


def architecture(name: str, *, images: bool = False, rope_scaling: str = "") -> ModelConfig:
    """Returns the architecture called ``name``.

    A name is a key of `CONFIGS`, a ``config.json``, a Hugging Face folder, or a hub id: its last
    part is a key of `CONFIGS`, or its ``config.json`` is read from the hub's cache or downloaded.
    With ``images`` a multimodal model includes its image tower and projector; by default only its
    text model is returned. ``rope_scaling`` replaces the model's (`nalora_jax.models.rope_scaling`).

    Raises:
      NaloraError: the name is unknown, or its config or its new RoPE scaling is not supported.
    """
    raw, where = _raw_config(name)
    return ModelConfig.from_hf(with_rope_scaling(raw, rope_scaling, where), where, images=images)


def _raw_config(name: str) -> tuple[dict[str, Any], str]:
    """Returns the fields of the ``config.json`` of a model, and their source for messages."""
    file = Path(name)
    if file.is_dir():
        file /= "config.json"
    if file.suffix == ".json" and file.exists():
        return read_json(file), str(file)
    on_hub = _HUB_ID.fullmatch(name) is not None
    known = name.rpartition("/")[2].lower() if on_hub else name.lower()
    if known in CONFIGS:
        return CONFIGS[known], name
    found, remedy = repr(name), "download the model's config.json: planning needs nothing else"
    if on_hub:
        from nalora_jax.weights.hub_snapshots import cached_snapshot, download_snapshot

        try:
            folder = cached_snapshot(name, "config.json") or download_snapshot(name, "config.json")
            return read_json(folder / "config.json"), name
        except NaloraError as error:
            found, remedy = f"{error.found} ({name} on the hub)", error.remedy or remedy
    raise NaloraError(
        "--model",
        expected="a config.json, a folder that contains one, a hub id, or one of " + ", ".join(CONFIGS),
        found=found,
        remedy=remedy,
    )
