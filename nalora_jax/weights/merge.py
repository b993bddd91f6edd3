"""Merges adapters into the base and writes a Hugging Face folder of the merged model.

    W' = W + s A B                         LoRA
    W' = m (W + s A B) / |W + s A B|       DoRA, norm over the inputs of each output channel

The result is computed in float32 and rounded once to the weight's dtype. Quantized weights count as
the floats that they expand to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import merged_kernel
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import contains_text_model, family_of, text_part
from nalora_jax.models.targets import AdapterSpec, leaf_dtype
from nalora_jax.ops.storage import Stored, expand
from nalora_jax.weights.keymaps import ParamSlot, file_name, keymap_for
from nalora_jax.weights.peft_export import layer_adapter
from nalora_jax.weights.peft_tables import refuse_saved
from nalora_jax.weights.shards import size_of, write_shards

if TYPE_CHECKING:
    from nalora_jax.models.vision.vision_config import DualConfig

_DTYPES = ("float32", "float16", "bfloat16")


def merged_tensors(
    config: ModelConfig | DualConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
    spec: AdapterSpec,
    *,
    dtype: np.dtype | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and tensors of the merged model's file, one at a time, on the host.

    Args:
      config: the model.
      params: base parameters, on any device.
      lora: adapters, or None for the unmodified base.
      spec: their spec.
      dtype: of every tensor; by default its parameter's dtype, for quantized ones the embedding's.
    """
    refuse_saved(spec, "merge", "fold them in first (weights.peft_tables.fold_saved)")
    leaves = flatten(params, _is_stored)
    adapters = flatten(lora or {})

    def merge(slot: ParamSlot) -> np.ndarray:
        """Returns one slot's leaf of the merged model, e.g. a kernel ``[d_in, d_out]``."""
        stored = jax.tree.map(lambda array: array[slot.index], leaves[slot.path])
        value = np.asarray(_expand(stored))
        adapter = None
        if adapters and slot.layer is not None:
            path = slot.path.removesuffix("/kernel")
            adapter = layer_adapter(adapters, spec, path, slot.layer)
        if adapter is not None:
            # () for the kernel of a layer, of which it selects all; (e,) for one expert's
            expert = slot.index[1:]
            magnitude = None
            if adapter.magnitude is not None:
                magnitude = adapter.magnitude[expert]
            value = merged_kernel(
                value,
                adapter.a[expert],
                adapter.b[expert],
                np.float32(adapter.scale),
                magnitude,
            )
        return value.astype(_file_dtype(leaves, slot, dtype))

    for tensor in keymap_for(config).tensors:
        joined = tensor.join([merge(slot) for slot in tensor.slots])
        yield file_name(config, tensor.name), joined.reshape(tensor.shape)


_expand = jax.jit(expand)


def write_merged(
    folder: str | Path,
    config: ModelConfig | DualConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
    spec: AdapterSpec,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: Callable[[Path], object],
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the merged model as a folder for transformers, without a second copy in memory.

    The folder contains config.json, generation_config.json, the tokenizer's files, the chat
    template, the weights as one safetensors file or as shards with an index, and the card. It
    appears complete or not at all.

    Args:
      folder: new or empty.
      config: the model, or a dual encoder.
      params: base parameters, on any device.
      lora: adapters, or None to write the base.
      spec: their spec.
      hf_config: the base's ``config.json`` (`LoadedModel.hf_config`).
      tokenizer: function that writes the tokenizer's files into a folder
        (`nalora_jax.weights.new_tokens.tokenizer_writer`).
      dtype: "float32", "float16" or "bfloat16"; by default each tensor has its parameter's dtype.
      shard_bytes: largest file.
      card: text of README.md (`nalora_jax.weights.card`).
      overwrite: replace a folder with all of its files.

    Raises:
      NaloraError: an unknown dtype, a ``config.json`` that describes another model, separately
        trained towers, which no format of transformers describes, a folder with other content, or
        a failed write (temporary files are removed).
    """
    if dtype not in (None, *_DTYPES):
        raise NaloraError(
            "dtype",
            expected=f"one of {', '.join(_DTYPES)}",
            found=repr(dtype),
        )
    chosen = None
    if dtype is not None:
        chosen = np.dtype(dtype)
    if not isinstance(config, ModelConfig) and config.trained:
        raise NaloraError(
            "merge",
            expected="a pair that is one model, such as CLIP or SigLIP",
            found="two towers that were joined for the run",
            remedy="use the run's folder itself: load_adapted_dual reads it (docs/images.md)",
        )
    leaves = flatten(params, _is_stored)
    likes = {}
    for tensor in keymap_for(config).tensors:
        like = jax.ShapeDtypeStruct(
            tensor.shape, _file_dtype(leaves, tensor.slots[0], chosen)
        )
        likes[file_name(config, tensor.name)] = like
    largest = max(likes.values(), key=size_of)
    settings = _settings(hf_config, config, largest.dtype.name)
    replaces = []
    if overwrite and Path(folder).is_dir():
        replaces = [path.name for path in Path(folder).iterdir()]
    with new_folder(folder, replaces=replaces, overwrite=overwrite) as scratch:
        write_json(scratch / "config.json", settings)
        tokenizer(scratch)
        if card is not None:
            (scratch / "README.md").write_text(card, encoding="utf-8")
        merged = merged_tensors(config, params, lora, spec, dtype=chosen)
        write_shards(scratch, likes, merged, shard_bytes=shard_bytes)
    return Path(folder)


def _file_dtype(
    leaves: Mapping[str, Any], slot: ParamSlot, chosen: np.dtype | None
) -> np.dtype:
    """Returns the dtype of a tensor in the file; of a quantized one, that of the embedding."""
    like = leaves[slot.path]
    if _is_stored(like):
        like = leaves["embed/embedding"]
    return np.dtype(leaf_dtype(slot.path, chosen or like.dtype))


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)


def _settings(
    raw: Mapping[str, Any], config: ModelConfig | DualConfig, dtype: str
) -> dict[str, Any]:
    """Returns the merged model's ``config.json``; ``dtype`` is that of its largest tensor."""
    settings = dict(raw)
    if isinstance(config, ModelConfig):
        model_type = raw.get("model_type")
        if config.vision is None and contains_text_model(model_type, images=False):
            settings = text_part(raw, "config.json")  # only the text model is here
            named = family_of(settings["model_type"]).class_name
            settings["architectures"] = list(filter(None, [named]))
        ours = replace(config, stored_bits=()).to_dict()
        images = config.vision is not None
        described = ModelConfig.from_hf(settings, images=images).to_dict()
        if fields := [name for name, value in described.items() if value != ours[name]]:
            raise NaloraError(
                f"config.json: {', '.join(fields)}",
                expected=str([ours[name] for name in fields]),
                found=str([described[name] for name in fields]),
                remedy="pass the config.json of the model whose parameters these are",
            )
    settings.pop("quantization_config", None)  # floats are written
    # transformers 5 and 4 read one each
    settings["dtype"] = settings["torch_dtype"] = dtype
    return settings
