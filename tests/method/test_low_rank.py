"""An adapted layer against float64, and the gated gradient against its definition, in every implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.method.low_rank import Adapter, Dense, adapted_dense, parallel_dense
from nalora_jax.ops.dispatch import Numerics, Platform


def _draw(d_in: int, d_out: int, rank: int = 4) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(d_in)
    shapes = ((2, 40, d_in), (d_in, d_out), (d_in, rank), (rank, d_out), (d_out,), (d_out,), (2, 40, d_out))
    x, kernel, a, b, mask, bias, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, kernel, a, b, jnp.abs(mask), bias, g


def _exact(*arrays: Any, scale: float) -> tuple[np.ndarray, ...]:
    """Value and gradients of x, A and B by the formulas, in float64."""
    x, kernel, a, b, mask, bias, g = (np.asarray(v, np.float64) for v in arrays)
    flat, back = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dx = back @ kernel.T + scale * back @ b.T @ a.T
    da, db = scale * flat.T @ (back @ (b * mask).T), scale * (flat @ a).T @ back
    return x @ kernel + scale * (x @ a) @ b + bias, dx.reshape(x.shape), da, db


# Every pair of two values.
CASES = [(True, (64, 128), "float32"), (False, (64, 128), "bfloat16"), (False, (128, 64), "float32")]


@pytest.mark.parametrize(("masked", "widths", "dtype"), [*CASES, (True, (128, 64), "bfloat16")])
def test_value_and_gradients_are_the_formulas(
    widths: tuple[int, int], masked: bool, dtype: str, numerics: Any
) -> None:
    x, kernel, a, b, mask, bias, g = _draw(*widths)
    chosen = numerics(dtype, result="float32")

    @jax.jit
    def run(x: jax.Array, a: jax.Array, b: jax.Array) -> Any:
        def layer(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            dense = Dense(kernel.astype(dtype), Adapter(a, b, 0.7, mask if masked else None), bias)
            return adapted_dense(x, dense, chosen).y

        y, back = jax.vjp(layer, x, a, b)
        return y, *back(g)

    wanted = _exact(x, kernel, a, b, mask if masked else jnp.ones_like(mask), bias, g, scale=0.7)
    for got, want in zip(run(x, a, b), wanted, strict=True):
        assert np.abs(got - want).max() <= (1e-5 if dtype == "float32" else 2**-6) * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parallel_layers_are_each_layer_alone(dtype: str, numerics: Any) -> None:
    """Of three: with an adapter and a mask, with an adapter, and with none."""
    x, kernel, a, b, mask, bias, _ = _draw(64, 128)
    chosen = numerics(dtype, result="float32")

    def run(together: bool) -> Any:
        def ys(x: jax.Array, a: jax.Array, b: jax.Array) -> list[jax.Array]:
            layers = [
                Dense(kernel, Adapter(a, b, 0.5, mask), bias),
                Dense(kernel[:, :32], Adapter(a, b[:, :32], 2.0)),
                Dense(kernel[:, :64]),
            ]
            if together:
                return [one.y for one in parallel_dense(x, layers, chosen)]
            return [adapted_dense(x, layer, chosen).y for layer in layers]

        values, back = jax.vjp(ys, x, a, b)
        return values, back([jnp.sin(y) for y in values])

    results = (jax.tree.leaves(jax.jit(run, static_argnums=0)(together)) for together in (True, False))
    for one, other in zip(*results, strict=True):
        assert np.abs(one - other).max() <= (1e-5 if dtype == "float32" else 2**-6) * np.abs(other).max()


def test_frozen_gradients_of_split_outputs_are_added_before_they_are_rounded() -> None:
    """Adapters' gradients are added later, so that the compiler reduces one sum over devices for all layers.

    Float32 sums of these integers are exact, and their roundings to bfloat16 differ from the rounded sum.
    """
    rng = np.random.default_rng(0)
    x, *cotangents = (jnp.asarray(rng.integers(-9, 10, (6, n)), jnp.bfloat16) for n in (16, 40, 40, 40))
    kernels = rng.integers(-9, 10, (3, 16, 40)).astype(np.float32)
    zero = Adapter(jnp.ones((16, 4)), jnp.zeros((4, 40)))
    numerics = Numerics("bfloat16", "bfloat16", "bfloat16", platform=Platform("tpu", devices=2, tensor=2))

    def outputs(x: jax.Array) -> list[jax.Array]:
        layers = [Dense(jnp.asarray(kernel), zero) for kernel in kernels]
        return [layer.y for layer in parallel_dense(x, layers, numerics)]

    (gradient,) = jax.vjp(outputs, x)[1](cotangents)
    exact = sum(np.asarray(g, np.float32) @ kernel.T for g, kernel in zip(cotangents, kernels, strict=True))
    np.testing.assert_array_equal(gradient, jnp.asarray(exact).astype(jnp.bfloat16))
