"""Merges an adapter into a quantized base and writes the same number format.

    W' = W + s A B                  in float32, as `nalora_jax.weights.merge`
    scale' = max(scale, |W'| / largest code)   of each block, in the dtype of the file's scales
    code' = round(W' / scale')      once, to nearest even

A block that the adapter does not change keeps its codes and its scale. All other tensors of the
base's files are copied. The result says how much the rounding changes the weights, and compares
that with the adapter's update: an update that is smaller than the steps of the format is lost in
part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from nalora_jax.common.folders import new_folder, write_json
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.scaled import Scaling
from nalora_jax.weights.keymaps import SourceTensor, keymap_for
from nalora_jax.weights.merge import merged_tensors
from nalora_jax.weights.peft_tables import refuse_saved
from nalora_jax.weights.quantized import QuantizedTensors
from nalora_jax.weights.shards import WRITTEN_DTYPES, write_shards
from nalora_jax.weights.tensors import whole

_FLOATS: dict[str, Any] = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
_SCALES = ("float32", "bfloat16", "float16")


@dataclass
class RoundingError:
    """Squared norms of the merged modules, summed."""

    weights: float = 0.0  # of W'
    update: float = 0.0  # of W' - W
    rounding: float = 0.0  # of the stored weights minus W'

    def add(self, before: np.ndarray, after: np.ndarray, stored: np.ndarray) -> None:
        """Adds the norms of one module, float32 ``[out, in]`` each."""
        for name, values in (
            ("weights", after),
            ("update", after - before),
            ("rounding", stored - after),
        ):
            norm = float(np.sum(np.square(values, dtype=np.float64)))
            setattr(self, name, getattr(self, name) + norm)

    def describe(self, label: str) -> str:
        """Returns the statement of the error in one sentence."""
        of_weights = math.sqrt(self.rounding / max(self.weights, 1e-300))
        of_update = math.sqrt(self.rounding / max(self.update, 1e-300))
        return (
            f"rounding to {label} changes the merged weights by {of_weights:.2%} of their norm, "
            f"which is {of_update:.3g} times the norm of the adapter's update"
        )


def check_stored_format(source: QuantizedTensors) -> None:
    """Checks that merged weights can be written in a base's format.

    Raises:
      NaloraError: they cannot.
    """
    remedy = "merge with --dtype bfloat16"
    for name in source.shapes():
        scaling = source.scaling(name)
        if scaling is None:
            continue
        plain = scaling.element in (*_FLOATS, "int8") and scaling.scale in _SCALES
        if not plain or {"zeros", "outer", "order"} & set(source.parts(name)):
            raise NaloraError(
                f"{source.where}: {name}",
                expected="fp8 or int8 with scales in floats and no zeros, to be written again",
                found=source.quantization.describe(),
                remedy=remedy,
            )
    for name in source.file.shapes():
        if source.file.stored(name).format not in WRITTEN_DTYPES:
            raise NaloraError(
                f"{source.where}: {name}",
                expected=" or ".join(WRITTEN_DTYPES),
                found=source.file.stored(name).format,
                remedy=remedy,
            )


def write_stored(
    folder: str | Path,
    source: QuantizedTensors,
    config: ModelConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: Callable[[Path], object],
    card: str,
    shard_bytes: int = 5 * 10**9,
) -> RoundingError:
    """Writes the merged model in the format of its base, see the top of this module.

    Args:
      folder: new or empty.
      source: the base's tensors; `check_stored_format` accepts them.
      config: the base.
      params: its weights as they are stored; others in float32.
      lora: the adapter.
      spec: its spec.
      hf_config: the base's ``config.json``, which is written as it is.
      tokenizer: writes the tokenizer's files into a folder.
      card: text of README.md, to which the statement of the error is added.
      shard_bytes: largest file.

    Returns:
      The error of the merged modules.

    Raises:
      NaloraError: an adapter with trained tables, or a folder with other content.
    """
    refuse_saved(spec, "--dtype stored", "merge with --dtype bfloat16")
    error = RoundingError()
    file = source.file
    likes = {}
    for name, shape in file.shapes().items():
        dtype = WRITTEN_DTYPES[file.stored(name).format]
        likes[name] = jax.ShapeDtypeStruct(shape, dtype)
    changed = _merged_modules(source, config, params, lora, spec, error)
    with new_folder(folder) as scratch:
        write_json(scratch / "config.json", dict(hf_config))
        tokenizer(scratch)
        # Sorted by module, so that one module's tensors are in memory at a time.
        order = _by_module(source, config, likes)
        tensors = _stream(source, order, changed)
        ordered = {name: likes[name] for name in order}
        write_shards(scratch, ordered, tensors, shard_bytes=shard_bytes)
        statement = error.describe(source.quantization.describe())
        text = f"{card}\nThe merged weights are stored as the base stores them: {statement}.\n"
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return error


def _targets(config: ModelConfig, spec: AdapterSpec) -> list[SourceTensor]:
    """Returns the tensors of the base's files that the adapter changes."""
    paths = {f"{path}/kernel" for path, _ in spec.targets}
    changed = []
    for tensor in keymap_for(config).tensors:
        if any(slot.path in paths for slot in tensor.slots):
            changed.append(tensor)
    return changed


