"""A frozen dense layer with a low-rank adapter, and the gated gradient of A.

    y = x W + b + s (x A) B

W and b are frozen and have no gradient. The adapter of a gate has a mask m with one weight for each
output channel (mechanism 1). The mask does not change the value. With g the cotangent of y,

    dx = g W^T + s (g B^T) A^T          exact
    dB = s (x A)^T g                    exact
    dA = s x^T (g (B * m)^T)            gated: the mask weighs the channels that shape A

A masked dB would starve the optimizer's moments; a masked dx would bias the gradients of the layers
below. `gated` is this gradient; implementations that fuse the adapter's matmuls with the frozen one
(CPU), or multiply rows by the adapters of several experts, provide their matmuls as `Products`.

Sources: LoRA, arXiv 2106.09685; DoRA, 2402.09353.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.common import trees
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.storage import SAVED, Kernel, dot, expand, matmul

# Projections that compute a gate's pre-activation, in a gated and in a self-gated block.
_GATE_NAMES = ("gate_proj", "in_proj")


class Adapter(NamedTuple):
    """A low-rank adapter."""

    a: jax.Array  # float32 [d_in, r]
    b: jax.Array  # float32 [r, d_out]
    scale: jax.Array | float = 1.0  # scalar s
    # [d_out], weights of the output channels in A's gradient
    mask: jax.Array | None = None
    magnitude: jax.Array | None = None  # [d_out], of a weight-decomposed adapter (DoRA)
    # initial A and B if B is not 0 (PiSSA, LoRA-GA)
    start: tuple[jax.Array, jax.Array] | None = None


class Dense(NamedTuple):
    """The arrays of a frozen layer and of its adapter."""

    kernel: Kernel  # [d_in, d_out]
    adapter: Adapter | None = None
    bias: jax.Array | None = None  # [d_out]
    dropout: Callable[[jax.Array], jax.Array] | None = None  # of the adapter's input
    name: str = "dense"  # in profiles
    # x for the adapter, if its gradient is summed separately
    inner: jax.Array | None = None

    @property
    def is_plain(self) -> bool:
        """True if the layer has no DoRA and no dropout of an adapter."""
        if self.adapter is None:
            return True
        return self.adapter.magnitude is None and self.dropout is None


class LowRankHidden(NamedTuple):
    """The adapter's output as two factors, whose product is not formed."""

    value: jax.Array  # s x A, float32 [..., r]; has no gradient
    b: jax.Array  # float32 [r, d_out]


class Adapted(NamedTuple):
    """The output of a layer."""

    y: jax.Array  # [..., d_out]
    # The adapter's part of y, [..., d_out] or its factors; None without an adapter.
    delta: jax.Array | LowRankHidden | None = None


# ---------------------------------------------------------------- the gated gradient of A


