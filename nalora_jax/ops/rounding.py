"""Rounding to the dtypes of the numerics, and what is saved for the backward pass (residuals, in autodiff's sense).

A rematerialised layer saves what bears one of two names: `SAVED` for what takes a matrix product to recompute, and
`SAVED_WIDE` for that part of it which is as wide as the feed-forward block. Its input, which every policy
saves, is `LAYER_INPUT`, for those that say where.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.registry import operation
from nalora_jax.ops.storage import Stored, expand

SAVED, SAVED_WIDE, LAYER_INPUT = "saved", "saved_wide", "layer_input"


@operation
def rounded(x: jax.Array, dtype: Any, numerics: Numerics) -> jax.Array:
    """``x.astype(dtype)``, and as differentiable."""
    return x.astype(dtype)


@operation
def save_residual(x: jax.Array, dtype: str, numerics: Numerics, name: str = SAVED) -> jax.Array | Stored:
    """``x`` as it is saved for the backward pass: rounded to ``dtype``, and named for rematerialised layers.

    `read_residual` undoes it; an implementation may store the bits in another form.
    """
    return checkpoint_name(rounded(x, dtype, numerics), name)


def read_residual(x: jax.Array | Stored, dtype: Any) -> jax.Array:
    """What `save_residual` was given, as ``dtype``."""
    return expand(x).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_and_save(x: jax.Array, numerics: Numerics) -> jax.Array:
    """``x`` rounded to ``numerics.residual``, and saved so by a rematerialised layer; its gradient passes unchanged."""
    return _rounded_and_saved(x, numerics)


def _rounded_and_saved(x: jax.Array, numerics: Numerics) -> jax.Array:
    return read_residual(save_residual(x, numerics.residual, numerics), x.dtype)


# The rule calls no custom function itself: a rematerialisation policy sees no names inside of one.
round_and_save.defvjp(lambda x, numerics: (_rounded_and_saved(x, numerics), None), lambda numerics, _, g: (g,))
