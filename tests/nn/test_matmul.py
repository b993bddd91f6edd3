"""Frozen products: every fast path equals the plain one, in both passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.nn.matmul import Numerics, kept, matmul, numerics_for, pack, rounded


def _operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 3, 16), (16, 8), (2, 3, 8)])


def test_float32_is_the_plain_product_with_its_gradient() -> None:
    x, kernel, g = _operands()
    value, vjp = jax.vjp(lambda x: matmul(x, kernel, Numerics()), x)
    np.testing.assert_allclose(value, x @ kernel, rtol=1e-6)
    np.testing.assert_allclose(vjp(g)[0], g @ kernel.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
def test_low_precision_rounds_operands_and_accumulates_in_float32(result: str) -> None:
    x, kernel, g = _operands()
    numerics = Numerics("bfloat16", result)
    value, vjp = jax.vjp(lambda x: matmul(x, kernel.astype(jnp.bfloat16), numerics), x)

    def rounded(v: jax.Array) -> np.ndarray:
        return np.asarray(v.astype(jnp.bfloat16), np.float64)

    tolerance = 1e-5 if result == "float32" else 1e-2
    assert value.dtype == result
    np.testing.assert_allclose(
        np.asarray(value, np.float64), rounded(x) @ rounded(kernel), rtol=tolerance, atol=tolerance
    )
    dx = vjp(g.astype(result))[0]
    assert dx.dtype == jnp.float32
    np.testing.assert_allclose(dx, rounded(g) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)


def test_a_frozen_kernel_has_no_gradient() -> None:
    x, kernel, _ = _operands()
    for numerics in (Numerics(), Numerics("bfloat16", "float32")):
        gradient = jax.grad(lambda k, n=numerics: jnp.sum(matmul(x, k, n) ** 2))(kernel)
        assert not np.any(gradient)


def test_packed_kernels_give_the_same_bits() -> None:
    x, kernel, _ = _operands()
    stack = jnp.stack([kernel, 2 * kernel]).astype(jnp.bfloat16)
    numerics = Numerics("bfloat16", "float32")
    packed = pack({"kernel": stack, "scale": jnp.ones((2, 8))})
    assert packed["kernel"].dtype == jnp.uint16
    assert packed["scale"].dtype == jnp.float32
    for i in range(2):
        np.testing.assert_array_equal(matmul(x, stack[i], numerics), matmul(x, packed["kernel"][i], numerics))


def test_numerics_by_platform() -> None:
    assert numerics_for("float32", "tpu") == Numerics()
    assert numerics_for("bfloat16", "cpu").result == "float32"
    assert numerics_for("bfloat16", "tpu").result == "bfloat16"
    with pytest.raises(NaloraError, match="float16"):
        numerics_for("float16", "cpu")


def test_kept_rounds_the_value_and_passes_the_gradient_on() -> None:
    x = jnp.linspace(-1, 1, 31)
    value, back = jax.vjp(lambda x: kept(x, "bfloat16"), x)
    np.testing.assert_array_equal(value, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(back(x)[0], x)
    np.testing.assert_array_equal(kept(x, "float32"), x)


def test_rounding_by_integers_is_the_conversion_to_bf16_and_differentiable() -> None:
    rng = np.random.default_rng(0)
    ties = np.array([1.00390625, 1.01171875, -1.00390625])  # halfway between two bf16 numbers: to even
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e-39, np.finfo(np.float32).max])
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = jnp.asarray(np.concatenate([ties, edges, bits[np.isfinite(bits)]]).astype(np.float32))
    got = jax.jit(lambda x: rounded(x, "bfloat16"))(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(x).astype(got.dtype).view(np.uint16))
    assert np.all(np.isnan(np.asarray(rounded(jnp.asarray([np.nan, -np.nan], jnp.float32), "bfloat16"), np.float32)))
    slope = jax.grad(lambda x: jnp.sum(rounded(x, "bfloat16").astype(jnp.float32) ** 2))(x[:3])
    np.testing.assert_array_equal(slope, 2 * np.asarray(got[:3], np.float32))