class Factors(NamedTuple):
    """The arrays of a layer; a gradient has the same form, with None for frozen arrays."""

    a: Any  # float32 [d_in, r]; None, like b and scale, for a layer without an adapter
    b: Any  # float32 [r, d_out]
    scale: Any = None  # float32 scalar
    mask: jax.Array | None = None  # [d_out]
    kernel: Any = None  # frozen; None if the matmuls are the adapter's alone

    @classmethod
    def of(cls, adapter: Adapter | None, kernel: Kernel | None = None) -> Factors:
        """Returns the factors of a plain layer."""
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
    def forward(
        self, x: jax.Array, layers: Sequence[Factors]
    ) -> tuple[list[jax.Array], list[Any]]:
        """Returns every layer's ``x W + h B`` and its ``h = s x A`` (None without an adapter)."""

    @abstractmethod
    def backward(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """Returns ``dx``, and every layer's gradients of A and B (None without an adapter).

        ``dx`` is the sum of ``g W^T + exact A^T``, ``dA = x^T masked`` and ``dB = h^T g``, with the
        arrays of `rank_cotangents`.
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
    """Returns the value of `gated` and the residuals of `_gated_bwd`; x is not saved if no layer
    has an adapter."""
    ys, hidden = products.forward(x, layers)
    saved = x
    if not any(layer.a is not None for layer in layers):
        saved = jnp.zeros((0,), x.dtype)
    return (tuple(ys), tuple(hidden)), (products, saved, layers, hidden)


def _gated_bwd(
    saved: tuple[Any, ...], cotangents: tuple[Any, Any]
) -> tuple[None, jax.Array, tuple[Factors, ...]]:
    """Returns the gradients of x and of the layers' A and B; ``products`` and frozen arrays have
    none."""
    products, x, layers, hidden = saved
    gs, _ = cotangents
    dx, das, dbs = products.backward(x, gs, layers, hidden)
    of_layers = []
    for layer, da, db in zip(layers, das, dbs, strict=True):
        # Zeros for arrays, None for None.
        scale, mask = jax.tree.map(jnp.zeros_like, (layer.scale, layer.mask))
        of_layers.append(Factors(da, db, scale, mask))
    return None, dx, tuple(of_layers)


gated.defvjp(_gated_fwd, _gated_bwd)


def stack_masked(layer: Factors) -> jax.Array:
    """Returns B ``[r, d_out]``, with ``B * m`` below it if there is a mask: ``[2 r, d_out]``.

    One matmul of the wide cotangent with it computes both arrays of `rank_cotangents`.
    """
    if layer.mask is None:
        return layer.b
    masked = layer.b * layer.mask[..., None, :]
    return jnp.concatenate([layer.b, masked], axis=-2)


def rank_cotangents(layer: Factors, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``exact = s g B^T``, for dx, and ``masked = s g (B * m)^T``, for dA, both ``[rows,
    r]``.

    ``back`` is ``g stack_masked(layer)^T``, ``[rows, r or 2 r]``; without a mask both are equal.
    The scale multiplies it, because the cotangent g ``[rows, d_out]`` is wider.
    """
    scaled = layer.scale * back
    rank = layer.b.shape[-2]
    return scaled[:, :rank], scaled[:, -rank:]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterProducts(Products):
    """The matmuls of one adapter alone."""

    numerics: Numerics = field(metadata={"static": True})

    def _dot(
        self, x: jax.Array, y: jax.Array, dims: tuple[int, int] = (1, 0)
    ) -> jax.Array:
        """Multiplies two matrices over dimensions ``dims`` in the adapters' operand dtype; float32
        result."""
        return dot(x, y, self.numerics, dims, operand=self.numerics.adapter)

    def forward(
        self, x: jax.Array, layers: Sequence[Factors]
    ) -> tuple[list[jax.Array], list[Any]]:
        """See `Products`."""
        (layer,) = layers
        # [rows, r]; saved by a rematerialized layer, which would multiply x by A again otherwise
        hidden = layer.scale * self._dot(x, layer.a)
        hidden = checkpoint_name(hidden, SAVED)
        y = self._dot(hidden, layer.b)
        return [y], [hidden]

    def backward(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,) = layers
        (g,) = gs
        back = self._dot(g, stack_masked(layer), (1, 1))
        exact, masked = rank_cotangents(layer, back)
        dx = self._dot(exact, layer.a, (1, 1)).astype(x.dtype)
        da = self._dot(x, masked, (0, 0))
        db = self._dot(hidden[0], g, (0, 0))
        return dx, [da], [db]


def low_rank(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Returns the adapter's output ``s (x A) B``, with the gated gradient of A if there is a mask.

    Args:
      x: ``[..., d_in]``.
      a: ``[d_in, r]`` float32.
      b: ``[r, d_out]`` float32.
      scale: scalar ``s``.
      mask: ``[d_out]`` weights of the output channels, or None for the plain gradient.

    Returns:
      ``[..., d_out]`` float32.
    """
    y, _ = _residual(x, Adapter(a, b, scale, mask), Numerics())
    return y


def init_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns A of a fresh adapter ``[..., d_in, r]``, uniform in +-1/sqrt(d_in).

    PEFT draws from the same distribution (Kaiming-uniform with a = sqrt 5).
    """
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _residual(
    x: jax.Array, adapter: Adapter, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Returns the adapter's output ``s (x A) B``, float32 ``[..., d_out]``, and ``s x A``, float32
    ``[..., r]``."""
    factors = Factors.of(adapter)
    chex.assert_axis_dimension(factors.a, 0, x.shape[-1])
    *lead, d_in = x.shape
    rank, d_out = factors.b.shape
    flat = x.reshape(-1, d_in)  # [rows, d_in]
    (y,), (hidden,) = gated(AdapterProducts(numerics), flat, (factors,))
    return y.reshape(*lead, d_out), hidden.reshape(*lead, rank)


# ---------------------------------------------------------------- the layer


@operation
def adapted_dense(x: jax.Array, dense: Dense, numerics: Numerics) -> Adapted:
    """Returns ``x W + b + s (x A) B`` and the adapter's part of it.

    Args:
      x: ``[..., d_in]``.
      dense: the layer.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``, and the adapter's part.
    """
    with jax.named_scope(dense.name):
        base = matmul(x, dense.kernel, numerics)
        adapter = dense.adapter
        if adapter is None:
            return Adapted(add_bias(base, dense.bias))
        inner = x
        if dense.inner is not None:
            inner = dense.inner
        if dense.dropout is not None:
            inner = dense.dropout(inner)
        delta, hidden = _residual(inner, adapter, numerics)
        if adapter.magnitude is not None:
            delta = _dora(base, delta, dense.kernel, adapter)
        delta = delta.astype(base.dtype)
        y = add_bias(base, dense.bias) + delta
        if not dense.is_plain:
            return Adapted(y, delta)
        # The factors: a returned delta would be written to memory for the few rows of a probe.
        return Adapted(y, LowRankHidden(hidden, adapter.b))


@operation
def parallel_dense(
    x: jax.Array, layers: Sequence[Dense], numerics: Numerics
) -> list[Adapted]:
    """Returns `adapted_dense` of several layers that read the same input."""
    return [adapted_dense(x, layer, numerics) for layer in layers]


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns ``y + bias``, or y if there is no bias."""
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def displacement(delta: jax.Array, start: jax.Array) -> jax.Array:
    """Returns ``delta - start``, and 0 if the difference is within the rounding of both."""
    difference = delta - start
    # Four units in the last place.
    rounding = 4 * jnp.finfo(delta.dtype).eps * jnp.abs(start)
    return jnp.where(jnp.abs(difference) <= rounding, 0, difference)


# ---------------------------------------------------------------- variants


def column_norm(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float
) -> jax.Array:
    """Returns the norm of every output channel of ``W + s A B``, float32 ``[d_out]`` (DoRA).

    The sum is not formed: ``|w|^2 + 2 s w.(A b) + s^2 |A b|^2`` takes rank-wide matmuls only.
    """
    w = kernel.astype(jnp.float32)
    s = jnp.asarray(scale, jnp.float32)
    exact = Numerics()
    a_w = dot(a, w, exact, (0, 0))  # [r, d_out]
    cross = jnp.sum(a_w * b, axis=0)  # w.(A b)
    a_a = dot(a, a, exact, (0, 0))  # [r, r]
    of_adapter = jnp.sum(dot(a_a, b, exact) * b, axis=0)  # |A b|^2
    of_kernel = jnp.sum(w * w, axis=0)
    square = of_kernel + 2 * s * cross + s * s * of_adapter
    return jnp.sqrt(jnp.maximum(square, 0.0))


def _dora(
    base: jax.Array, delta: jax.Array, kernel: Kernel, adapter: Adapter
) -> jax.Array:
    """Returns DoRA's part of the output, float32 ``[..., d_out]``: ``base`` plus it is ``m (x W + s
    x A B) / |W + s A B|``.

    ``base`` is ``x W``, ``delta`` is ``s x A B``, and m is the adapter's magnitude.
    """
    ratio = dora_ratio(kernel, adapter)
    ratio = jnp.broadcast_to(ratio, base.shape)
    return (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta


def dora_ratio(kernel: Kernel, adapter: Adapter) -> jax.Array:
    """Returns the factor ``m / |W + s A B|`` of each output channel, float32 ``[d_out]``.

    m is the adapter's magnitude.
    """
    assert adapter.magnitude is not None
    frozen = lax.stop_gradient(expand(kernel))
    # The norm is a constant of the backward pass, as in the paper (section 4.3) and in PEFT.
    norm = column_norm(frozen, adapter.a, adapter.b, adapter.scale)
    ratio = adapter.magnitude / lax.stop_gradient(norm)
    # A scale of 0 marks a layer of rank 0, whose magnitude is not used.
    return jnp.where(jnp.asarray(adapter.scale) == 0, 1.0, ratio)


def find_gates(lora: Any) -> dict[str, str]:
    """Returns the block of each adapted gate of a LoRA tree with this library's names.

    Example:
      >>> adapter = {"a": a, "b": b}
      >>> find_gates({"layers": {"ffn": {"gate_proj": adapter, "up_proj": adapter}}})
      {'layers/ffn/gate_proj': 'layers/ffn'}
    """
    blocks = {}
    for leaf in sorted(trees.flatten(lora)):
        path = leaf.removesuffix("/b")
        block, _, name = path.rpartition("/")
        if leaf.endswith("/b") and name in _GATE_NAMES:
            blocks[path] = block
    return blocks
