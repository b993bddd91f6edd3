"""Rows of tokens in the order of their experts, and their sums: each is the other's gradient.

JAX's gradient of a gather is a scatter, which adds rows one by one in the dtype of the rows. Every
place is read by one token, so the gradient is written as gathers here.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Places for the rows of tokens; every row has one place, and a place at most one row."""

    token: jax.Array  # int [places], the token of each place
    of_rows: jax.Array  # int [tokens * top_k], the place of each row, top_k rows of token 0 first
    used: jax.Array | None = None  # bool [places], places with a row; None: all


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(x: jax.Array, places: Places, top_k: int) -> jax.Array:
    """Returns the token of each place, ``[places, d]``, zeros in unused places.

    Args:
      x: ``[tokens, d]``.
      places: places of the rows.
      top_k: rows of each token.
    """
    rows = _taken(x, places.token)
    if places.used is None:
        return rows
    return jnp.where(places.used[:, None], rows, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def summed(y: jax.Array, places: Places, top_k: int) -> jax.Array:
    """Returns the sum of each token's rows, ``[tokens, d]``; arguments as for `spread`, ``y [places, d]``."""
    return jnp.sum(_taken(y, places.of_rows).reshape(-1, top_k, y.shape[-1]), axis=1)


def _spread_fwd(x: jax.Array, places: Places, top_k: int) -> tuple[jax.Array, Places]:
    return spread(x, places, top_k), places


def _spread_bwd(top_k: int, places: Places, g: jax.Array) -> tuple[jax.Array, None]:
    return summed(g, places, top_k), None


def _summed_fwd(y: jax.Array, places: Places, top_k: int) -> tuple[jax.Array, Places]:
    return summed(y, places, top_k), places


def _summed_bwd(top_k: int, places: Places, g: jax.Array) -> tuple[jax.Array, None]:
    return spread(g, places, top_k), None


spread.defvjp(_spread_fwd, _spread_bwd)
summed.defvjp(_summed_fwd, _summed_bwd)


@jax.custom_vjp
def permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns the rows ``x[order]`` of a permutation with the given inverse."""
    return _taken(x, order)


permuted.defvjp(
    lambda x, order, inverse: (permuted(x, order, inverse), (order, inverse)),
    lambda orders, g: (permuted(g, *orders[::-1]), None, None),
)


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns ``x[rows]``; without a promise, XLA writes the rows again to mask those out of bounds."""
    return jnp.asarray(x).at[rows].get(mode="promise_in_bounds")
