"""Writes a dual encoder with merged adapters as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.weights.folders import new_folder, write_json
from nalora_jax.weights.merge import DTYPES, merge
from nalora_jax.weights.shards import TensorInfo, write_shards
from nalora_jax.weights.tokenizer_files import copy_tokenizer
from nalora_jax.weights.vision.keymaps import dual_keymap, tensors_from_params


def write_merged_dual(
    folder: str | Path,
    config: DualConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    *,
    source: Path,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    card: str | None = None,
) -> Path:
    """Writes the merged pair, tokenizer and image processor; a folder appears only if complete.

    Args:
      folder: new or empty.
      config: the pair.
      params: its weights.
      lora: the trained tree.
      spec: its spec.
      source: the base's folder, whose config.json, tokenizer and processor are copied.
      dtype: "float32", "float16" or "bfloat16".
      shard_bytes: largest file.
      card: text of README.md.

    Raises:
      NaloraError: separately trained towers, which no format of transformers describes; an unknown
        dtype, a folder with other content, or a failed write.
    """
    if config.trained:
        raise NaloraError(
            "merge",
            expected="a pair that is one model, such as CLIP or SigLIP",
            found="two towers that were joined for the run",
            remedy="use the run's folder itself: load_adapted_dual reads it (docs/images.md)",
        )
    if dtype not in DTYPES:
        raise NaloraError("dtype", expected=f"one of {', '.join(DTYPES)}", found=repr(dtype))
    leaves = flatten(merge(params, lora, spec))
    merged = unflatten(leaves)
    infos = [TensorInfo(tensor.name, tensor.shape, DTYPES[dtype]) for tensor in dual_keymap(config).tensors]
    settings = read_json(source / "config.json") | {"dtype": dtype, "torch_dtype": dtype}
    tensors = (
        (name, np.asarray(array).astype(DTYPES[dtype]))
        for name, array in tensors_from_params(config, merged)
    )
    with new_folder(folder) as scratch:
        write_json(scratch / "config.json", settings)
        copy_tokenizer(source, scratch, images=True)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        write_shards(scratch, infos, tensors, shard_bytes=shard_bytes)
    return Path(folder)
