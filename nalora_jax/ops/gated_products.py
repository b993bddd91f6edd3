"""The gated gradient of A for implementations that compute several matmuls at once.

The plain function is `nalora_jax.method.low_rank`. An implementation that fuses the frozen matmul
with the adapter's (CPU), or multiplies rows by the adapters of several experts, provides its
matmuls as `Products`; `gated` puts them together with the same gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from nalora_jax.ops.storage import Kernel


class Factors(NamedTuple):
    """The arrays of a layer; a gradient has the same form, with None for frozen arrays."""

    a: Any  # float32 [d_in, r]; None, like b and scale, for a layer without an adapter
    b: Any  # float32 [r, d_out]
    scale: Any = None  # float32 scalar
    mask: jax.Array | None = None  # [d_out]
    kernel: Any = None  # frozen; None if the matmuls are the adapter's alone

    @classmethod
    def of(cls, adapter: Any, kernel: Kernel | None = None) -> Factors:
        """Returns the factors of a plain layer with a `nalora_jax.method.low_rank.Adapter` or None."""
        if adapter is None:
            return cls(None, None, kernel=kernel)
        a, b, scale, mask, *_ = adapter
        chex.assert_equal(a.shape[-1], b.shape[-2])
        if mask is not None:
            chex.assert_shape(mask, (*b.shape[:-2], b.shape[-1]))
        return cls(a, b, jnp.asarray(scale, jnp.float32), mask, kernel)


class Products(ABC):
    """One way to compute the matmuls of layers that read the same x ``[rows, d_in]``; a pytree."""

    @abstractmethod
    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[Any]]:
        """Returns every layer's ``x W + h B`` and its ``h = s x A`` (None without an adapter)."""

    @abstractmethod
    def narrow(
        self, gs: Sequence[jax.Array], layers: Sequence[Factors], wides: Sequence[Any]
    ) -> tuple[list[Any], Any]:
        """Returns every layer's ``g wide^T`` for its wide ``[r or 2 r, d_out]``.

        The second result is passed to `gradients` as ``extra``.
        """

    @abstractmethod
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
        """Returns ``dx``, the sum of ``g W^T + exact A^T``, and every layer's gradients of A and B.

        They are ``dA = x^T masked`` and ``dB = h^T g``.
        """


@jax.custom_vjp
def gated(
    products: Products, x: jax.Array, layers: tuple[Factors, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns every layer's ``x W + s (x A) B`` and ``s x A``; the gradient of A is gated."""
    ys, hidden = products.forward(x, layers)
    return tuple(ys), tuple(hidden)


def _gated_fwd(
    products: Products, x: jax.Array, layers: tuple[Factors, ...]
) -> tuple[Any, tuple[Any, ...]]:
    ys, hidden = products.forward(x, layers)
    saved = x
    if not any(layer.a is not None for layer in layers):
        saved = jnp.zeros((0,), x.dtype)
    return (tuple(ys), tuple(hidden)), (products, saved, layers, hidden)


def _gated_bwd(
    saved: tuple[Any, ...], cotangents: tuple[Any, Any]
) -> tuple[None, jax.Array, tuple[Factors, ...]]:
    products, x, layers, hidden = saved
    gs, _ = cotangents
    # B for dx and, below it, B * m for dA: one matmul over the wide cotangent computes both.
    backs, extra = products.narrow(gs, layers, [_with_masked(layer) for layer in layers])
    # The scale multiplies these rank-wide arrays, not [rows, d_out].
    scaled = [
        None if back is None else layer.scale * back for layer, back in zip(layers, backs, strict=True)
    ]
    ranks = [0 if layer.b is None else layer.b.shape[-2] for layer in layers]
    exact = [None if s is None else s[:, :rank] for s, rank in zip(scaled, ranks, strict=True)]
    masked = [None if s is None else s[:, -rank:] for s, rank in zip(scaled, ranks, strict=True)]
    dx, das, dbs = products.gradients(x, gs, layers, hidden, exact, masked, extra)
    zero = [jax.tree.map(jnp.zeros_like, (layer.scale, layer.mask)) for layer in layers]
    return (
        None,
        dx,
        tuple(Factors(da, db, *zeros) for da, db, zeros in zip(das, dbs, zero, strict=True)),
    )


gated.defvjp(_gated_fwd, _gated_bwd)


def _with_masked(layer: Factors) -> jax.Array | None:
    """Returns B ``[r, d_out]``, with ``B * m`` below it if there is a mask: ``[2 r, d_out]``."""
    if layer.b is None or layer.mask is None:
        return layer.b
    return jnp.concatenate([layer.b, layer.b * layer.mask[..., None, :]], axis=-2)