def _by_module(
    source: QuantizedTensors, config: ModelConfig, likes: Mapping[str, Any]
) -> list[str]:
    """Returns the names of all tensors: those of the model's modules in its order, then others."""
    keymap = keymap_for(config)
    names = keymap.check(source.shapes(), source.where)
    order: dict[str, None] = {}
    for tensor in keymap.tensors:
        name = names[tensor.name]
        for part in (name, *source.parts(name).values()):
            if part in likes:
                order[part] = None
    return list(order | dict.fromkeys(likes))


def _stream(
    source: QuantizedTensors,
    order: list[str],
    changed: Iterator[dict[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the folder in ``order``, changed or copied."""
    ready = next(changed, {})
    for name in order:
        if name in ready:
            yield name, ready.pop(name)
            if not ready:
                ready = next(changed, {})
            continue
        format_ = source.file.stored(name).format
        shape = source.file.shapes()[name]
        array = np.asarray(source.file.read(name, whole(shape)))
        yield name, array.view(WRITTEN_DTYPES[format_]).reshape(shape)


def _merged_modules(
    source: QuantizedTensors,
    config: ModelConfig,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    error: RoundingError,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the changed tensors of each module, by name in the file, and adds to the error."""
    float32 = np.dtype("float32")
    names = keymap_for(config).check(source.shapes(), source.where)
    adapted = {tensor.name for tensor in _targets(config, spec)}
    both = zip(
        keymap_for(config).tensors,
        merged_tensors(config, params, None, spec, dtype=float32),
        merged_tensors(config, params, lora, spec, dtype=float32),
        strict=True,
    )
    for tensor, (_, before), (_, after) in both:
        name = names[tensor.name]
        if tensor.name not in adapted or np.array_equal(before, after):
            continue
        scaling = source.scaling(name)
        if scaling is None:
            dtype = WRITTEN_DTYPES[source.file.stored(name).format]
            written = after.astype(dtype)
            error.add(before, after, written.astype(np.float32))
            yield {name: written}
            continue
        parts = source.parts(name)
        like = source.file.shapes()[parts["scales"]]
        n_in, n_out = scaling.blocks(after.shape[::-1])
        read = source.file.read(parts["scales"], whole(like))
        dtype = WRITTEN_DTYPES[source.file.stored(parts["scales"]).format]
        # [outputs' blocks, inputs' blocks], the file's order
        scales = np.asarray(read).view(dtype).reshape(n_out, n_in)
        codes, scales = requantize(after, before, scales, scaling)
        wide = _of_weights(scales, scaling, after.shape)
        error.add(before, after, codes.astype(np.float32) * wide)
        yield {parts["codes"]: codes, parts["scales"]: scales.reshape(like)}


def requantize(
    weight: np.ndarray, before: np.ndarray, scales: np.ndarray, scaling: Scaling
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a merged weight to the format of its base.

    Args:
      weight: float32 ``[out, in]``.
      before: the base's weight, of the same shape.
      scales: the base's, ``[blocks of outputs, blocks of inputs]``.
      scaling: the format.

    Returns:
      Codes ``[out, in]`` and scales. The scale of a block is raised where its weights would exceed
      the largest code, if any of them changed.
    """
    if scaling.element == "int8":
        kind: Any = np.int8
        largest = np.float32(127)
    else:
        kind = _FLOATS[scaling.element]
        largest = np.float32(ml_dtypes.finfo(kind).max)
    peaks = _block_maxima(np.abs(weight), scaling, scales.shape)
    needed = peaks / largest
    changed = _block_maxima(np.abs(weight - before), scaling, scales.shape) > 0
    grows = changed & (needed > scales.astype(np.float32))
    raised = np.where(grows, needed, scales.astype(np.float32)).astype(scales.dtype)
    wide = _of_weights(raised, scaling, weight.shape)
    exact = np.divide(weight, wide, out=np.zeros_like(weight), where=wide != 0)
    if scaling.element == "int8":
        return np.clip(np.rint(exact), -128, 127).astype(kind), raised
    return np.clip(exact, -largest, largest).astype(kind), raised


def _block_maxima(
    values: np.ndarray, scaling: Scaling, blocks: tuple[int, ...]
) -> np.ndarray:
    """Returns the largest value of each block of ``[out, in]``, in the shape of scales."""
    width, height = scaling.block
    rows = np.arange(blocks[0]) * (height or values.shape[0])
    columns = np.arange(blocks[1]) * (width or values.shape[1])
    of_rows = np.maximum.reduceat(values, rows, axis=0)
    return np.maximum.reduceat(of_rows, columns, axis=1)


def _of_weights(
    scales: np.ndarray, scaling: Scaling, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the scale of every weight, float32 ``[out, in]``."""
    width, height = scaling.block
    rows = np.arange(shape[0]) // (height or shape[0])
    columns = np.arange(shape[1]) // (width or shape[1])
    return scales.astype(np.float32)[np.ix_(rows, columns)]
