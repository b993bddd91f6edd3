"""Adapted layers and the gated gradient against their formulas in float64, in every
implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.method.low_rank import Adapter, Dense, adapted_dense, parallel_dense
from nalora_jax.ops.dispatch import Numerics, Platform


def draw(
    d_in: int, d_out: int, masked: bool, several: bool
) -> tuple[jax.Array, list[Dense], list[jax.Array]]:
    """Returns an input, layers that read it, and cotangents of their outputs."""
    rng = np.random.default_rng(d_in)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mask = jnp.abs(normal(d_out)) if masked else None
    layers = [
        Dense(
            normal(d_in, d_out),
            Adapter(normal(d_in, 4), normal(4, d_out), 0.7, mask),
            normal(d_out),
        )
    ]
    if several:
        layers.append(Dense(normal(d_in, 32), Adapter(normal(d_in, 4), normal(4, 32), 2.0)))
        layers.append(Dense(normal(d_in, 64)))
    return normal(2, 40, d_in), layers, [normal(2, 40, layer.kernel.shape[1]) for layer in layers]


def exact(x: Any, layers: list[Dense], cotangents: list[jax.Array]) -> list[np.ndarray]:
    """Returns values and the gradients of x and of each A and B by the formulas, in float64."""
    x, dx, values, gradients = np.asarray(x, np.float64), 0.0, [], []
    for layer, g in zip(layers, jax.tree.map(np.float64, cotangents), strict=True):
        kernel = np.asarray(layer.kernel, np.float64)
        y, dx = x @ kernel, dx + g @ kernel.T
        if layer.bias is not None:
            y = y + np.asarray(layer.bias)
        if layer.adapter is not None:
            a, b = (np.asarray(v, np.float64) for v in layer.adapter[:2])
            mask = 1.0 if layer.adapter.mask is None else np.asarray(layer.adapter.mask)
            s, flat, back = layer.adapter.scale, x.reshape(-1, len(a)), g.reshape(-1, b.shape[1])
            y, dx = y + s * (x @ a) @ b, dx + s * g @ b.T @ a.T
            gradients += [s * flat.T @ (back @ (b * mask).T), s * (flat @ a).T @ back]
        values.append(y)
    return [*values, dx, *gradients]


@pytest.mark.parametrize(
    ("widths", "masked", "dtype", "several"),
    [
        ((64, 128), True, "float32", True),
        ((64, 128), False, "bfloat16", False),
        ((128, 64), False, "float32", False),
        ((128, 64), True, "bfloat16", False),
        ((64, 128), True, "bfloat16", True),
    ],
)
def test_value_and_gradients_are_the_formulas(
    widths: tuple[int, int], masked: bool, dtype: str, several: bool, numerics: Any
) -> None:
    """Of one layer, or of three that read one input: with an adapter and a mask, an adapter, and
    neither."""
    x, layers, cotangents = draw(*widths, masked, several)
    chosen = numerics(dtype, result="float32")

    @jax.jit
    def run(x: jax.Array, factors: list[Any]) -> Any:
        def values(x: jax.Array, factors: list[Any]) -> list[jax.Array]:
            given = [layer._replace(kernel=layer.kernel.astype(dtype)) for layer in layers]
            for i, (a, b) in enumerate(factors):
                given[i] = given[i]._replace(adapter=layers[i].adapter._replace(a=a, b=b))
            if several:
                return [output.y for output in parallel_dense(x, given, chosen)]
            return [adapted_dense(x, given[0], chosen).y]

        ys, back = jax.vjp(values, x, factors)
        return ys, back(cotangents)

    factors = [layer.adapter[:2] for layer in layers if layer.adapter is not None]
    for got, want in zip(
        jax.tree.leaves(run(x, factors)), exact(x, layers, cotangents), strict=True
    ):
        assert (
            np.abs(got - want).max() <= (1e-5 if dtype == "float32" else 2**-6) * np.abs(want).max()
        )


def test_frozen_gradients_of_split_outputs_are_added_before_they_are_rounded() -> None:
    """Adapters' gradients are added later, so that the compiler reduces one sum over devices for
    all layers.

    Float32 sums of these integers are exact, and their roundings to bfloat16 differ from the
    rounded sum.
    """
    rng = np.random.default_rng(0)
    x, *cotangents = (
        jnp.asarray(rng.integers(-9, 10, (6, n)), jnp.bfloat16) for n in (16, 40, 40, 40)
    )
    kernels = rng.integers(-9, 10, (3, 16, 40)).astype(np.float32)
    zero = Adapter(jnp.ones((16, 4)), jnp.zeros((4, 40)))
    numerics = Numerics(
        "bfloat16", "bfloat16", "bfloat16", platform=Platform("tpu", devices=2, tensor=2)
    )

    def outputs(x: jax.Array) -> list[jax.Array]:
        layers = [Dense(jnp.asarray(kernel), zero) for kernel in kernels]
        return [layer.y for layer in parallel_dense(x, layers, numerics)]

    (gradient,) = jax.vjp(outputs, x)[1](cotangents)
    exact = sum(
        np.asarray(g, np.float32) @ kernel.T for g, kernel in zip(cotangents, kernels, strict=True)
    )
    np.testing.assert_array_equal(gradient, jnp.asarray(exact).astype(jnp.bfloat16))
