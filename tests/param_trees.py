"""Complete parameter trees of small models from tensors in memory, and back, by the library's key
maps; their sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.trees import flatten, map_named, unflatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.targets import leaf_dtype
from nalora_jax.models.tensor_rows import TensorNames
from nalora_jax.models.vision.vision_config import DualConfig, EncoderConfig
from nalora_jax.ops.quantize import QuantizedFormat, kernels, quantize
from nalora_jax.ops.scaled import Scaled, Scaling
from nalora_jax.weights.keymaps import KeyMap, SourceTensor, keymap_for


@partial(jax.jit, static_argnums=(0, 2))
def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random base weights, from one draw: a draw for each leaf takes seconds to compile."""
    key = jax.random.wrap_key_data(jnp.resize(jax.random.key_data(key), (4,)), impl="rbg")
    shapes = param_shapes(config)
    draws = jax.random.normal(key, (sum(map(math.prod, shapes.values())),), jnp.float32)
    leaves, start = {}, 0
    for path, shape in shapes.items():
        noise = draws[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
        leaves[path] = scaled_noise(config, path, noise).astype(leaf_dtype(path, dtype))
    return unflatten(leaves)


def scaled_noise(config: ModelConfig, path: str, noise: jax.Array) -> jax.Array:
    """The random base weight at ``path`` from standard normal ``noise`` of its shape."""
    if path.endswith("/scale"):
        # Norms of encoders and of linear attention have no offset.
        plain = path.startswith(("image/", "unused/")) or path.endswith("linear_attn/norm/scale")
        return 1.0 - (0.0 if plain else config.norm_offset) + 0.1 * noise
    if path.endswith(("/bias", "/correction", "/embedding", "/class_token", "/probe")):
        return 0.02 * noise
    return noise * (1.0 / math.sqrt(noise.shape[-2]))


def params_from_tensors(
    config: ModelConfig,
    get_tensor: Callable[[str], Any],
    source: TensorNames = "hf",
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """A model's parameter tree; ``get_tensor`` returns tensors by canonical name."""
    return _tree(keymap_for(config, source), param_shapes(config), get_tensor, dtype)


def tensors_from_params(
    config: ModelConfig | DualConfig, params: Mapping[str, Any], source: TensorNames = "hf"
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a model's file: the inverse of `params_from_tensors`."""
    leaves = flatten(params)
    for tensor in keymap_for(config, source).tensors:
        joined = tensor.join([leaves[slot.path][slot.index] for slot in tensor.slots])
        yield tensor.name, joined.reshape(tensor.shape)


def encoder_params(
    config: DualConfig | EncoderConfig, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """An encoder's parameter tree, of tensors by the file's names."""
    keymap = keymap_for(config)
    shapes = {name: tuple(np.shape(value)) for name, value in tensors.items()}
    names = keymap.check(shapes, config.model_type)
    return _tree(keymap, config.param_shapes(), lambda name: tensors[names[name]], np.float32)


def _tree(
    keymap: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    get_tensor: Callable[[str], Any],
    dtype: Any,
) -> dict[str, Any]:
    leaves = {path: np.zeros(shape, dtype) for path, shape in shapes.items()}
    for tensor in keymap.tensors:
        for slot, leaf in zip(
            tensor.slots, split(tensor, np.asarray(get_tensor(tensor.name))), strict=True
        ):
            leaves[slot.path][slot.index] = leaf
    return unflatten(leaves)


def split(tensor: SourceTensor, array: np.ndarray) -> list[np.ndarray]:
    """The tensor's slots, in order, each in our layout: the inverse of `SourceTensor.join`."""
    if tensor.transform.alternates:
        return [array[..., i :: len(tensor.slots)] for i in range(len(tensor.slots))]
    if len(tensor.slots) == 1:
        return [tensor.transform.into(array)]
    parts = np.split(array, np.cumsum(tensor.rows)[:-1], axis=tensor.axis)
    return [tensor.transform.into(part) for part in parts]


def bytes_per_device(tree: Any) -> dict[jax.Device, int]:
    """Returns the bytes of the arrays of ``tree`` on each of this process's devices."""
    totals: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return totals


def quantize_params(
    params: Any, kind: QuantizedFormat, pattern: str | None = None
) -> dict[str, Any]:
    """Returns parameters with every kernel that ``pattern`` matches quantized, layer by layer."""
    quantized = jax.jit(quantize, static_argnums=1)

    def of_leaf(path: str, leaf: jax.Array) -> Any:
        if not re.search(pattern or kernels(kind), path):
            return leaf
        return jax.tree.map(
            lambda *parts: jnp.stack(parts), *(quantized(layer, kind) for layer in leaf)
        )

    return map_named(of_leaf, params)


def scaled_params(params: Any) -> dict[str, Any]:
    """Returns parameters with the kernels of layers in fp8, scaled in blocks of 4 x 4."""

    def of_leaf(path: str, leaf: jax.Array) -> Any:
        if not re.search(kernels("int8"), path):
            return leaf
        *lead, d_in, d_out = leaf.shape
        scales = 0.5 + jnp.arange(d_in * d_out // 16) % 7
        scales = jnp.broadcast_to(
            scales.reshape(d_in // 4, d_out // 4), (*lead, d_in // 4, d_out // 4)
        )
        codes = leaf.astype(jnp.float8_e4m3fn).view(jnp.uint8)
        return Scaled(codes, scales.astype(jnp.float32), None, None, None, Scaling("e4m3", (4, 4)))

    return map_named(of_leaf, params)
