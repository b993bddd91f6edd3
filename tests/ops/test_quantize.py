"""Quantized kernels: codes are the nearest ones, products and gradients equal those of the expanded
kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops import quantize as module
from nalora_jax.ops.quantize import NF4_LEVELS, Quantized
from nalora_jax.ops.storage import expand
from tests.models.family_fields import tiny_config
from tests.param_trees import init_params, quantize_params

quantize, dequantize = jax.jit(module.quantize, static_argnums=1), jax.jit(module.dequantize)
KERNEL = np.random.default_rng(0).normal(size=(2, 128, 24)).astype(np.float32)


def test_int8_is_within_half_a_step():
    got = quantize(jnp.asarray(KERNEL), "int8")
    assert got.codes.dtype == jnp.int8
    assert got.shape == KERNEL.shape
    step = np.abs(KERNEL).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(np.asarray(dequantize(got)) - KERNEL) <= 0.5001 * step)


def test_nf4_takes_the_nearest_level_of_every_block():
    got = quantize(jnp.asarray(KERNEL), "nf4")
    assert got.codes.dtype == jnp.uint8
    assert got.codes.nbytes + got.scales.nbytes < 0.32 * KERNEL.size * 2
    blocks = KERNEL.reshape(2, 2, 64, 24).astype(np.float64)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    levels = np.asarray(NF4_LEVELS)
    nearest = levels[np.abs((blocks / largest)[..., None] - levels).argmin(axis=-1)] * largest
    np.testing.assert_allclose(dequantize(got), nearest.reshape(KERNEL.shape), rtol=1e-5, atol=1e-6)
    for kind in ("int8", "nf4"):
        np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((64, 3)), kind)), 0)
    with pytest.raises(NaloraError, match="multiples of 64.*found 100"):
        quantize(jnp.zeros((100, 4)), "nf4")


def test_a_quantized_decoder_trains_its_adapters():
    """Of experts, with DoRA, whose norms are those of the expanded kernel, and rematerialized."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2, **sizes)
    adapters = LoRAConfig(rules=(LoRARule("", 4),), dora=True)
    spec = resolve(adapters, projection_shapes(config), layer_numbers(config))
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    small = jax.jit(quantize_params, static_argnums=1)(params, "nf4")
    assert trees.size_bytes(small) < trees.size_bytes(params) * 0.25
    wide = jax.tree.map(expand, small, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 50)
    fresh = init_lora(config, spec, jax.random.key(2), params)
    lora = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), fresh)

    def loss(lora: dict, params: dict, remat: str) -> jax.Array:
        return jnp.sum(
            Decoder(config, spec, remat=remat).apply({"params": params, "lora": lora}, tokens) ** 2
        )

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    want, got = value_and_grad(lora, wide, "none"), value_and_grad(lora, small, "full")
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_codes_become_floats_without_a_gather():
    """A TPU's gather from 16 levels took 49 to 76 bytes of HBM traffic a weight."""
    kernel = jax.eval_shape(lambda: quantize(jnp.zeros((128, 8)), "nf4"))
    assert "gather" not in str(jax.make_jaxpr(lambda q: module.dequantize(q, "bfloat16"))(kernel))
