"""A frozen dense layer with a low-rank adapter, and the gated gradient of A.

    y = x W + b + s (x A) B

W and b are frozen and have no gradient. On a gate the adapter has a mask m, one weight for each output channel
(mechanism 1), which never changes the value: with g the cotangent of y,

    dx = g W^T + s (g B^T) A^T          exact
    dB = s (x A)^T g                    exact
    dA = s x^T (g (B * m)^T)            gated: A is shaped by the channels that the mask keeps

Masking dB as well would starve the optimizer's moments, and masking dx would bias the gradients of the layers below.
`_gated_bwd` is the only place where this stands: what differs by layer (dense or by expert) and by implementation are
the matrix products, which it is given as `Products`.

Sources: LoRA, arXiv 2106.09685; DoRA, 2402.09353.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.ops.matmul import dot, matmul
from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.registry import operation
from nalora_jax.ops.rounding import SAVED
from nalora_jax.ops.storage import Kernel, expand


class Adapter(NamedTuple):
    """A low-rank adapter, or a stack of them of which every example has its own."""

    a: jax.Array  # float32 [d_in, r], or [n, d_in, r]
    b: jax.Array  # float32 [r, d_out], or [n, r, d_out]
    scale: jax.Array | float = 1.0  # scalar s
    mask: jax.Array | None = None  # [d_out], weights of the output channels in A's gradient
    magnitude: jax.Array | None = None  # [d_out], of a weight-decomposed adapter (DoRA)
    ids: jax.Array | None = None  # int [batch], which of a stack; -1: none
    start: tuple[jax.Array, jax.Array] | None = None  # A and B as they started, if not at 0 (PiSSA, LoRA-GA)


class Dense(NamedTuple):
    """A frozen layer and its adapter, if it has one."""

    kernel: Kernel  # [d_in, d_out]
    adapter: Adapter | None = None
    bias: jax.Array | None = None  # [d_out]
    dropout: Callable[[jax.Array], jax.Array] | None = None  # on the adapter's input
    name: str = "dense"  # in profiles

    @property
    def is_plain(self) -> bool:
        """Whether the layer is ``x W + b + s (x A) B`` or ``x W + b``: no DoRA, no dropout, no stack of adapters."""
        adapter = self.adapter
        return adapter is None or (adapter.a.ndim == 2 and adapter.magnitude is None and self.dropout is None)


class LowRankHidden(NamedTuple):
    """An adapter's part of a layer's output as the two factors that it is the product of."""

    value: jax.Array  # s x A, float32 [..., r]; no gradient flows back from it
    b: jax.Array  # float32 [r, d_out]


class Adapted(NamedTuple):
    """What a layer makes of its input."""

    y: jax.Array  # [..., d_out]
    # The adapter's part of y: ``[..., d_out]``, or its factors where it has two; None without an adapter.
    delta: jax.Array | LowRankHidden | None = None


@operation
def adapted_dense(x: jax.Array, dense: Dense, numerics: Numerics) -> Adapted:
    """``x W + b + s (x A) B``.

    Args:
      x: ``[..., d_in]``.
      dense: the layer.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``, and the adapter's part of it.
    """
    with jax.named_scope(dense.name):
        base, adapter = matmul(x, dense.kernel, numerics), dense.adapter
        if adapter is None:
            return Adapted(add_bias(base, dense.bias))
        inner = x if dense.dropout is None else dense.dropout(x)
        if adapter.ids is not None:
            delta = batched_residual(inner, *adapter[:3], adapter.ids, operand=numerics.adapter)
            hidden = None
        else:
            delta, hidden = _low_rank(inner, adapter, numerics)
        if adapter.magnitude is not None:
            delta = _dora(base, delta, dense.kernel, adapter)
        delta = delta.astype(base.dtype)
        # Handed out for the few positions that a probe reads, a low-rank delta would be written to memory whole.
        apart = LowRankHidden(hidden, adapter.b) if dense.is_plain and hidden is not None else delta
        return Adapted(combine(add_bias(base, dense.bias), delta), apart)


@operation
def parallel_dense(x: jax.Array, layers: Sequence[Dense], numerics: Numerics) -> list[Adapted]:
    """`adapted_dense` of several layers that read the same input."""
    return [adapted_dense(x, layer, numerics) for layer in layers]


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``y + bias``, or y alone."""
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def combine(base: jax.Array, delta: jax.Array | None) -> jax.Array:
    """Base and adapter added; the base itself where there is no adapter."""
    return base if delta is None else base + delta


def moved_from(delta: jax.Array, start: jax.Array) -> jax.Array:
    """``delta - start``, and 0 where that is no more than the rounding of the two."""
    moved = delta - start
    return jnp.where(jnp.abs(moved) <= 4 * jnp.finfo(delta.dtype).eps * jnp.abs(start), 0, moved)


