"""One product for base and adapter: equal to the two products that it stands for, gated gradient included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.nn import fused_lora
from nalora_jax.nn.fused_lora import adapted_matmul, worthwhile
from nalora_jax.nn.low_rank import residual
from nalora_jax.nn.matmul import Numerics, expand, matmul
from nalora_jax.nn.quantize import quantize


def _draw(d_in: int, d_out: int, rank: int = 4) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(d_in)
    shapes = ((2, 7, d_in), (d_in, d_out), (d_in, rank), (rank, d_out), (d_out,))
    x, kernel, a, b, mask = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, kernel, a, b, jnp.abs(mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (64, 64)])
def test_value_and_gradients_are_those_of_two_products(widths: tuple[int, int], masked: bool) -> None:
    x, kernel, a, b, mask = _draw(*widths)
    gate = mask if masked else None

    def two(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return matmul(x, kernel, Numerics()) + residual(x, a, b, 0.7, gate)

    one, back = jax.vjp(lambda x, a, b: adapted_matmul(x, kernel, a, b, 0.7, gate, Numerics()), x, a, b)
    want, want_back = jax.vjp(two, x, a, b)
    g = jax.random.normal(jax.random.key(0), want.shape)
    for got, expected in zip((one, *back(g)), (want, *want_back(g)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    if masked:  # and the mask did something
        plain = jax.vjp(lambda a: adapted_matmul(x, kernel, a, b, 0.7, None, Numerics()), a)[1](g)[0]
        assert np.abs(plain - back(g)[1]).max() > 1e-2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_kernels_are_expanded(kind: str) -> None:
    x, kernel, a, b, _ = _draw(64, 128)
    held = quantize(kernel, kind)
    ours = adapted_matmul(x, held, a, b, 0.7, None, Numerics())
    np.testing.assert_allclose(ours, x @ expand(held) + 0.7 * (x @ a) @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(64, 128), (128, 64)])
def test_bf16_operands_cost_their_rounding_only(widths: tuple[int, int]) -> None:
    x, kernel, a, b, mask = _draw(*widths)

    def gradients(operand: str) -> tuple[jax.Array, ...]:
        def loss(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(adapted_matmul(x, kernel, a, b, 0.1, mask, Numerics(operand)) / 20))

        return jax.grad(loss, argnums=(0, 1, 2))(x, a, b)

    for low, high in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert 0 < np.abs(low - high).max() < 0.05 * np.abs(high).max()


@pytest.mark.parametrize("operand", ["float32", "bfloat16"])
def test_contractions_filled_up_with_zeros_change_nothing(operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel, a, b, mask = _draw(64, 128, rank=5)

    def results(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        x, kernel, a, b = arrays
        monkeypatch.setattr(fused_lora, "contraction_multiple", lambda _: multiple)
        wide = mask[: b.shape[1]]
        y, back = jax.vjp(lambda x, a, b: adapted_matmul(x, kernel, a, b, 0.7, wide, Numerics(operand)), x, a, b)
        return y, *back(jnp.cos(y))

    for arrays in ((x, kernel, a, b), (jnp.tile(x, 2), kernel.T, b.T, a.T)):
        for plain, filled in zip(results(1, *arrays), results(32, *arrays), strict=True):
            np.testing.assert_allclose(plain, filled, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rows", "expected"), [(1, False), (31, False), (32, True), (4096, True)])
def test_few_rows_leave_the_kernel_alone(rows: int, expected: bool) -> None:
    assert worthwhile(jnp.zeros((1, rows, 64)), jnp.zeros((64, 128))) is expected
