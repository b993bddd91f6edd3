"""Norms and rotary position embeddings, computed in float32 for any model dtype.

RoPE follows the half-split convention of the Hugging Face files: dimension i is rotated with
dimension i + dim / 2. Sources: RoPE, arXiv 2104.09864; position interpolation, 2306.15595; YaRN,
2309.00071; LongRoPE, 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.residual_norm import residual_norm, rms_norm

if TYPE_CHECKING:
    from nalora_jax.models.config import ModelConfig

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis.

    Attributes:
      eps: added to the mean square.
      offset: added to the stored scale; 1 for Gemma, whose files store w of ``1 + w``.
      dtype: dtype of the result.
    """

    eps: float
    offset: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the norm of ``x``, ``[..., d]``."""
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        return rms_norm(x, scale.astype(jnp.float32) + self.offset, self.eps).astype(self.dtype)


class ResidualNorm(nn.Module):
    """Residual addition followed by a frozen root-mean-square norm (`residual_norm`).

    Attributes:
      eps: added to the mean square.
      offset: added to the stored scale, as for `RMSNorm`.
      numerics: dtypes.
      recomputed: the summands follow from saved arrays without a matmul.
    """

    eps: float
    offset: float
    numerics: Numerics
    recomputed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns ``x + y`` (``x`` if y is None) and its norm, both ``[..., d]``."""
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        added: tuple[jax.Array, jax.Array] = residual_norm(
            x, y, scale.astype(jnp.float32) + self.offset, self.eps, self.numerics, self.recomputed
        )
        return added


# ---------------------------------------------------------------- rotary position embeddings


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding: its base and, by kind, its scaling to longer contexts."""

    dim: int  # rotated dimensions of a head, even; the rest pass through
    theta: float = 10_000.0  # base wavelength
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0  # linear, dynamic, yarn, llama3, proportional: the scaling factor
    max_positions: int = 0  # dynamic, yarn, longrope, llama3: the original context length
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: one divisor per frequency, up to max_positions
    long_factor: tuple[float, ...] = ()  # longrope: the same, for longer sequences
    pairs: int = 0  # proportional: the first pairs rotate, the others pass through

    @property
    def depends_on_length(self) -> bool:
        """True if the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """Returns radians per position of each rotated pair, float64 ``[dim / 2]``.

    They hold for sequences of at most ``max_positions``.
    """
    plain = spec.theta ** -(np.arange(0, spec.dim, 2) / spec.dim)
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3_frequencies(plain, spec)
    if spec.kind == "yarn":
        return _yarn_frequencies(plain, spec)
    if spec.kind == "longrope":
        return plain / np.asarray(spec.short_factor)
    if spec.kind == "proportional":
        return np.where(np.arange(len(plain)) < spec.pairs, plain / spec.factor, 0.0)
    return plain


def _llama3_frequencies(plain: np.ndarray, spec: RopeSpec) -> np.ndarray:
    """Scales long wavelengths, keeps short ones and interpolates between them."""
    turns = spec.max_positions * plain / (2 * math.pi)
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * plain / spec.factor + smooth * plain