def residual(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    mask: jax.Array | None = None,
    *,
    operand: str = "float32",
) -> jax.Array:
    """The adapter's output ``s (x A) B`` alone, with the gated gradient of A where there is a mask.

    Args:
      x: ``[..., d_in]``.
      a: ``[d_in, r]`` float32.
      b: ``[r, d_out]`` float32.
      scale: scalar ``s``.
      mask: ``[d_out]`` weights of the output channels, or None for the plain gradient.
      operand: dtype that operands are rounded to; sums are float32.

    Returns:
      ``[..., d_out]`` float32.
    """
    return _low_rank(x, Adapter(a, b, scale, mask), Numerics(adapter=operand))[0]


def _low_rank(x: jax.Array, adapter: Adapter, numerics: Numerics) -> tuple[jax.Array, jax.Array]:
    """``s (x A) B`` float32 ``[..., d_out]``, and ``s x A``."""
    factors = Factors.of(adapter)
    chex.assert_shape(factors.a, (x.shape[-1], factors.b.shape[0]))
    flat = x.reshape(-1, x.shape[-1])
    (y,), (hidden,) = gated(PlainProducts(numerics), flat, (factors,))
    return y.reshape(*x.shape[:-1], y.shape[-1]), hidden.reshape(*x.shape[:-1], hidden.shape[-1])


# ---------------------------------------------------------------- the gated gradient of A


class Factors(NamedTuple):
    """What a layer's products read; a gradient has the same form, None for what is frozen."""

    a: Any  # float32 [d_in, r]; None, as b and scale, of a layer without an adapter
    b: Any  # float32 [r, d_out]
    scale: Any = None  # float32 scalar
    mask: jax.Array | None = None  # [d_out]
    kernel: Any = None  # frozen; None where the products are the adapter's alone

    @classmethod
    def of(cls, adapter: Adapter | None, kernel: Kernel | None = None) -> Factors:
        """The factors of a plain layer."""
        if adapter is None:
            return cls(None, None, kernel=kernel)
        a, b, scale, mask, *_ = adapter
        chex.assert_equal(a.shape[-1], b.shape[-2])
        if mask is not None:
            chex.assert_shape(mask, (*b.shape[:-2], b.shape[-1]))
        return cls(a, b, jnp.asarray(scale, jnp.float32), mask, kernel)


