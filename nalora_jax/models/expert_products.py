"""Matmuls of rows sorted by expert, with the experts' frozen kernels and with their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from nalora_jax.method.low_rank import Adapter, Factors, Products, gated
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.grouped_matmul import (
    from_all,
    grouped_matmul,
    outer_of_all,
    own_of_all,
    ragged,
    ragged_outer,
)
from nalora_jax.ops.storage import Kernel, expand


class Groups(NamedTuple):
    """The groups of rows that are sorted by expert."""

    sizes: jax.Array  # int [experts], rows of each
    expert: jax.Array  # int [rows], ascending


def frozen_grouped_matmul(x: jax.Array, kernels: Kernel, sizes: jax.Array, numerics: Numerics) -> jax.Array:
    """Multiplies every row by its expert's frozen kernel; the kernels receive no gradient.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      kernels: ``[experts, d_in, d_out]``, as they are stored.
      sizes: int ``[experts]``.
      numerics: dtypes of operands and result.

    Returns:
      ``[rows, d_out]`` in ``numerics.result``.
    """
    chex.assert_rank([x, sizes], [2, 1])
    assert kernels.ndim == 3
    return _frozen(x, kernels, sizes, numerics)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _frozen(x: jax.Array, kernels: Any, sizes: jax.Array, numerics: Numerics) -> jax.Array:
    return grouped_matmul(x, expand(kernels, numerics.operand), sizes, numerics)


def _frozen_fwd(x: jax.Array, kernels: Any, sizes: jax.Array, numerics: Numerics) -> tuple[jax.Array, Any]:
    return _frozen(x, kernels, sizes, numerics), (kernels, sizes, jnp.zeros((0,), x.dtype))


def _frozen_bwd(numerics: Numerics, residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    kernels, sizes, like_x = residuals
    numerics = replace(numerics, result=like_x.dtype.name)
    floats = expand(kernels, numerics.operand)
    return grouped_matmul(g, floats, sizes, numerics, transposed=True), None, None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


def grouped_residual(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    groups: Groups,
    numerics: Numerics,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Returns ``s (x A_e) B_e`` per expert, with the gated gradient.

    This is `nalora_jax.method.low_rank.low_rank` over grouped rows.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      a: ``[experts, d_in, r]`` float32.
      b: ``[experts, r, d_out]`` float32.
      scale: scalar.
      groups: the rows' experts.
      numerics: its ``adapter`` is the dtype of the operands.
      mask: ``[experts, d_out]`` or None.

    Returns:
      ``[rows, d_out]`` float32, or the platform's dtype of grouped results.
    """
    chex.assert_rank([x, a, b], [2, 3, 3])
    joined = numerics.hooks.joins_expert_factors(a.shape[0], a.shape[-1])
    wide = numerics.hooks.grouped_result(numerics.adapter)
    products = GroupedProducts(groups, numerics.adapter, joined, wide)
    (y,), _ = gated(products, x, (Factors.of(Adapter(a, b, scale, mask)),))
    out: jax.Array = y
    return out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedProducts(Products):
    """Matmuls of every row with its expert's adapter; factors have a leading axis ``[experts]``."""

    groups: Groups
    operand: str = field(metadata={"static": True})
    joined: bool = field(metadata={"static": True})  # the factors of all experts are concatenated
    wide: str = field(metadata={"static": True})  # dtype of results ``[rows, d]`` that are not joined

    def _to_rank(self, x: jax.Array, factors: jax.Array) -> jax.Array:
        """Returns ``[rows, r]`` of ``[rows, d]`` times ``[experts, d, r]``."""
        if self.joined:
            return own_of_all(x, factors, self.groups.expert, self.operand)
        return ragged(x, factors, self.groups.sizes, self.operand)

    def _from_rank(self, hidden: jax.Array, factors: jax.Array) -> jax.Array:
        """Returns ``[rows, d]`` of ``[rows, r]`` times ``[experts, r, d]``."""
        if self.joined:
            return from_all(hidden, factors, self.groups.expert, self.operand)
        return ragged(hidden, factors, self.groups.sizes, self.operand, self.wide)

    def _per_expert(self, x: jax.Array, g: jax.Array, like: jax.Array) -> jax.Array:
        """Returns ``x_e^T g_e`` of all experts, the transpose of the grouped matmul."""
        if self.joined:
            return outer_of_all(x, g, self.groups.expert, like.shape[0], self.operand)
        return ragged_outer(x, g, self.groups.sizes, self.operand)

    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Products`."""
        (layer,) = layers
        hidden = layer.scale * self._to_rank(x, layer.a)
        return [self._from_rank(hidden, layer.b)], [hidden]

    def narrow(
        self, gs: Sequence[jax.Array], layers: Sequence[Factors], wides: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], None]:
        """See `Products`."""
        (g,), (wide,) = gs, wides
        return [self._to_rank(g, wide.swapaxes(1, 2))], None

    def gradients(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
        exact: Sequence[Any],
        masked: Sequence[Any],
        extra: Any,
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,), (g,) = layers, gs
        dx = self._from_rank(exact[0], layer.a.swapaxes(1, 2)).astype(x.dtype)
        return dx, [self._per_expert(x, masked[0], layer.a)], [self._per_expert(hidden[0], g, layer.b)]
