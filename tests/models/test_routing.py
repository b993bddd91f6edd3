"""Rows of tokens by place, their sums, and the gradients of both, against JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.models.routing import Places, permuted, spread, summed

TOKENS, TOP_K, WIDTH = 6, 3, 4


@pytest.fixture(params=[0, 5], ids=["every place is used", "five places are not"])
def places(request: pytest.FixtureRequest) -> Places:
    """The 18 rows of six tokens in random places."""
    count = TOKENS * TOP_K + request.param
    of_rows = np.random.default_rng(1).permutation(count)[: TOKENS * TOP_K]
    token, used = np.zeros(count, int), np.zeros(count, bool)
    token[of_rows], used[of_rows] = np.arange(TOKENS * TOP_K) // TOP_K, True
    return Places(jnp.array(token), jnp.array(of_rows), jnp.array(used) if request.param else None)


def test_rows_and_sums_have_the_gradients_of_jax(places: Places) -> None:
    x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
    y = jax.random.normal(jax.random.key(1), (places.token.shape[0], WIDTH))
    used = jnp.ones(len(y), bool) if places.used is None else places.used

    def plain_spread(x: jax.Array) -> jax.Array:
        return jnp.where(used[:, None], x[places.token], 0)

    def plain_sum(y: jax.Array) -> jax.Array:
        return jnp.zeros((TOKENS, WIDTH)).at[places.token].add(jnp.where(used[:, None], y, 0))

    for ours, plain, at, g in (
        (lambda x: spread(x, places, TOP_K), plain_spread, x, y),
        (lambda y: summed(y, places, TOP_K), plain_sum, y, x),
    ):
        (value, back), (expected, expected_back) = jax.vjp(ours, at), jax.vjp(plain, at)
        np.testing.assert_allclose(value, expected, atol=1e-6)
        np.testing.assert_allclose(back(g)[0], expected_back(g)[0], atol=1e-6)


def test_a_permutation_has_the_gradient_of_jax() -> None:
    order = jnp.array(np.random.default_rng(2).permutation(TOKENS))
    x, g = jax.random.normal(jax.random.key(2), (2, TOKENS, WIDTH))
    value, back = jax.vjp(lambda x: permuted(x, order, jnp.argsort(order)), x)
    expected, expected_back = jax.vjp(lambda x: x[order], x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(back(g)[0], expected_back(g)[0])


def test_the_gradients_scatter_no_rows(places: Places) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(summed(spread(x, places, TOP_K), places, TOP_K) ** 2)

    lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((TOKENS, WIDTH))).as_text()
    assert "gather" in lowered
    assert "scatter" not in lowered
