"""Writes GGUF files for llama.cpp: a merged model, or an adapter for ``--lora``.

A merged file copies the base GGUF's metadata field by field (tokenizer, hyper-parameters, chat
template), so the base must be a GGUF file. For another base, write a merged Hugging Face folder
and convert it with llama.cpp's ``convert_hf_to_gguf.py``. An adapter file has no tokenizer, so it
can be written for every family.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TokenType,
)
from gguf.quants import quant_shape_to_byte_shape, quantize

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.tokenizer import Tokenizer
from nalora_jax.trees import flatten
from nalora_jax.weights.folders import new_file
from nalora_jax.weights.gguf import GGUFFile
from nalora_jax.weights.keymaps import SourceTensor, keymap_for
from nalora_jax.weights.merge import merged_tensors
from nalora_jax.weights.peft_modules import ModuleAdapter, fuse
from nalora_jax.weights.peft_write import layer_adapter
from nalora_jax.weights.saved_modules import refuse_saved

# Formats of written files, with llama.cpp's numbers for general.file_type.
KINDS = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
} | {name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "smollm3", "granite")}
# Metadata that describes the file, not the model in it.
_OWN_FIELDS = ("GGUF.", "split.", "quantize.")
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")
_BLOCK = 32  # values that Q8_0 quantizes together; row lengths must be multiples


def write_merged_gguf(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
    spec: AdapterSpec,
    *,
    base: str | Path,
    kind: str = "F16",
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes the merged model as one GGUF file, one tensor in memory at a time.

    Args:
      path: a new file.
      config: the model.
      params: base parameters, on any device.
      lora: adapters, or None to write the base.
      spec: their spec.
      base: the GGUF file that the base was loaded from.
      kind: format of the matrices, one of `KINDS`; vectors and routers stay float32, as llama.cpp
        requires.
      tokenizer: of the model if tokens were added to it: they are listed after the base's tokens.

    Raises:
      NaloraError: an unknown kind, a base that is not a GGUF file of this architecture, an
        existing file or a failed write.
    """
    if kind not in KINDS:
        raise NaloraError("GGUF format", expected=f"one of {', '.join(KINDS)}", found=repr(kind))
    reader = _open(base)
    items = [
        _Item(tensor.name, tensor.shape, _tensor_kind(tensor, kind))
        for tensor in keymap_for(config, "gguf").tensors
    ]
    _check_base(base, reader, items, config)
    kinds = {item.name: item.kind for item in items}
    # RoPE frequency factors are tensors in GGUF files and settings in this library.
    factors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_")]
    items += [
        _Item(factor.name, tuple(factor.shape[::-1].tolist()), factor.tensor_type) for factor in factors
    ]
    merged = merged_tensors(config, params, lora, spec, dtype=np.dtype(np.float32), source="gguf")
    data = chain(
        (quantize(value, kinds[name]) for name, value in merged), (factor.data for factor in factors)
    )
    with new_file(path) as scratch:
        writer = GGUFWriter(scratch, reader.fields["general.architecture"].contents())
        _copy_fields(reader, writer, _token_fields(reader, config.vocab_size, tokenizer))
        writer.add_file_type(KINDS[kind])
        if kind == "Q8_0":
            writer.add_quantization_version(GGML_QUANT_VERSION)
        _write(writer, items, data)
    return Path(path)


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
      NaloraError: DoRA (llama.cpp has none), a family whose names in llama.cpp are not known, an
        existing file or a failed write.
    """
    if spec.dora:
        rule = "LoRA or rsLoRA: llama.cpp has no DoRA"
        raise NaloraError(
            "GGUF adapter", expected=rule, found="DoRA", remedy="write the merged model instead"
        )
    refuse_saved(spec, "GGUF adapter", "write the merged model instead")
    adapters = list(_adapters(config, lora, spec))
    alpha = adapters[0][1].scale * adapters[0][1].rank
    tensors: dict[str, np.ndarray] = {}
    for tensor, adapter in adapters:
        b = adapter.b * np.float32(adapter.scale * adapter.rank / alpha)
        tensors[f"{tensor.name}.lora_a"] = adapter.a.swapaxes(-1, -2)  # [..., r, d_in]
        # [..., d_out, r]: B needs the same conversion as the kernel (a transposition, for some
        # also a regrouping of rows)
        tensors[f"{tensor.name}.lora_b"] = np.asarray(tensor.transform.back(b))
    with new_file(path) as scratch:
        writer = GGUFWriter(scratch, ARCHITECTURES[config.model_type])
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(LlamaFileType.ALL_F32)
        _write(writer, [_Item(name, array.shape) for name, array in tensors.items()], tensors.values())
    return Path(path)


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
    alpha = file.get(Keys.Adapter.LORA_ALPHA, float)
    meant = {tensor.name: (tensor, adapter) for tensor, adapter in _adapters(config, lora, spec)}
    differences = [0.0]
    for name, (tensor, adapter) in meant.items():
        a, b = (_whole(file, f"{name}.lora_{factor}") for factor in "ab")  # [..., r, d_in], [..., d_out, r]
        product = alpha / a.shape[-2] * (b @ a)
        update = adapter.scale * (
            np.asarray(tensor.transform.back(adapter.b), np.float64) @ adapter.a.swapaxes(-1, -2)
        )
        differences.append(np.abs(product - update).max() / max(np.abs(update).max(), 1e-30))
    worst = float(np.max(differences))
    if not worst <= 1e-5 or len(file.shapes()) != 2 * len(meant):
        expected, actual = "the adapter that was exported", "another one on reading it back"
        remedy = "do not use this file; please report this as a bug, with the adapter's configuration"
        raise NaloraError(str(path), expected=expected, found=actual, remedy=remedy)
    return worst


def _whole(file: GGUFFile, name: str) -> np.ndarray:
    shape = file.shapes().get(name)
    if shape is None:
        raise NaloraError(file.where, expected=f"a tensor {name}", found="none of that name")
    return file.read(name, tuple(slice(0, size) for size in shape)).astype(np.float64)


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
        adapter = fuse([layer_adapter(leaves, spec, path, layer) for path in paths], tensor.rows)
        if adapter is not None:
            yield tensor, adapter


@dataclass(frozen=True)
class _Item:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]  # slowest axis first
    kind: GGMLQuantizationType = GGMLQuantizationType.F32


class _Checked(np.ndarray):
    """An array written by Python: numpy's ``tofile`` ignores a full disk at its last flush."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Writes the bytes; ``sep`` and ``format`` are ignored."""
        fid.write(self.view(np.ndarray).view(np.uint8))


