"""Rotary position embeddings: their specs in a ``config.json``, and their arithmetic in float32.

RoPE follows the half-split convention of the Hugging Face files: dimension i is rotated with
dimension i + dim / 2. Sources: RoPE, arXiv 2104.09864; position interpolation, 2306.15595; YaRN,
2309.00071; LongRoPE, 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import FIELDS, ORIGINAL

ROPE_KINDS = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
    "proportional",
)


@dataclass(frozen=True)
class RopeSpec:
    """One rotary embedding: its base and, by kind, its scaling to longer contexts."""

    dim: int  # rotated dimensions of a head, even; the rest pass through
    theta: float = 10_000.0  # base wavelength
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = (
        1.0  # linear, dynamic, yarn, llama3, proportional: the scaling factor
    )
    max_positions: int = (
        0  # dynamic, yarn, longrope, llama3: the original context length
    )
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    short_factor: tuple[
        float, ...
    ] = ()  # longrope: one divisor per frequency, up to max_positions
    long_factor: tuple[float, ...] = ()  # longrope: the same, for longer sequences
    pairs: int = 0  # proportional: the first pairs rotate, the others pass through
    # Of every rotated pair, the coordinate of a token that rotates it: 0 its time, 1 the row of an
    # image, 2 the column; (): its position. The coordinates of a text are its positions.
    axes: tuple[int, ...] = ()

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
    # turns of each pair within the original context: many for short wavelengths
    turns = spec.max_positions * plain / (2 * math.pi)
    smooth = (turns - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * plain / spec.factor + smooth * plain


def _yarn_frequencies(plain: np.ndarray, spec: RopeSpec) -> np.ndarray:
    """Keeps dimensions below the ramp and scales those above it."""

    def dimension(turns: float) -> float:
        """Returns the pair, as a real number, that makes ``turns`` turns in the original
        context."""
        return (
            spec.dim
            * math.log(spec.max_positions / (turns * 2 * math.pi))
            / (2 * math.log(spec.theta))
        )

    low = dimension(spec.beta_fast)
    high = dimension(spec.beta_slow)
    if spec.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, spec.dim - 1)
    # 0 below `low`, 1 above `high`; 0.001 avoids a division by 0, as in YaRN's code.
    ramp = np.clip((np.arange(spec.dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    return plain / spec.factor * ramp + plain * (1 - ramp)


def sequence_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns 1 + the largest position of each token's segment: int ``[batch, seq]``.

    Lengths are computed per segment instead of per batch, so that a packed or padded sequence is
    rotated like the same sequence alone. Segments are numbered from 1 within a row; 0 is padding.
    """
    chex.assert_equal_shape([positions, segment_ids])
    n = positions.shape[1] + 1  # segments of a row at most, with padding

    def row(position: jax.Array, segment: jax.Array) -> jax.Array:
        return jax.ops.segment_max(position, segment, num_segments=n)[segment] + 1

    return jax.vmap(row)(positions, segment_ids)


def rope_table(
    spec: RopeSpec,
    positions: jax.Array,
    lengths: jax.Array | None = None,
    coordinates: jax.Array | None = None,
) -> jax.Array:
    """Returns cosines and sines of one rotary embedding.

    Args:
      spec: the embedding.
      positions: int ``[batch, seq]``.
      lengths: int ``[batch, seq]`` from `sequence_lengths`; needed if ``spec.depends_on_length``.

      coordinates: int ``[3, batch, seq]`` for ``spec.axes``; by default the positions.

    Returns:
      float32 ``[2, batch, seq, dim / 2]``: cosines, sines.
    """
    # [1, 1, dim / 2], or [batch, seq, dim / 2] if it depends on the length
    frequency = jnp.asarray(inverse_frequencies(spec), jnp.float32)[None, None, :]
    if spec.depends_on_length:
        assert lengths is not None
        frequency = _frequencies_at_length(spec, frequency, lengths[..., None])
    places = positions[..., None]
    if spec.axes and coordinates is not None:
        # [3, batch, seq] -> [dim / 2, batch, seq] -> [batch, seq, dim / 2]
        places = jnp.moveaxis(coordinates[np.array(spec.axes)], 0, -1)
    angle = places.astype(jnp.float32) * frequency
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * spec.attention_factor


