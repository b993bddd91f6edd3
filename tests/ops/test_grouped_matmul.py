"""Products by group against loops over groups, in numpy; the kernel for GPUs in interpret mode."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops.dispatch import Numerics, Platform
from nalora_jax.ops.grouped_matmul import (
    grouped_matmul,
    joins_factors,
    outer_of_all,
    triton_grouped_matmul,
)

BF16 = Numerics("bfloat16", "float32", "bfloat16", "bfloat16")
# Groups that begin and end within a tile of 128 rows, at its edges, that are empty, and several in
# one tile. The last two are not whole tiles, and fewer rows than groups.
SIZES = ([100, 0, 156, 0], [1, 127, 128, 0], [5, 6, 7, 238], [100, 60, 0, 30], [0, 1, 0, 1])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    drawn = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)
    return np.asarray(drawn.astype(jnp.float32))


CASES = [
    (sizes, (192, 128), transposed)
    for sizes, transposed in zip(SIZES, (0, 1, 0, 1, 0), strict=True)
]
CASES += [([30, 0, 101, 9], (72, 90), transposed) for transposed in (0, 1)]


@pytest.mark.parametrize(("sizes", "widths", "transposed"), CASES, ids=str)
def test_every_row_goes_through_its_own_group_s_kernel(sizes, widths, transposed):
    """Also in widths that tiles do not divide, as of gpt-oss: 1,440 with two devices on
    "tensor"."""
    x, kernels = normal(sum(sizes), widths[0]), normal(4, *widths, seed=1)
    given = jnp.asarray(kernels.swapaxes(1, 2) if transposed else kernels)
    arguments = jnp.asarray(x), given, jnp.asarray(sizes, jnp.int32), BF16
    plain = grouped_matmul(*arguments, transposed=bool(transposed))
    by_tiles = triton_grouped_matmul(*arguments, transposed=bool(transposed), interpret=True)
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum("rd,rdn->rn", x.astype(float), kernels[group].astype(float))
    for found in (plain, by_tiles):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_float32_and_the_cpu_use_the_plain_function():
    sizes = jnp.asarray([100, 156])
    float32 = Numerics(platform=Platform("gpu"))
    operands = jnp.zeros((256, 192)), jnp.zeros((2, 192, 128))
    assert triton_grouped_matmul(*operands, sizes, float32) is NotImplemented
    assert joins_factors(8, 8, float32)
    assert not joins_factors(8, 8, Numerics(platform=Platform("cpu")))
    assert joins_factors(8, 16, Numerics(platform=Platform("tpu")))
    assert not joins_factors(128, 8, Numerics(platform=Platform("tpu")))


@pytest.mark.parametrize("narrow", ["left", "right"])
def test_outer_products_are_those_of_every_group_s_rows(narrow):
    sizes, shapes = [3, 0, 4], ((7, 2), (7, 6)) if narrow == "left" else ((7, 6), (7, 2))
    x, y = normal(*shapes[0]), normal(*shapes[1], seed=1)
    group = np.repeat(np.arange(3), sizes)
    expected = np.stack([x[group == g].T @ y[group == g] for g in range(3)])
    found = outer_of_all(jnp.asarray(x), jnp.asarray(y), jnp.asarray(group), 3, "float32")
    np.testing.assert_allclose(found, expected, atol=1e-5)
