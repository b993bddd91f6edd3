"""Metadata of an adapter's file: a digest of the adapter and the fingerprint of its base model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.weights.origin import is_comparable
from nalora_jax.weights.peft_config import CONFIG_NAME

log = logging.getLogger(__name__)

FINGERPRINT_KEY = "nalora.base_fingerprint"
BASE_KEY = "nalora.base"  # name of the base's weights if the settings name their original
ROPE_KEY = "nalora.rope_scaling"  # `ResolvedSource.rope_scaling` of the base
DIGEST_KEY = "nalora.sha256"
# Written with every digest, so that a file without its digest's key is not mistaken for another
# tool's file.
LAYOUT_KEY = "nalora.layout"
# Fields of adapter_config.json that determine the function of the tensors.
_MEANING = (
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "bias",
    ),
    *("target_modules", "target_parameters"),
)
_LATER_MEANING = ("modules_to_save", "ensure_weight_tying", "trainable_token_indices")


def file_metadata(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    fingerprint: str | None = None,
    rope_scaling: str = "",
    base_weights: str = "",
) -> dict[str, str]:
    """Returns the metadata of a file of ``tensors``: properties of the base and a digest of the adapter.

    Args:
      tensors: of the file, by name.
      settings: of ``adapter_config.json``.
      fingerprint: of the base model's weights.
      rope_scaling: of the base, if it is not its files'.
      base_weights: name of the base's weights, if it is not in the settings.
    """
    base = {FINGERPRINT_KEY: fingerprint, ROPE_KEY: rope_scaling, BASE_KEY: base_weights}
    metadata = {"format": "pt", LAYOUT_KEY: "1"} | {name: value for name, value in base.items() if value}
    return metadata | {DIGEST_KEY: _digest(tensors, settings, metadata)}


def _digest(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], metadata: Mapping[str, str]
) -> str:
    """Returns the SHA-256 of an adapter: tensors in float32, other metadata, and the settings in `_MEANING`.

    The base model's path, and other settings that the library does not compute with, may be edited.
    """
    meaning = {name: settings.get(name) for name in _MEANING}
    # Earlier versions wrote files without these fields, and digests without them.
    meaning |= {name: settings[name] for name in _LATER_MEANING if settings.get(name)}
    noted = {name: value for name, value in metadata.items() if name != DIGEST_KEY}
    digest = hashlib.sha256(json.dumps([meaning, noted], sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()


def check_digest(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Raises an error if a file of this library, or its config, was changed since its export."""
    if DIGEST_KEY not in metadata and LAYOUT_KEY not in metadata:
        return  # written by another tool
    settings = json.loads((path.parent / CONFIG_NAME).read_text(encoding="utf-8"))
    noted, actual = metadata.get(DIGEST_KEY, "none"), _digest(tensors, settings, metadata)
    if noted != actual:
        raise NaloraError(
            str(path),
            expected=f"the adapter that was written (sha256 {noted[:16]}...)",
            found=f"another one (sha256 {actual[:16]}...): a file was damaged or edited",
            remedy="copy it again, or export it again from the run",
        )


def check_fingerprint(path: Path, metadata: Mapping[str, str], fingerprint: str | None) -> None:
    """Raises an error if the file's base fingerprint belongs to another base model."""
    noted = metadata.get(FINGERPRINT_KEY)
    if not noted or not fingerprint or noted == fingerprint:
        return
    where = str(path)
    if not is_comparable(noted, fingerprint):
        log.warning(
            "%s: made with an earlier version, whose digest of the base covered a part of its weights and cannot be "
            "compared; check that the base is the one that adapter_config.json names",
            where,
        )
        return
    raise NaloraError(
        where,
        expected=f"an adapter of the base model {fingerprint}",
        found=f"one of the base model {noted}",
        remedy="load exactly the weights that the adapter was trained on (named in adapter_config.json); the same "
        "model in another precision is another base",
    )
