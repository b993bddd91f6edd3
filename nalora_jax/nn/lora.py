"""A frozen dense layer that carries a low-rank adapter (see `nalora_jax.nn.low_rank`), as a Linen module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.nn.fused_lora import adapted_matmul, worthwhile
from nalora_jax.nn.low_rank import TargetSpec, batched_residual, column_norm, combine, init_a, moved_from, residual
from nalora_jax.nn.matmul import STACKS, Kernel, Numerics, dot, expand, is_native, matmul
from nalora_jax.nn.side_by_side import Adapter, Projection, project
from nalora_jax.selection import sampled


class Probe(NamedTuple):
    """The two parts of an adapted layer's output on one in n positions; constants of the backward pass."""

    base: jax.Array  # [batch, seq / n, d_out], the frozen layer
    delta: jax.Array  # the same shape, the adapter's residual
    # What it is the product of, where it is that of two factors: float32 [tokens, r] and [r, d_out].
    factors: tuple[jax.Array, jax.Array] | None = None


class Hidden(NamedTuple):
    """What an adapter makes of a layer's input, in place of its residual, which `LoRADense.probe` makes of it."""

    value: jax.Array  # s x A, float32 [..., r]


class LoRADense(nn.Module):
    """A frozen dense layer with an optional low-rank adapter.

    Attributes:
      features: ``d_out``.
      target: the adapter's spec, or None for a plain frozen layer. Without a ``lora`` collection the layer is the base.
      use_bias: whether the frozen layer adds a bias.
      dora: whether the adapter is weight-decomposed.
      dropout: rate on the adapter's input when not ``deterministic`` (needs the rng ``dropout``).
      numerics: dtypes.
    """

    features: int
    target: TargetSpec | None = None
    use_bias: bool = False
    dora: bool = False
    dropout: float = 0.0
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
        adapted: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns ``(y, residual)``: the layer's output ``[..., d_out]``, and the adapter's part of it.

        The residual is None without an adapter, and where `probe` can make it again at no cost: with one adapter
        without DoRA or dropout.

        Args:
          x: ``[..., d_in]``.
          scale: the layer's ``s``.
          mask: ``[d_out]`` for the gated gradient of A (gates only).
          deterministic: no dropout.
          adapter_ids: ``[batch]``, with a stack of adapters in the ``lora`` collection.
          adapted: False for the frozen layer alone.
        """
        kernel = self._kernel(x.shape[-1])
        bias = self._bias()
        adapter = self._adapter(x.shape[-1])
        if adapter is None or not adapted:
            return _biased(matmul(x, kernel, self.numerics), bias), None
        a, b = adapter
        drops = self.dropout > 0 and not deterministic
        plain = a.ndim == 2 and not (self.dora or drops)
        at_once = is_native(math.prod(x.shape[:-1]), self.numerics.operand) or worthwhile(x, kernel)
        if self.numerics.fused and plain and at_once and not self.is_initializing():
            return _biased(adapted_matmul(x, kernel, a, b, scale, mask, self.numerics), bias), None
        base = matmul(x, kernel, self.numerics)
        inner = nn.Dropout(self.dropout, deterministic=deterministic)(x) if self.dropout > 0 else x
        delta = self._residual(inner, a, b, scale, mask, adapter_ids)
        if self.dora:
            delta = self._dora(base, delta, kernel, a, b, scale)
        delta = delta.astype(base.dtype)
        # Handed out for a probe's few positions, it would be written whole instead of ending in the sum.
        return combine(_biased(base, bias), delta), None if plain else delta

    def probe(
        self,
        x: jax.Array,
        y: jax.Array,
        delta: jax.Array | Hidden | None,
        weights: jax.Array,
        stride: int,
        scale: jax.Array | float = 1.0,
        *,
        from_start: bool = True,
    ) -> Probe:
        """Base and adapter apart on one in ``stride`` positions, given what the call received and returned.

        An adapter that does not start at 0 (PiSSA) lies in ``params`` as it started, ``start_a`` and ``start_b``: what
        counts as its part is how far it has moved from there, and the start belongs to the base.

        Args:
          x: ``[batch, seq, d_in]``.
          y: ``[batch, seq, d_out]``.
          delta: of the same call; None where it is to be made again here for those positions, `Hidden` where of that.
          weights: ``[batch, seq]``, which tokens are real.
          stride: 1 or more, see `nalora_jax.selection.sampled`.
          scale: the layer's ``s``.
          from_start: False for the whole residual, wherever it started.
        """
        x, y, factors = *lax.stop_gradient((x, sampled(y, weights, stride))), None
        moves = from_start and self.starts_elsewhere()
        if isinstance(delta, jax.Array):
            delta = lax.stop_gradient(sampled(delta, weights, stride))
            if moves:
                hidden, b = self._moved(sampled(x, weights, stride), scale, whole=True)
                delta = moved_from(delta, dot(hidden, b, self.numerics.adapter).astype(y.dtype).reshape(y.shape))
        elif moves:
            factors = self._moved(sampled(x, weights, stride), scale)
            delta = dot(*factors, self.numerics.adapter).astype(y.dtype).reshape(y.shape)
        elif self.target is not None and self.has_variable("lora", "a"):
            a, b = lax.stop_gradient((self.get_variable("lora", "a"), self.get_variable("lora", "b")))
            # Sampled behind A, whose product with all of x the call has made: no further pass over x.
            if isinstance(delta, Hidden):
                hidden = lax.stop_gradient(delta.value)
            else:
                hidden = scale * dot(x.reshape(-1, x.shape[-1]), a, self.numerics.adapter)
            hidden = sampled(hidden.reshape(*x.shape[:-1], -1), weights, stride).reshape(-1, b.shape[0])
            factors = hidden, b
            delta = dot(hidden, b, self.numerics.adapter).astype(y.dtype).reshape(y.shape)
        else:
            delta = jnp.zeros_like(y)
        return Probe(y - delta, delta, factors)

    def starts_elsewhere(self) -> bool:
        """Whether the adapter started at something else than 0."""
        return self.has_variable("params", "start_a")

    def _moved(self, x: jax.Array, scale: jax.Array | float, *, whole: bool = False) -> tuple[jax.Array, jax.Array]:
        """Two factors whose product is how far the residual of x has moved, or with ``whole`` where it started.

        ``s x (A B - A0 B0) = s (x (A - A0)) B + s (x A0) (B - B0)``: exactly 0 before the first update.
        """
        a0, b0 = lax.stop_gradient((self.get_variable("params", "start_a"), self.get_variable("params", "start_b")))
        a, b = lax.stop_gradient((self.get_variable("lora", "a"), self.get_variable("lora", "b")))
        flat, operand = x.reshape(-1, x.shape[-1]), self.numerics.adapter
        start = scale * dot(flat, a0, operand)
        if whole:
            return start, b0
        return jnp.concatenate([scale * dot(flat, a - a0, operand), start], 1), jnp.concatenate([b, b - b0])

    def projection(
        self,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Projection | None:
        """What the call would compute but for a bias, given the same arguments; None if it is more than a projection.

        That is with DoRA, dropout or a stack of adapters, and while parameters are made.
        """
        if self.is_initializing():
            return None
        kernel = self._stored_kernel()
        if self.target is None or not self.has_variable("lora", "a"):
            return Projection(kernel)
        a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
        if a.ndim != 2 or self.dora or (self.dropout > 0 and not deterministic):
            return None
        return Projection(kernel, Adapter(a, b, scale, mask))

    def with_bias(self, y: jax.Array) -> jax.Array:
        """``y``, what `projection` stands for, and the frozen layer's bias."""
        return _biased(y, self.get_variable("params", "bias") if self.use_bias else None)

    def _residual(
        self,
        x: jax.Array,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array | float,
        mask: jax.Array | None,
        adapter_ids: jax.Array | None,
    ) -> jax.Array:
        if a.ndim == 2:
            return residual(x, a, b, scale, mask, operand=self.numerics.adapter)
        if adapter_ids is None:
            raise ValueError("a stack of adapters needs adapter_ids")
        return batched_residual(x, a, b, scale, adapter_ids, operand=self.numerics.adapter)

    def _bias(self) -> jax.Array | None:
        if not self.use_bias:
            return None
        bias: jax.Array = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return bias

    def _kernel(self, d_in: int) -> Kernel:
        if self.has_variable("params", "kernel"):
            stored = self._stored_kernel()
            if not isinstance(stored, jax.Array):  # `param` would compare the shape of what it is stored as
                return stored
        kernel: jax.Array = self.param("kernel", nn.initializers.lecun_normal(), (d_in, self.features))
        return kernel

    def _stored_kernel(self) -> Kernel:
        stored: Kernel = self.get_variable("params", "kernel")
        if self.has_variable(STACKS, "kernel"):
            assert isinstance(stored, jax.Array)
            return native.Slice(self.get_variable(STACKS, "kernel"), stored)
        return stored

    def _adapter(self, d_in: int) -> tuple[jax.Array, jax.Array] | None:
        if self.target is None or not (self.is_initializing() or self.has_variable("lora", "a")):
            return None
        rank = self.target.rank
        a = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), (d_in, rank)))
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, self.features), jnp.float32))
        return a.value, b.value

    def _dora(
        self,
        base: jax.Array,
        delta: jax.Array,
        kernel: Kernel,
        a: jax.Array,
        b: jax.Array,
        scale: jax.Array | float,
    ) -> jax.Array:
        """The residual that makes ``base + residual`` equal ``m (x W + s x A B) / |W + s A B|``."""
        frozen = lax.stop_gradient(expand(kernel))
        start = lambda: jnp.linalg.norm(frozen.astype(jnp.float32), axis=0)  # noqa: E731
        magnitude = self.variable("lora", "magnitude", start).value
        # The norm is a constant of the backward pass, as in the paper (section 4.3) and in PEFT.
        ratio = magnitude / lax.stop_gradient(column_norm(frozen, a, b, scale))
        ratio = jnp.where(jnp.asarray(scale) == 0, 1.0, ratio)  # rank 0: the magnitude neither acts nor trains
        ratio = jnp.broadcast_to(ratio, base.shape)
        return (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta


class Call(NamedTuple):
    """A layer, and what it is called with besides the input."""

    layer: LoRADense
    scale: jax.Array | float = 1.0
    mask: jax.Array | None = None


def side_by_side(
    x: jax.Array, calls: Sequence[Call], *, deterministic: bool = True, adapter_ids: jax.Array | None = None
) -> list[tuple[jax.Array, jax.Array | Hidden | None]]:
    """What the layers, all of the same numerics, return for x: by one product where that can be."""
    numerics = calls[0].layer.numerics
    if numerics.fused and is_native(math.prod(x.shape[:-1]), numerics.operand):
        projections = [call.layer.projection(call.scale, call.mask, deterministic=deterministic) for call in calls]
        plain = [projection for projection in projections if projection is not None]
        if len(plain) == len(calls):
            made = project(x, plain, numerics)
            return [
                (call.layer.with_bias(y), None if hidden is None else Hidden(hidden))
                for call, (y, hidden) in zip(calls, made, strict=True)
            ]
    return [layer(x, scale, mask, deterministic=deterministic, adapter_ids=adapter_ids) for layer, scale, mask in calls]


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
