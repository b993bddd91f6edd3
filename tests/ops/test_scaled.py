"""Kernels as quantized checkpoints store them; tests/weights/test_quantized.py compares their values
with other libraries."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.scaled import Element, Scaled, Scaling
from nalora_jax.ops.storage import expand, matmul


def random_kernel(
    element: Element, block: tuple[int, int], lead: tuple[int, ...], d_in: int, d_out: int
) -> Scaled:
    """A kernel of random codes and scales."""
    rng = np.random.default_rng(0)
    scaling = Scaling(element, block)
    rows = d_in // scaling.per_byte
    # Without fp8's NaN, whose exponent and mantissa are ones.
    codes = rng.integers(0, 127, (*lead, rows, d_out)).astype(np.uint8)
    scales = rng.random((*lead, *scaling.blocks((d_in, d_out))), np.float32)
    return Scaled(jnp.asarray(codes), jnp.asarray(scales), None, None, None, scaling)


@pytest.mark.parametrize("element", ["e4m3", "int4"])
@pytest.mark.parametrize("block", [(0, 0), (0, 1), (16, 1), (32, 16), (24, 12)])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_equal_parts_are_those_of_the_kernel_if_it_says_so(element, block, parts):
    kernel = random_kernel(element, block, (3,), 96, 48)
    whole = np.asarray(expand(kernel))
    for axis in (1, 2):
        if not kernel.splits(axis, parts):
            continue

        def part(array: jax.Array, i: int, axis: int = axis) -> jax.Array:
            if array.shape[axis] == 1:
                return array
            return jnp.split(array, parts, axis)[i]

        for i, want in enumerate(np.split(whole, parts, axis)):
            found = expand(jax.tree.map(partial(part, i=i), kernel))
            np.testing.assert_array_equal(found, want)
    every = [kernel.splits(axis, parts) for axis in (1, 2)]
    blocks = (block[0] or 1, block[1] or 1)
    run = 16 if element == "int4" else 1
    fits = [96 % (parts * step) == 0 for step in (blocks[0], run)]
    assert every == [all(fits), 48 % (parts * blocks[1]) == 0]
    assert kernel.splits(0, 3)
    ordered = replace(kernel, order=jnp.zeros((3, 96, 1), jnp.int32))
    assert not ordered.splits(1, parts)


def test_products_and_gradients_are_those_of_the_floats():
    kernel = random_kernel("e4m3", (24, 20), (), 40, 30)
    codes = np.asarray(kernel.codes).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    wide = np.repeat(np.repeat(kernel.scales, 24, 0), 20, 1)[:40, :30]
    x = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    product = partial(matmul, numerics=Numerics())
    np.testing.assert_allclose(product(x, kernel), x @ (codes * wide), rtol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(product(x, kernel)) ** 2))(x)
    floats = jnp.asarray(codes * wide, jnp.float32)
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(x @ floats) ** 2))(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-2, atol=0.1)


def test_a_scan_over_layers_reads_one_layer_s_codes():
    """XLA:CPU widens arrays of narrow floats outside of the loop; codes are integers."""
    kernel = random_kernel("e4m3", (32, 32), (4,), 128, 128)

    @jax.jit
    def run(x: jax.Array, kernels: Scaled) -> jax.Array:
        return jax.lax.scan(lambda x, k: (jnp.tanh(matmul(x, k, Numerics())), None), x, kernels)[0]

    memory = run.lower(jnp.ones((2, 128)), kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * 128 * 128  # copies of one layer, not of four
