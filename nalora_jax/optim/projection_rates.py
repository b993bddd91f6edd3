"""A learning rate of its own for some projections' adapters, by ordered rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from nalora_jax import trees


def scale_by_projection(rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies the updates of each adapter, A and B alike, by the factor of the first rule that matches its path.

    It belongs after the preconditioner, the learning rate and the weight decay, so that a factor is a ratio of learning
    rates; before an optimizer such as Adam, which divides by the gradient's size, it would do next to nothing.

    Args:
      rates: (regular expression, factor) pairs, searched in stacked paths such as ``layers/ffn/gate_proj``.

    Raises:
      NaloraError: on ``init``, where a pattern matches no adapter, or is no regular expression.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        trees.match_rules(rates, {_projection(path) for path in trees.flatten(params)}, where="--optimizer.rates")
        return optax.EmptyState()

    def update_fn(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params

        def scale(path: str, update: jax.Array) -> jax.Array:
            match = trees.first_match(rates, _projection(path))
            return update if match is None else update * match[1]

        return trees.map_named(scale, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def _projection(path: str) -> str:
    """``layers/ffn/gate_proj/a`` -> ``layers/ffn/gate_proj``."""
    return path.rpartition("/")[0]
