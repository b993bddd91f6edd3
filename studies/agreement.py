"""Steps by agreement over time: longer for channels whose gradients have kept their sign.

    nalora train --import studies/agreement.py --mechanisms agreement

m / sqrt(v), with Adam's moments of B, is near 1 or -1 if the gradients of the last steps agree and near 0 if they
cancel. The update of a column of B is that ratio times the learning rate, so its importance over the mean of its layer
needs no moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.method.rules import Context, Mechanism, register_mechanism, relative


def agreement(update: Array) -> Array:
    """Returns the importance of each column of B over its layer's mean, ``[..., d_ff]``.

    Args:
      update: of B by Adam without weight decay, ``[..., r, d_ff]``: proportional to m / sqrt(v).
    """
    return relative(jnp.sqrt(jnp.mean(jnp.square(update), axis=-2)))


def keep_norm(factor: Array, update: Array) -> Array:
    """Returns ``factor [..., d_ff]`` scaled so that ``update [..., r, d_ff]`` keeps its norm in each layer."""
    squares = jnp.sum(jnp.square(update), axis=-2)
    scaled = jnp.sum(squares * jnp.square(factor), axis=-1, keepdims=True)
    whole = jnp.sum(squares, axis=-1, keepdims=True)
    return factor * jnp.where(scaled > 0, jnp.sqrt(whole / jnp.where(scaled > 0, scaled, 1)), 1)


@register_mechanism("agreement")
@dataclass(frozen=True)
class Agreement(Mechanism):
    """`agreement` on the update of B's columns, of which it keeps the norm, also if it is permuted."""

    statistics: ClassVar[tuple[str, ...]] = ("slope",)  # only its shape is used
    reallocates: ClassVar[bool] = False  # it normalizes itself: `keep_norm`

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns the importances; ones for the log, which is written before the update is known."""
        if context.update is None:
            return jnp.ones_like(memory["slope"])
        return agreement(context.update)

    def permuted(self, factor: Array, context: Context, order: Array | None = None) -> Array:
        """Returns the factors in their order, which keep the norm of the update."""
        factor = super().permuted(factor, context, order)
        return factor if context.update is None else keep_norm(factor, context.update)