def _write(writer: GGUFWriter, items: Iterable[_Item], data: Iterable[np.ndarray]) -> None:
    """Writes header, metadata, and then the tensors' bytes one after the other."""
    for item in items:
        shape = quant_shape_to_byte_shape(item.shape, item.kind)
        writer.add_tensor_info(item.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=item.kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in data:
            writer.write_tensor_data(np.ascontiguousarray(array).view(_Checked))
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())


def _tensor_kind(tensor: SourceTensor, kind: str) -> GGMLQuantizationType:
    """Returns the format of a tensor.

    Matrices have ``kind``, vectors and routers float32, and matrices whose rows do not fill Q8_0's
    blocks float16.
    """
    if len(tensor.shape) < 2 or "router" in tensor.slots[0].path:
        return GGMLQuantizationType.F32
    if kind == "Q8_0" and tensor.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind]


def _open(base: str | Path) -> GGUFReader:
    try:
        return GGUFReader(base)
    except (OSError, ValueError, IndexError, KeyError) as error:
        expected, actual = "the GGUF file that the base came from", str(error)[:200]
        remedy = "for another base write a merged folder and run llama.cpp's convert_hf_to_gguf.py on it"
        raise NaloraError(str(base), expected=expected, found=actual, remedy=remedy) from error


def _check_base(base: str | Path, reader: GGUFReader, items: Iterable[_Item], config: ModelConfig) -> None:
    """Checks that the base's metadata describes these tensors, except the tables' row counts."""
    stored = {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    tables = {"output.weight", "token_embd.weight"}
    for item in items:
        if item.name in tables and stored.get(item.name, item.shape)[1:] == (config.d_model,):
            continue
        if stored.get(item.name) != item.shape:
            raise NaloraError(
                f"{base}: {item.name}",
                expected=f"shape {item.shape}, as the merged model has it",
                found=f"shape {stored[item.name]}" if item.name in stored else "no such tensor",
                remedy="give the GGUF file that this base was loaded from",
            )


def _token_fields(reader: GGUFReader, rows: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the changed vocabulary fields; empty if none changed.

    There is a token for every row; a changed chat template is included.
    """
    held = next(
        (int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), rows
    )
    if "tokenizer.ggml.tokens" not in reader.fields or (tokenizer is None and held == rows):
        return {}
    tokens = list(reader.fields["tokenizer.ggml.tokens"].contents())[:rows]
    missing = range(len(tokens), rows)
    tokens += [f"[PAD{number}]" for number in missing]  # names used by llama.cpp's converter
    changed: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    for name, filler in (("token_type", int(TokenType.UNUSED)), ("scores", 0.0)):
        if stored := reader.fields.get(f"tokenizer.ggml.{name}"):
            changed[stored.name] = [*list(stored.contents())[:rows], *[filler for _ in missing]]
    if (size := f"{reader.fields['general.architecture'].contents()}.vocab_size") in reader.fields:
        changed[size] = rows
    if tokenizer is None:
        return changed
    kinds = changed.get("tokenizer.ggml.token_type", [0] * rows)
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        if number < rows and kinds[number] in (TokenType.NORMAL, TokenType.UNUSED, 0):
            tokens[number] = token.content
            kinds[number] = int(TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    if tokenizer.chat_template is not None and "tokenizer.chat_template" in reader.fields:
        changed["tokenizer.chat_template"] = tokenizer.chat_template
    return changed


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, changed: Mapping[str, Any]) -> None:
    """Copies every field of the model with its type; fields in ``changed`` get another value."""
    for name, stored in reader.fields.items():
        if name in _OWN_KEYS or name.startswith(_OWN_FIELDS):
            continue
        kind, *inner = stored.types  # an array's elements have the last type
        writer.add_key_value(name, changed.get(name, stored.contents()), kind, *inner[-1:])