def _yarn_frequencies(plain: np.ndarray, spec: RopeSpec) -> np.ndarray:
    """Keeps dimensions below the ramp and scales those above it."""

    def dimension(turns: float) -> float:
        return spec.dim * math.log(spec.max_positions / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = np.clip((np.arange(spec.dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return plain / spec.factor * ramp + plain * (1 - ramp)


def sequence_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns 1 + the largest position of each token's segment: int ``[batch, seq]``.

    Lengths are computed per segment instead of per batch, so that a packed or padded sequence is
    rotated like the same sequence alone. Segments are numbered from 1 within a row; 0 is padding.
    """
    chex.assert_equal_shape([positions, segment_ids])
    n = positions.shape[1] + 1

    def row(position: jax.Array, segment: jax.Array) -> jax.Array:
        return jax.ops.segment_max(position, segment, num_segments=n)[segment] + 1

    return jax.vmap(row)(positions, segment_ids)


def rope_table(spec: RopeSpec, positions: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """Returns cosines and sines of one rotary embedding.

    Args:
      spec: the embedding.
      positions: int ``[batch, seq]``.
      lengths: int ``[batch, seq]`` from `sequence_lengths`; needed if ``spec.depends_on_length``.

    Returns:
      float32 ``[2, batch, seq, dim / 2]``: cosines, sines.
    """
    frequency = jnp.asarray(inverse_frequencies(spec), jnp.float32)[None, None, :]
    if spec.depends_on_length:
        assert lengths is not None
        frequency = _frequencies_at_length(spec, frequency, lengths[..., None])
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * spec.attention_factor


def _frequencies_at_length(spec: RopeSpec, short: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns ``[batch, seq, dim / 2]`` for token-wise sequence lengths ``[batch, seq, 1]``."""
    exponent = (jnp.arange(0, spec.dim, 2, dtype=jnp.float32) / spec.dim)[None, None, :]
    if spec.kind == "longrope":
        long = 1.0 / (jnp.asarray(spec.long_factor, jnp.float32)[None, None, :] * spec.theta**exponent)
        return jnp.where(lengths > spec.max_positions, long, short)
    stretch = jnp.maximum(lengths.astype(jnp.float32) / spec.max_positions, 1.0)
    theta = spec.theta * (spec.factor * stretch - (spec.factor - 1.0)) ** (spec.dim / (spec.dim - 2))
    return jnp.where(lengths > spec.max_positions, theta**-exponent, short)


def identity_table(spec: RopeSpec, positions: jax.Array) -> jax.Array:
    """Returns the identity rotation for layers without RoPE: ``[2, batch, seq, dim / 2]``."""
    shape = (*positions.shape, spec.dim // 2)
    return jnp.stack([jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)])


def rope_tables(
    config: ModelConfig,
    positions: jax.Array,
    segments: jax.Array,
    lengths: jax.Array | None = None,
    parts: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> jax.Array:
    """Returns ``[tables, 2, batch or 1, seq, dim / 2]``: one table per rotary embedding.

    The identity is appended if a layer has no RoPE. The tables are of the ``parts`` of whole rows.
    """
    of_tokens = None
    if any(spec.depends_on_length for spec in config.ropes):
        of_tokens = parts(sequence_lengths(positions, segments)) if lengths is None else lengths[:, None]
    positions = parts(positions)
    tables = [rope_table(spec, positions, of_tokens) for spec in config.ropes]
    if len(config.ropes) in config.layer_ropes:
        tables.append(identity_table(config.ropes[0], positions))
    return jnp.stack(tables)


def halves_from_adjacent(x: jax.Array, table: jax.Array) -> jax.Array:
    """Reorders the rotated dimensions of heads whose pairs are adjacent to the order of `apply_rope`.

    Example, ``dim`` of 4: ``[0, 1, 2, 3, 4] -> [0, 2, 1, 3, 4]``.

    Args:
      x: ``[batch, seq, heads, head_dim]``.
      table: ``[2, batch, seq, dim / 2]``.
    """
    half = table.shape[-1]
    pairs = x[..., : 2 * half].reshape(*x.shape[:-1], half, 2).swapaxes(-1, -2)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * half), x[..., 2 * half :]], axis=-1)


def query_scales(positions: jax.Array, growth: float, length: int) -> jax.Array:
    """Returns factors of queries beyond the original context (Llama 4, Ministral 3).

    Args:
      positions: int ``[batch, seq]``.
      growth: the factor's increase per unit of the logarithm.
      length: the original context.

    Returns:
      float32 ``[batch, seq]``, ``1 + growth * log(1 + positions // length)``.
    """
    return 1.0 + growth * jnp.log1p((positions // length).astype(jnp.float32))


@jax.custom_vjp
def apply_rope(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the first ``dim`` dimensions of every head.

    Args:
      x: ``[batch, seq, heads, head_dim]``.
      table: ``[2, batch, seq, dim / 2]``; it receives no gradient.

    Returns:
      ``x`` rotated, in float32.
    """
    cos, sin = table[0][:, :, None, :], table[1][:, :, None, :]
    half = table.shape[-1]
    x = x.astype(jnp.float32)
    first, second, unrotated = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, unrotated], axis=-1)


def _apply_rope_fwd(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return apply_rope(x, table), (table, jnp.zeros((0,), x.dtype))


def _apply_rope_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    # The inverse rotation. Autodiff's sums of padded halves take four times as long on a CPU.
    table, like_x = saved
    back = jnp.stack([table[0], -table[1]])
    return apply_rope(g, back).astype(like_x.dtype), None


apply_rope.defvjp(_apply_rope_fwd, _apply_rope_bwd)