def _frequencies_at_length(
    spec: RopeSpec, short: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns ``[batch, seq, dim / 2]`` for token-wise sequence lengths ``[batch, seq, 1]``."""
    exponent = (jnp.arange(0, spec.dim, 2, dtype=jnp.float32) / spec.dim)[None, None, :]
    if spec.kind == "longrope":
        long = 1.0 / (
            jnp.asarray(spec.long_factor, jnp.float32)[None, None, :]
            * spec.theta**exponent
        )
        return jnp.where(lengths > spec.max_positions, long, short)
    stretch = jnp.maximum(lengths.astype(jnp.float32) / spec.max_positions, 1.0)
    theta = spec.theta * (spec.factor * stretch - (spec.factor - 1.0)) ** (
        spec.dim / (spec.dim - 2)
    )
    return jnp.where(lengths > spec.max_positions, theta**-exponent, short)


def rope_tables(
    ropes: Sequence[RopeSpec],
    layer_ropes: Sequence[int],
    positions: jax.Array,
    segments: jax.Array,
    lengths: jax.Array | None = None,
    parts: Callable[[jax.Array], jax.Array] = lambda rows: rows,
    coordinates: jax.Array | None = None,
) -> jax.Array:
    """Returns ``[tables, 2, batch or 1, seq, dim / 2]``: one table per rotary embedding.

    The identity is appended if a layer has no RoPE.

    Args:
      ropes: the distinct rotary embeddings.
      layer_ropes: the table of every layer; ``len(ropes)`` is the identity.
      positions, segments: int ``[batch, seq]``, of whole rows.
      lengths: int ``[batch]``, lengths of the rows' sequences; by default those of the segments.
      parts: selects from an array of whole rows the part that this device computes.
      coordinates: int ``[3, batch, seq]``, of rows with images (`image_coordinates`).
    """
    of_tokens = None  # int [batch, seq or 1], length of each token's sequence
    if any(spec.depends_on_length for spec in ropes):
        if lengths is None:
            of_tokens = parts(sequence_lengths(positions, segments))
        else:
            of_tokens = lengths[:, None]
    positions = parts(positions)
    if coordinates is not None:
        coordinates = jnp.stack([parts(axis) for axis in coordinates])
    tables = [rope_table(spec, positions, of_tokens, coordinates) for spec in ropes]
    if len(ropes) in layer_ropes:
        ones = jnp.ones(tables[0].shape[1:], jnp.float32)  # the identity
        tables.append(jnp.stack([ones, jnp.zeros_like(ones)]))
    return jnp.stack(tables)


def image_coordinates(
    places: jax.Array, positions: jax.Array, segments: jax.Array, grids: jax.Array
) -> jax.Array:
    """Returns the coordinates of tokens of texts with images: int ``[3, batch, seq]``.

    All tokens of an image have the time of its first token, and their row and column are counted
    from it. The next text starts after the largest of these coordinates (Qwen2-VL, arXiv
    2409.12191).

    Example, an image of 1 by 2 tokens after one token of text, and a token of text::

        time 0 1 1 3,  row 0 1 1 3,  column 0 1 2 3

    Args:
      places: bool ``[batch, seq]``, True for image tokens.
      positions: int ``[batch, seq]``, restarting with every segment.
      segments: int ``[batch, seq]``.
      grids: int ``[batch, images, 2]``, rows and columns of the tokens of each image, in order.
    """
    counts = grids[..., 0] * grids[..., 1]
    ends = jnp.cumsum(counts, axis=1)  # [batch, images]
    number = jnp.cumsum(places, axis=1) - 1  # of each image token in its row
    # [batch, seq]: the image that a token belongs to, and the token's number in it
    image = jnp.sum(number[:, :, None] >= ends[:, None, :], axis=-1)
    image = jnp.minimum(image, grids.shape[1] - 1)

    def of_image(values: jax.Array) -> jax.Array:
        """Returns the value ``[batch, images]`` of each token's image, ``[batch, seq]``."""
        return jnp.take_along_axis(values, image, axis=1)

    within = number - of_image(ends - counts)
    columns = jnp.maximum(of_image(grids[..., 1]), 1)
    row = within // columns
    column = within % columns
    # Positions that each image saves: its number of tokens less the longer side of its grid.
    saving = of_image(counts - jnp.max(grids, axis=-1))
    is_last = places & (within == of_image(counts) - 1)
    saved = jnp.cumsum(jnp.where(is_last, saving, 0), axis=1)
    before = jnp.where(is_last, saved - saving, saved)
    # of a segment alone: less what was saved before its first token
    lead = jnp.arange(places.shape[1])[None, :] - positions
    at_start = jnp.take_along_axis(jnp.pad(saved, ((0, 0), (1, 0))), lead, axis=1)
    time = positions - (before - at_start)
    time = jnp.where(places, time - within, time)
    zero = jnp.zeros_like(row)
    steps = jnp.stack([zero, row, column])
    return time[None] + jnp.where(places[None], steps, 0)


def halves_from_adjacent(x: jax.Array, table: jax.Array) -> jax.Array:
    """Reorders the rotated dimensions of heads whose pairs are adjacent to the order of
    `apply_rope`.

    Example, ``dim`` of 4: ``[0, 1, 2, 3, 4] -> [0, 2, 1, 3, 4]``.

    Args:
      x: ``[batch, seq, heads, head_dim]``.
      table: ``[2, batch, seq, dim / 2]``.
    """
    leading = x.shape[:-1]
    half = table.shape[-1]
    dim = 2 * half
    pairs = x[..., :dim].reshape(*leading, half, 2)
    halves = pairs.swapaxes(-1, -2)  # [batch, seq, heads, 2, half]
    rotated = halves.reshape(*leading, dim)
    return jnp.concatenate([rotated, x[..., dim:]], axis=-1)


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
    cos = table[0][:, :, None, :]
    sin = table[1][:, :, None, :]
    half = table.shape[-1]
    x = x.astype(jnp.float32)
    first = x[..., :half]
    second = x[..., half : 2 * half]
    unrotated = x[..., 2 * half :]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, unrotated], axis=-1
    )