class Products(ABC):
    """The matrix products of layers that read the same x ``[rows, d_in]``, in one way of computing them; a pytree."""

    @abstractmethod
    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[Any]]:
        """Every layer's ``x W + h B`` and its ``h = s x A`` (None without an adapter)."""

    @abstractmethod
    def narrow(self, gs: Sequence[jax.Array], layers: Sequence[Factors], wides: Sequence[Any]) -> tuple[list[Any], Any]:
        """Every layer's ``g wide^T`` for its wide ``[r or 2 r, d_out]``, and whatever `gradients` can use of it."""

    @abstractmethod
    def gradients(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
        exact: Sequence[Any],
        shaping: Sequence[Any],
        beside: Any,
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """``dx = sum of g W^T + exact A^T``, and every layer's ``dA = x^T shaping`` and ``dB = h^T g``."""


@jax.custom_vjp
def gated(products: Products, x: jax.Array, layers: tuple[Factors, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Every layer's ``x W + s (x A) B`` and ``s x A``, whose backward pass is the gated gradient (see above)."""
    ys, hidden = products.forward(x, layers)
    return tuple(ys), tuple(hidden)


def _gated_fwd(products: Products, x: jax.Array, layers: tuple[Factors, ...]) -> tuple[Any, tuple[Any, ...]]:
    ys, hidden = products.forward(x, layers)
    saved = x if any(layer.a is not None for layer in layers) else jnp.zeros((0,), x.dtype)
    return (tuple(ys), tuple(hidden)), (products, saved, layers, hidden)


def _gated_bwd(saved: tuple[Any, ...], cotangents: tuple[Any, Any]) -> tuple[None, jax.Array, tuple[Factors, ...]]:
    products, x, layers, hidden = saved
    gs, _ = cotangents
    # B for dx and, below it, B * m for dA, so that one product over the wide cotangent serves both.
    backs, beside = products.narrow(gs, layers, [_beside_masked(layer) for layer in layers])
    # The scale sits on these rank-wide arrays: no pass over [rows, d_out] for it.
    scaled = [None if back is None else layer.scale * back for layer, back in zip(layers, backs, strict=True)]
    ranks = [0 if layer.b is None else layer.b.shape[-2] for layer in layers]
    exact = [None if s is None else s[:, :rank] for s, rank in zip(scaled, ranks, strict=True)]
    shaping = [None if s is None else s[:, -rank:] for s, rank in zip(scaled, ranks, strict=True)]
    dx, das, dbs = products.gradients(x, gs, layers, hidden, exact, shaping, beside)
    zero = [jax.tree.map(jnp.zeros_like, (layer.scale, layer.mask)) for layer in layers]
    return None, dx, tuple(Factors(da, db, *zeros) for da, db, zeros in zip(das, dbs, zero, strict=True))


gated.defvjp(_gated_fwd, _gated_bwd)


def _beside_masked(layer: Factors) -> jax.Array | None:
    """B ``[r, d_out]``, and below it ``B * m`` where there is a mask: ``[2 r, d_out]``."""
    if layer.b is None or layer.mask is None:
        return layer.b
    return jnp.concatenate([layer.b, layer.b * layer.mask[..., None, :]], axis=-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlainProducts(Products):
    """The products of one adapter alone; the frozen product beside it is `nalora_jax.ops.matmul.matmul`."""

    numerics: Numerics = field(metadata={"static": True})

    def _dot(self, x: jax.Array, y: jax.Array, dims: tuple[int, int] = (1, 0)) -> jax.Array:
        return dot(x, y, self.numerics, dims, self.numerics.adapter)

    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Products`."""
        (layer,) = layers
        # Saved by a rematerialised layer that saves products: r columns, for which it would multiply x again.
        hidden = checkpoint_name(layer.scale * self._dot(x, layer.a), SAVED)
        return [self._dot(hidden, layer.b)], [hidden]

    def narrow(
        self, gs: Sequence[jax.Array], layers: Sequence[Factors], wides: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], None]:
        """See `Products`."""
        (g,), (wide,) = gs, wides
        return [self._dot(g, wide, (1, 1))], None

    def gradients(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
        exact: Sequence[Any],
        shaping: Sequence[Any],
        beside: Any,
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,), (g,) = layers, gs
        dx = self._dot(exact[0], layer.a, (1, 1)).astype(x.dtype)
        return dx, [self._dot(x, shaping[0], (0, 0))], [self._dot(hidden[0], g, (0, 0))]


# ---------------------------------------------------------------- variants


def batched_residual(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float, ids: jax.Array, *, operand: str = "float32"
) -> jax.Array:
    """Each example through its own adapter of a stack, in one program.

    Args:
      x: ``[batch, seq, d_in]``.
      a: ``[n, d_in, r]``.
      b: ``[n, r, d_out]``.
      scale: scalar, common to the stack.
      ids: int ``[batch]``, the adapter of each example; -1 means none.

    Returns:
      ``[batch, seq, d_out]`` float32.
    """
    chex.assert_rank([x, a, b], 3)
    chex.assert_shape(ids, (x.shape[0],))
    chosen = jnp.maximum(ids, 0)
    on = jnp.where(ids >= 0, jnp.asarray(scale, jnp.float32), 0.0)
    # [batch, seq, r]
    hidden = jnp.einsum(
        "bsd,bdr->bsr", x.astype(operand), a[chosen].astype(operand), preferred_element_type=jnp.float32
    )
    hidden = (hidden * on[:, None, None]).astype(operand)
    return jnp.einsum("bsr,bro->bso", hidden, b[chosen].astype(operand), preferred_element_type=jnp.float32)


def column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Norm of every output channel of ``W + s A B``: float32 ``[d_out]`` (DoRA's direction).

    Computed without forming the sum: ``|w|^2 + 2 s w.(A b) + s^2 |A b|^2``, rank-wide products only.
    """
    w = kernel.astype(jnp.float32)
    s = jnp.asarray(scale, jnp.float32)
    exact = Numerics()
    cross = jnp.sum(dot(a, w, exact, (0, 0)) * b, axis=0)
    gram = jnp.sum(dot(dot(a, a, exact, (0, 0)), b, exact) * b, axis=0)
    return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=0) + 2 * s * cross + s * s * gram, 0.0))


def _dora(base: jax.Array, delta: jax.Array, kernel: Kernel, adapter: Adapter) -> jax.Array:
    """The residual that makes ``base + residual`` equal ``m (x W + s x A B) / |W + s A B|``."""
    frozen = lax.stop_gradient(expand(kernel))
    # The norm is a constant of the backward pass, as in the paper (section 4.3) and in PEFT.
    assert adapter.magnitude is not None
    ratio = adapter.magnitude / lax.stop_gradient(column_norm(frozen, *adapter[:3]))
    ratio = jnp.where(jnp.asarray(adapter.scale) == 0, 1.0, ratio)  # rank 0: the magnitude neither acts nor trains
    ratio = jnp.broadcast_to(ratio, base.shape)
    return (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta
