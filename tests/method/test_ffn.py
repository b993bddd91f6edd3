"""Gated blocks, and the dense layer with an adapter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.method import activations
from nalora_jax.method.ffn import Adapters, GatedFFN, LoRADense, gated_product
from nalora_jax.method.low_rank import adapted_dense
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.ops.dispatch import Numerics
from tests.observed import observed

D, F, R = 8, 20, 3
GATED = Adapters((("gate_proj", R), ("up_proj", R), ("down_proj", R)))


def test_long_rows_give_no_more_positions_than_they_may() -> None:
    """A row of 64 positions, at most 8 of them: stride 4 becomes 8, and the probe's 8 becomes
    16."""

    def measured(**stats: int) -> dict[str, jax.Array]:
        config = GateStatsConfig(**stats)
        block = GatedFFN(D, F, "silu", GATED, stats=config)
        variables = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 2, D)))
        x = jax.random.normal(jax.random.key(1), (2, 64, D))
        return jax.jit(lambda v: observed(block, v, x)[1])(variables)

    bounded, strides = (
        measured(stride=4, probe_stride=8, positions=8),
        measured(stride=8, probe_stride=16),
    )
    for name, value in strides.items():
        np.testing.assert_array_equal(bounded[name], value, err_msg=name)
    assert (float(np.sum(strides["tokens"])), float(np.sum(strides["probe_tokens"]))) == (16.0, 8.0)
    free = GateStatsConfig(stride=4, probe_stride=8, positions=16)
    assert free.of_rows(64) == GateStatsConfig(stride=4, probe_stride=8)


@pytest.mark.parametrize(("name", "limit"), [("silu", 0.0), ("gelu", 0.0), ("clamped_swish", 2.0)])
def test_gated_product_has_autodiffs_gradient(name: str, limit: float, numerics: Any) -> None:
    activation = activations.get_activation(name)
    z, u, g = (jax.random.normal(k, (4, 30)) * 3 for k in jax.random.split(jax.random.key(0), 3))
    ours = jax.vjp(lambda z, u: gated_product(z, u, activation, numerics(), limit)[0], z, u)[1](g)
    factor = (lambda u: 1 + jnp.clip(u, -limit, limit)) if limit else (lambda u: u)
    plain = jax.vjp(lambda z, u: activation.phi(z) * factor(u), z, u)[1](g)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


class Layer(LoRADense):
    """The dense layer itself."""

    def __call__(self, x: jax.Array, scale: float = 1.0, **options: Any) -> Any:
        return adapted_dense(x, self.dense(x.shape[-1], scale, **options), Numerics())


def layer_of(**options: Any) -> tuple[Layer, dict, jax.Array]:
    """A layer, its variables with random values, and an input."""
    layer, rng = Layer(40, 4, use_bias=True, **options), np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return (
        layer,
        jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), jnp.float32), shapes),
        x,
    )


def test_dora_is_the_papers_formula() -> None:
    layer, variables, x = layer_of(dora=True)
    got, _ = layer.apply(variables, x, 0.5)
    params, lora = (jax.tree.map(np.float64, variables[name]) for name in ("params", "lora"))
    whole = params["kernel"] + 0.5 * lora["a"] @ lora["b"]
    want = (
        np.asarray(x) @ (whole / np.linalg.norm(whole, axis=0) * lora["magnitude"]) + params["bias"]
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    layer, variables, x = layer_of(dropout=0.5)
    still, _ = layer.apply(variables, x)
    moved, delta = layer.apply(
        variables, x, deterministic=False, rngs={"dropout": jax.random.key(7)}
    )
    base, _ = layer.apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(moved - delta, base, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(still - moved)).max() > 0.1