def _apply_rope_fwd(
    x: jax.Array, table: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return apply_rope(x, table), (table, jnp.zeros((0,), x.dtype))


def _apply_rope_bwd(
    saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, None]:
    """Returns the gradient of x, in its dtype; the table receives none."""
    # The inverse rotation. Autodiff's sums of padded halves take four times as long on a CPU.
    table, like_x = saved
    back = jnp.stack([table[0], -table[1]])
    return apply_rope(g, back).astype(like_x.dtype), None


apply_rope.defvjp(_apply_rope_fwd, _apply_rope_bwd)


# ---------------------------------------------------------------- reading a config.json

# Forms of transformers 4 and 5:
#
#   4:  {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
#   5:  {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
#       {"rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}}  per kind of
#       layer

_LAYER_KINDS = ("full_attention", "sliding_attention")
_ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", ORIGINAL}
_KEYS = {kind: set(names) for kind, names in FIELDS.items()} | {
    "default": set(),
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "proportional": {"factor"},
}


@dataclass(frozen=True)
class RopeRules:
    """What a family's files may state on rotary embeddings."""

    kinds: tuple[str, ...] = ROPE_KINDS
    names: tuple[tuple[str, str], ...] = ()  # other names of kinds
    defaults: tuple[tuple[str, Any], ...] = ()  # of parameters that the file leaves out


def rope_fields(f: Fields) -> Fields:
    """Returns the rotary parameters of a file, in either form."""
    raw = f.mapping("rope_scaling") or f.mapping("rope_parameters")
    return Fields(raw, {}, f"{f.where}: rope_parameters")


def image_axes(
    f: Fields, pairs: int, default: Sequence[int], *, interleaved: bool
) -> tuple[int, ...]:
    """Returns `RopeSpec.axes` of a model of Qwen-VL's kind.

    Args:
      f: the fields of the text model, whose ``mrope_section`` has the number of pairs that rotate
        by time, by row and by column.
      pairs: rotated pairs of a head.
      default: sections of a file without any.
      interleaved: pairs of the three alternate; False: they follow each other.

    Raises:
      NaloraError: the sections are not three numbers that sum to ``pairs``.
    """
    stated = rope_fields(f)
    sections = stated.items("mrope_section", 3, int)
    if sections is None:
        sections = list(default)
    if sum(sections) != pairs or min(sections) < 0:
        expected = f"three numbers with the sum {pairs}"
        raise stated.error("mrope_section", expected, str(sections))
    if not interleaved:
        times, rows, columns = sections
        return (0,) * times + (1,) * rows + (2,) * columns
    axes = [0] * pairs
    for axis in (1, 2):
        for pair in range(axis, min(3 * sections[axis], pairs), 3):
            axes[pair] = axis
    return tuple(axes)


def read_ropes(
    f: Fields,
    head_dim: int,
    kinds: list[str] | None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    further: Collection[str] = (),
    rules: RopeRules = RopeRules(),
) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """Returns a model's distinct rotary embeddings and each layer's index into them.

    Args:
      f: the config's fields.
      head_dim: dimensions of a head.
      kinds: the kind of every layer, or None if all are the same.
      defaults: parameters by kind of layer, for a family whose kinds differ; scaling then applies
        to full attention only.
      further: names of other parameters, which the caller reads.
      rules: of the family.

    Returns:
      The specs, and indices into them (empty if there is one spec).
    """
    flat = rope_fields(f).raw
    nested = {
        kind: flat.get(kind) for kind in _LAYER_KINDS if flat.get(kind) is not None
    }
    if kinds is None and nested:
        actual = f"one per kind of layer ({', '.join(nested)})"
        raise f.error("rope_parameters", "one rotary embedding", actual)
    if kinds is None or (defaults is None and not nested):
        return (_spec(f, "rope_parameters", flat, head_dim, further, rules),), ()
    specs = []
    for kind in sorted(set(kinds)):
        full = kind == "full_attention"
        rope: Any = nested.get(kind, {})
        if full and not nested:
            rope = flat
        if not isinstance(rope, Mapping):
            raise f.error(f"rope_parameters: {kind}", "a JSON object", repr(rope)[:60])
        if full and f.get("rope_theta"):
            theta = {"rope_theta": f.get("rope_theta")}
        else:
            theta = {}
        stated = {name: value for name, value in rope.items() if value is not None}
        rope = {**(defaults or {}).get(kind, {}), **theta, **stated}
        specs.append(
            _spec(f, f"rope_parameters: {kind}", rope, head_dim, further, rules)
        )
    order = {kind: i for i, kind in enumerate(sorted(set(kinds)))}
    return tuple(specs), tuple(order[kind] for kind in kinds)


def switch_length(ropes: Sequence[RopeSpec]) -> int | None:
    """Returns the length beyond which LongRoPE switches its factors, or None without LongRoPE.

    Beyond it every token is rotated by other factors, so keys cached before are invalid. With
    dynamic scaling cached keys stay as they are while a text grows, as in transformers.
    """
    return min(
        (spec.max_positions for spec in ropes if spec.kind == "longrope"), default=None
    )


def sharing_length(ropes: Sequence[RopeSpec]) -> int | None:
    """Returns the length up to which a prefix's keys do not depend on later text; None: any."""
    return min(
        (spec.max_positions for spec in ropes if spec.depends_on_length), default=None
    )


def context_length(ropes: Sequence[RopeSpec], positions: int) -> int:
    """Returns the context of a model whose ``config.json`` has ``positions`` as its maximum.

    Dynamic scaling starts at ``positions`` and multiplies the context by its factor, as in vLLM.
    """
    return int(
        positions
        * max((spec.factor for spec in ropes if spec.kind == "dynamic"), default=1.0)
    )


def _spec(
    f: Fields,
    name: str,
    raw_rope: Mapping[str, Any],
    head_dim: int,
    further: Collection[str],
    rules: RopeRules,
) -> RopeSpec:
    """Returns the RoPE of one entry of ``config.json``, named ``name`` in messages.

    ``further`` are keys that the family reads itself. Fields that the scaling would not use are
    refused.
    """
    defaults = {"rope_theta": f.get("rope_theta") or 10_000.0, **dict(rules.defaults)}
    rope = Fields(raw_rope, defaults, f"{f.where}: {name}")
    kind = raw_rope.get("rope_type") or raw_rope.get("type") or "default"
    if isinstance(kind, str):
        kind = dict(rules.names).get(kind, kind)
    if not isinstance(kind, str) or kind not in rules.kinds:
        expected = f"one of {', '.join(rules.kinds)}"
        remedy = "this scaling is not implemented"
        raise rope.error("rope_type", expected, repr(kind), remedy)
    for key in sorted(raw_rope.keys() - _ALWAYS - _KEYS[kind] - set(further)):
        rope.refuse(key, f"rope_type {kind!r} has no such parameter here")
    partial = rope.number(
        "partial_rotary_factor", default=f.number("partial_rotary_factor", default=1.0)
    )
    allowed = kind == "proportional" or "partial_rotary_factor" in f.defaults
    if partial != 1.0 and not allowed:
        raise rope.error(
            "partial_rotary_factor", "1: this family rotates all dimensions", partial
        )
    dim = int(head_dim * partial)
    if kind == "proportional":
        dim = head_dim
    if dim % 2 or not 2 <= dim <= head_dim:
        expected = f"an even share of head_dim ({head_dim})"
        raise rope.error("partial_rotary_factor", expected, f"{dim} dimensions")
    theta = rope.number("rope_theta")
    if theta <= 1:
        raise rope.error("rope_theta", "a number above 1", theta)
    return RopeSpec(dim=dim, theta=theta, kind=kind, **_scaling(f, rope, kind, dim))


def _scaling(f: Fields, rope: Fields, kind: str, dim: int) -> dict[str, Any]:
    """Returns the fields of `RopeSpec` that a kind of scaling reads."""
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": rope.number("factor")}
    if kind == "proportional":
        share = rope.number("partial_rotary_factor", default=1.0, zero=True)
        if share > 1:
            raise rope.error("partial_rotary_factor", "a share from 0 to 1", share)
        return {
            "factor": rope.number("factor", default=1.0),
            "pairs": int(share * dim // 2),
        }
    if kind == "dynamic" and dim == 2:
        raise rope.error(
            "rope_type", "a head of more than 2 dimensions for 'dynamic'", dim
        )
    context = f.integer("max_position_embeddings", high=2**30)
    if kind == "dynamic":
        return {"factor": _stretch(rope), "max_positions": context}
    # A field outside the scaling's object wins, as in transformers.
    original = rope.integer(ORIGINAL, low=2, high=2**30, default=context)
    original = f.integer(ORIGINAL, low=2, high=2**30, default=original)
    if kind == "llama3":
        low = rope.number("low_freq_factor")
        high = rope.number("high_freq_factor")
        if high <= low:
            raise rope.error(
                "high_freq_factor", f"more than low_freq_factor ({low})", high
            )
        frequencies = {"low_freq_factor": low, "high_freq_factor": high}
        return {
            "factor": rope.number("factor"),
            "max_positions": original,
            **frequencies,
        }
    if kind == "longrope":
        factor = rope.number("factor", default=context / original)
        # The magnitude of arXiv 2402.13753; a file may state another.
        derived = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
        own: dict[str, Any] = {
            key: _factors(rope, key, dim // 2)
            for key in ("short_factor", "long_factor")
        }
    else:
        factor = _stretch(rope, context / original)
        scale, all_dim = (
            rope.number(key, default=0.0, zero=True)
            for key in ("mscale", "mscale_all_dim")
        )
        derived = yarn_magnitude(factor, 1.0)
        if scale and all_dim:
            derived = yarn_magnitude(factor, scale) / yarn_magnitude(factor, all_dim)
        own = {
            "beta_fast": rope.number("beta_fast", default=32.0),
            "beta_slow": rope.number("beta_slow", default=1.0),
            "truncate": rope.get("truncate") is None or rope.flag("truncate"),
        }
    attention_factor = rope.number("attention_factor", default=derived)
    return {
        "factor": factor,
        "max_positions": original,
        "attention_factor": attention_factor,
        **own,
    }


def _stretch(rope: Fields, default: float | None = None) -> float:
    """Returns the factor of the context, 1 or more."""
    factor = rope.number("factor", default=default)
    if factor < 1:
        raise rope.error("factor", "1 or more", factor)
    return factor


def yarn_magnitude(factor: float, scale: float) -> float:
    """Returns YaRN's magnitude of rotated queries and keys (arXiv 2309.00071)."""
    return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0


def _factors(rope: Fields, key: str, length: int) -> tuple[float, ...]:
    """Returns LongRoPE's ``length`` divisors of the frequencies under ``key``."""
    values = rope.items(key, length, (int, float)) or []
    if len(values) != length or not all(0 < value < 1e30 for value in values):
        raise rope.error(key, f"{length} numbers above 0", str(values)[:60])
    return tuple(float(value) for value in values)
