"""Attention in bf16 by native kernels (`nalora_jax.cpu.native`), of tokens over themselves."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nalora_jax.cpu.native.library import call
from nalora_jax.ops import attention as ops
from nalora_jax.ops.attention import QKV, AttentionConfig, Keys, apply_sinks
from nalora_jax.ops.dispatch import Numerics, native_kind
from nalora_jax.ops.storage import (
    bf16_bits,
    bf16_from_bits,
    read_residual,
    round_to,
    save_residual,
)

# Queries whose weights the gradient of attention stores at once, kQueries in the sources.
_AT_ONCE = 256


@ops.self_attention.implements("cpu")
def self_attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `self_attention` of bf16 operands."""
    if not _is_native(numerics):
        return NotImplemented
    heads = (q, keys.k, keys.v)
    places = (keys.positions, keys.segments, window)
    return _attention(heads, places, keys.sinks, config, numerics)


@ops.full_attention.implements("cpu")
def full_attention(
    q: Array,
    k: Array,
    v: Array,
    numerics: Numerics,
    *,
    scale: float,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """Computes attention of a row over itself; all its tokens have one position unless it is
    ``causal``."""
    if mask is not None or q.shape != k.shape or not _is_native(numerics):
        return NotImplemented
    seq = q.shape[1]
    positions = np.zeros(seq, np.int32)
    if causal:
        positions = np.arange(seq, dtype=np.int32)
    segments = jnp.ones((1, seq), jnp.int32)
    places = (jnp.asarray(positions[None]), segments, seq)
    config = AttentionConfig(scale)
    out = _attention((q, k, v), places, None, config, numerics, causal)
    return out.astype(jnp.float32)


def _is_native(numerics: Numerics) -> bool:
    """Returns True if native kernels compute attention: they save bf16 arrays."""
    return numerics.residual == "bfloat16" and bool(native_kind(numerics))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attention(
    heads: QKV,
    places: tuple[Any, ...],  # positions, segments, window
    sinks: Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    ordered: bool = True,
) -> Array:
    """Computes attention natively, ``[batch, seq, heads, head_dim]``; without ``ordered`` any key
    may be seen."""
    return _fwd(heads, places, sinks, config, numerics, ordered)[0]


def _fwd(
    heads: QKV,
    places: tuple[Any, ...],
    sinks: Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    ordered: bool,
) -> tuple[Array, Any]:
    """Returns the result ``[batch, seq, heads, head_dim]`` and the residuals of `_bwd`."""
    q, k, v = heads
    save = partial(save_residual, dtype="bfloat16", numerics=numerics)
    arrays = [save(x) for x in (q * config.scale, k, v)]
    out, logsumexp = native_attention(_heads(arrays, places, ordered), config.softcap)
    if sinks is not None:
        # [batch, heads, seq] in the layout of out: [batch, seq, heads, 1]
        total = logsumexp.swapaxes(1, 2)[..., None]
        out, total = apply_sinks(out, total, sinks[None, None, :, None])
        logsumexp = total[..., 0].swapaxes(1, 2)
    saved = save(out)
    saved_sums = save_residual(logsumexp, "float32", numerics)
    # Empty arrays carry the dtypes of the inputs: residuals have to be arrays.
    like = tuple(jnp.zeros((0,), x.dtype) for x in heads)
    needed = None
    if needs_result(q.shape[1], config.softcap):
        needed = saved
    result = read_residual(saved, numerics.result)
    return result, (arrays, places, needed, saved_sums, like)


def _bwd(
    config: AttentionConfig, numerics: Numerics, ordered: bool, residuals: Any, g: Array
) -> tuple[Any, ...]:
    """Returns the gradients of q, k and v, in the dtypes of the inputs; places and sinks have
    none."""
    arrays, places, saved, logsumexp, like = residuals
    out = None
    if saved is not None:
        out = read_residual(saved, "bfloat16")
    g = round_to(g, "bfloat16", numerics)
    heads = _heads(arrays, places, ordered)
    dq, dk, dv = native_gradient(heads, out, logsumexp, g, config.softcap)
    grads = zip((dq * config.scale, dk, dv), like, strict=True)
    return tuple(round_to(x, y.dtype, numerics) for x, y in grads), None, None


_attention.defvjp(_fwd, _bwd)


class Heads(NamedTuple):
    """Queries, keys, values, and integers that decide visibility (`nalora_jax.ops.attention`)."""

    q: Array  # [batch, seq, heads, head_dim], scaled, bf16
    k: Array  # [batch, seq, kv_heads, head_dim]
    v: Array  # the same
    positions: Array  # int [batch or 1, seq]
    segments: Array  # int [batch or 1, seq]
    window: Array | int  # scalar
    ordered: bool = True  # tokens of a segment are in order; False: any key may be seen

    def operands(self) -> tuple[Array, ...]:
        """Returns the operands of a library call."""
        chex.assert_rank(self[:3], 4)
        chex.assert_equal_shape([self.k, self.v])
        chex.assert_equal_shape_prefix([self.q, self.k], 2)
        heads = map(bf16_bits, self[:3])
        positions, segments, window = (jnp.asarray(x, jnp.int32) for x in self[3:6])
        positions, segments = jnp.broadcast_arrays(positions, segments)
        return (*heads, positions, segments, window)


def _heads(arrays: Any, places: tuple[Any, ...], ordered: bool) -> Heads:
    """Returns the arguments of the native kernels, from saved queries, keys and values."""
    q, k, v = (read_residual(x, "bfloat16") for x in arrays)
    positions, segments, window = places
    return Heads(q, k, v, positions, segments, window, ordered)


def native_attention(heads: Heads, softcap: float = 0.0) -> tuple[Array, Array]:
    """Returns the result, bf16 as q, and the log-sum-exps, float32 ``[batch, heads, seq]``."""
    batch, seq, n, _ = heads.q.shape
    shapes = [
        jax.ShapeDtypeStruct(heads.q.shape, jnp.uint16),
        jax.ShapeDtypeStruct((batch, n, seq), jnp.float32),
    ]
    attend = call("attention", shapes, cap=np.float32(softcap), ordered=heads.ordered)
    out, logsumexp = attend(*heads.operands())
    return bf16_from_bits(out), logsumexp


def needs_result(seq: int, softcap: float) -> bool:
    """Returns True if `native_gradient` needs the result of `native_attention`."""
    return seq > _AT_ONCE or softcap > 0


def native_gradient(
    heads: Heads, out: Array | None, logsumexp: Array, g: Array, softcap: float = 0.0
) -> list[Array]:
    """Returns float32 gradients of q, k and v for the cotangent g; out may be None unless
    `needs_result`."""
    chex.assert_equal_shape([heads.q, g])
    if out is None:
        assert not needs_result(heads.q.shape[1], softcap)
        out = jnp.zeros((*heads.q.shape[:3], 0), jnp.uint16)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in heads[:3]]
    cap = np.float32(softcap)
    gradient = call("attention_gradient", shapes, cap=cap, ordered=heads.ordered)
    return gradient(*heads.operands(), bf16_bits(out), logsumexp, bf16_bits(g))
