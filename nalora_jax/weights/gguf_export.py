"""Writes an adapter as a GGUF file for llama.cpp's ``--lora``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
)

from nalora_jax.common.folders import new_file
from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec, uniform_path
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.keymaps import SourceTensor, gguf_of, keymap_for
from nalora_jax.weights.peft_export import differs, layer_adapter
from nalora_jax.weights.peft_modules import ModuleAdapter, fuse
from nalora_jax.weights.peft_tables import refuse_saved


def write_adapter_gguf(
    path: str | Path, config: ModelConfig, lora: Mapping[str, Any], spec: AdapterSpec
) -> Path:
    """Writes the adapter as a GGUF file for llama.cpp's ``--lora``, for any quantization.

    The file has one alpha, which llama.cpp divides by each tensor's rank; deviating scales are
    folded into B.

    Args:
      path: a new file.
      config: the base model.
      lora: stacked tree.
      spec: ranks, alphas and variant.

    Raises:
      NaloraError: DoRA (llama.cpp has none), a family whose names in llama.cpp are not known,
        adapters that llama.cpp would ignore, an existing file or a failed write.
    """
    if spec.dora:
        rule = "LoRA or rsLoRA: llama.cpp has no DoRA"
        raise NaloraError(
            "GGUF adapter",
            expected=rule,
            found="DoRA",
            remedy="write the merged model instead",
        )
    refuse_saved(spec, "GGUF adapter", "write the merged model instead")
    form = gguf_of(config)
    for target, _ in spec.targets:
        if uniform_path(target) in form.unserved:
            raise NaloraError(
                "GGUF adapter",
                expected="no adapter that llama.cpp ignores or refuses",
                found=f"one at {uniform_path(target)}",
                remedy="train with --lora.rules ffn:16 attn/o_proj:8, or write the merged model",
            )
    adapters = list(_adapters(config, lora, spec))
    # llama.cpp's scale of a tensor is alpha / rank: the file's alpha is the first adapter's.
    _, first = adapters[0]
    alpha = first.scale * first.rank
    tensors: dict[str, np.ndarray] = {}
    for tensor, adapter in adapters:
        b = adapter.b * np.float32(adapter.scale * adapter.rank / alpha)
        tensors[f"{tensor.name}.lora_a"] = adapter.a.swapaxes(-1, -2)  # [..., r, d_in]
        # [..., d_out, r]: B needs the same conversion as the kernel (a transposition, for some
        # also a regrouping of rows)
        tensors[f"{tensor.name}.lora_b"] = np.asarray(tensor.transform.back(b))
    with new_file(path) as scratch:
        writer = GGUFWriter(scratch, form.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(LlamaFileType.ALL_F32)
        for name, array in tensors.items():
            writer.add_tensor_info(
                name, array.shape, np.dtype(np.float32), array.nbytes
            )
        with closing(writer):
            _write_file(writer, list(tensors.values()))
    return Path(path)


def _write_file(writer: GGUFWriter, arrays: Sequence[np.ndarray]) -> None:
    """Writes header, keys, the table of tensors, and the arrays as float32.

    The arrays are not written by the writer, which uses NumPy's ``tofile``: that ignores a full
    disk at its last flush.
    """
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout  # the open files: one, as the writer was not told to split
    for array in arrays:
        writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(array, np.float32).view(np.uint8))
    writer.write_padding(file, file.tell())
    file.flush()
    os.fsync(file.fileno())


def verify_adapter_gguf(
    path: str | Path, config: ModelConfig, lora: Mapping[str, Any], spec: AdapterSpec
) -> float:
    """Reads an adapter file back and compares every update with the expected one.

    Returns:
      The largest difference of ``alpha / r * B A``, divided by the largest entry of the expected
      update.

    Raises:
      NaloraError: the file cannot be read, or contains another adapter.
    """
    file = GGUFFile(path)
    alpha = file.about("adapter.lora").get("alpha", float)
    adapters = list(_adapters(config, lora, spec))
    differences = [0.0]
    for tensor, adapter in adapters:
        for key in (f"{tensor.name}.lora_a", f"{tensor.name}.lora_b"):
            if key not in file.shapes():
                raise NaloraError(
                    file.where,
                    expected=f"a tensor {key}",
                    found="none of that name",
                )
        a = file.whole(f"{tensor.name}.lora_a")  # [..., r, d_in]
        b = file.whole(f"{tensor.name}.lora_b")  # [..., d_out, r]
        update = alpha / a.shape[-2] * (b @ a)
        trained_b = np.asarray(tensor.transform.back(adapter.b), np.float64)
        expected = adapter.scale * (trained_b @ adapter.a.swapaxes(-1, -2))
        # An untrained adapter has the update 0: 1e-30 avoids 0 / 0.
        largest = max(np.abs(expected).max(), 1e-30)
        differences.append(np.abs(update - expected).max() / largest)
    worst = float(np.max(differences))
    # Also refuses NaN, and files with further tensors.
    if not worst <= 1e-5 or len(file.shapes()) != 2 * len(adapters):
        raise differs(str(path))
    return worst


def _adapters(
    config: ModelConfig, lora: Mapping[str, Any], spec: AdapterSpec
) -> Iterator[tuple[SourceTensor, ModuleAdapter]]:
    """Yields llama.cpp's adapted tensors with their adapters, fused if the tensor is."""
    leaves = flatten(lora)
    for tensor in keymap_for(config, "gguf").tensors:
        layer = tensor.slots[0].layer
        if layer is None:
            continue
        paths = [slot.path.removesuffix("/kernel") for slot in tensor.slots]
        parts = [layer_adapter(leaves, spec, path, layer) for path in paths]
        adapter = fuse(parts, tensor.rows)
        if adapter is not None:
            yield tensor, adapter
