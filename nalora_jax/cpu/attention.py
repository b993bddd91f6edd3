"""Attention in bf16 by native kernels (`nalora_jax.cpu.native`), of tokens over themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.cpu import native
from nalora_jax.cpu.storage import usable
from nalora_jax.ops import attention as ops
from nalora_jax.ops.attention import AttentionConfig, Keys, drops, with_sinks
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import read_residual, rounded, save_residual


@ops.attention.implements("cpu")
def attention(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Computes attention without dropout and without cached keys."""
    empty = keys.cached is None or keys.cached.positions.shape[1] == 0
    if not empty or drops(config, dropout_rng) or keys.starts is not None or not _is_native(numerics):
        return NotImplemented
    return _attention(q, *keys[:2], (*keys[2:4], window), keys.sinks, config, numerics)


@ops.full_attention.implements("cpu")
def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    numerics: Numerics,
    *,
    scale: float,
    mask: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Computes attention of a row over itself, without a mask.

    Without ``causal`` it is computed as causal attention whose tokens all have the same position.
    """
    if mask is not None or q.shape != k.shape or not _is_native(numerics):
        return NotImplemented
    seq = q.shape[1]
    positions = np.zeros(seq, np.int32)
    if causal:
        positions = np.arange(seq, dtype=np.int32)
    places = jnp.asarray(positions[None]), jnp.ones((1, seq), jnp.int32), seq
    return _attention(q, k, v, places, None, AttentionConfig(scale), numerics, causal).astype(jnp.float32)


def _is_native(numerics: Numerics) -> bool:
    return numerics.operand == numerics.residual == "bfloat16" and usable(numerics)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: tuple[Any, ...],  # positions, segments, window
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    ordered: bool = True,
) -> jax.Array:
    return _fwd(q, k, v, places, sinks, config, numerics, ordered)[0]


def _fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: tuple[Any, ...],
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    ordered: bool,
) -> tuple[jax.Array, Any]:
    save = partial(save_residual, dtype="bfloat16", numerics=numerics)
    arrays = [save(x) for x in (q * config.scale, k, v)]
    out, logsumexp = native.attention(_heads(arrays, places, ordered), config.softcap)
    if sinks is not None:
        # [batch, heads, seq] as out is: [batch, seq, heads, 1]
        out, summed = with_sinks(out, logsumexp.swapaxes(1, 2)[..., None], sinks[None, None, :, None])
        logsumexp = summed[..., 0].swapaxes(1, 2)
    saved, total = save(out), save_residual(logsumexp, "float32", numerics)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    needed = saved if native.needs_result(q.shape[1], config.softcap) else None
    return read_residual(saved, numerics.result), (arrays, places, needed, total, like)


def _bwd(
    config: AttentionConfig, numerics: Numerics, ordered: bool, residuals: Any, g: jax.Array
) -> tuple[Any, ...]:
    arrays, places, saved, logsumexp, like = residuals
    out = None if saved is None else read_residual(saved, "bfloat16")
    g = rounded(g, "bfloat16", numerics)
    heads = _heads(arrays, places, ordered)
    dq, dk, dv = native.attention_gradient(heads, out, logsumexp, g, config.softcap)
    grads = (rounded(x, y.dtype, numerics) for x, y in zip((dq * config.scale, dk, dv), like, strict=True))
    return *grads, None, None


def _heads(arrays: Any, places: tuple[Any, ...], ordered: bool) -> native.Heads:
    q, k, v = (read_residual(x, "bfloat16") for x in arrays)
    positions, segments, window = places
    return native.Heads(q, k, v, positions, segments, window, ordered)


_attention.defvjp(_fwd, _bwd)
