"""Rotary embeddings of a ``config.json`` in the form of transformers 4 or transformers 5.

4:  {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
5:  {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    {"rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}}  per kind of layer
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import FIELDS, ORIGINAL
from nalora_jax.models.layers import ROPE_KINDS, RopeSpec

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
    flat = f.mapping("rope_scaling") or f.mapping("rope_parameters")
    nested = {kind: flat.get(kind) for kind in _LAYER_KINDS if flat.get(kind) is not None}
    if kinds is None and nested:
        raise f.error(
            "rope_parameters", "one rotary embedding", f"one per kind of layer ({', '.join(nested)})"
        )
    if kinds is None or (defaults is None and not nested):
        return (_spec(f, "rope_parameters", flat, head_dim, further, rules),), ()
    specs = []
    for kind in sorted(set(kinds)):
        rope: Any = flat
        if nested or kind != "full_attention":
            rope = nested.get(kind, {})
        if not isinstance(rope, Mapping):
            raise f.error(f"rope_parameters: {kind}", "a JSON object", repr(rope)[:60])
        theta: dict[str, Any] = {}
        if f.get("rope_theta") and kind == "full_attention":
            theta = {"rope_theta": f.get("rope_theta")}
        rope = {
            **(defaults or {}).get(kind, {}),
            **theta,
            **{k: v for k, v in rope.items() if v is not None},
        }
        specs.append(_spec(f, f"rope_parameters: {kind}", rope, head_dim, further, rules))
    order = {kind: i for i, kind in enumerate(sorted(set(kinds)))}
    return tuple(specs), tuple(order[kind] for kind in kinds)


def switch_length(ropes: Sequence[RopeSpec]) -> int | None:
    """Returns the length beyond which LongRoPE switches its factors, or None without LongRoPE.

    Beyond it every token is rotated by other factors, so keys cached before are invalid. With
    dynamic scaling cached keys stay as they are while a text grows, as in transformers.
    """
    return min((spec.max_positions for spec in ropes if spec.kind == "longrope"), default=None)


def sharing_length(ropes: Sequence[RopeSpec]) -> int | None:
    """Returns the length up to which a prefix's keys do not depend on later text; None: any."""
    return min((spec.max_positions for spec in ropes if spec.depends_on_length), default=None)


def context_length(ropes: Sequence[RopeSpec], positions: int) -> int:
    """Returns the context of a model whose ``config.json`` has ``positions`` as its maximum.

    Dynamic scaling starts at ``positions`` and multiplies the context by its factor, as in vLLM.
    """
    return int(positions * max((spec.factor for spec in ropes if spec.kind == "dynamic"), default=1.0))


def _spec(
    f: Fields,
    name: str,
    raw_rope: Mapping[str, Any],
    head_dim: int,
    further: Collection[str],
    rules: RopeRules,
) -> RopeSpec:
    defaults = {"rope_theta": f.get("rope_theta") or 10_000.0, **dict(rules.defaults)}
    rope = Fields(raw_rope, defaults, f"{f.where}: {name}")
    kind = raw_rope.get("rope_type") or raw_rope.get("type") or "default"
    if isinstance(kind, str):
        kind = dict(rules.names).get(kind, kind)
    if not isinstance(kind, str) or kind not in rules.kinds:
        raise rope.error(
            "rope_type", f"one of {', '.join(rules.kinds)}", repr(kind), "this scaling is not implemented"
        )
    for key in sorted(raw_rope.keys() - _ALWAYS - _KEYS[kind] - set(further)):
        rope.refuse(key, f"rope_type {kind!r} has no such parameter here")
    partial = rope.number("partial_rotary_factor", default=f.number("partial_rotary_factor", default=1.0))
    allowed = kind == "proportional" or "partial_rotary_factor" in f.defaults
    if partial != 1.0 and not allowed:
        raise rope.error("partial_rotary_factor", "1: this family rotates all dimensions", partial)
    dim = head_dim if kind == "proportional" else int(head_dim * partial)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise rope.error(
            "partial_rotary_factor", f"an even share of head_dim ({head_dim})", f"{dim} dimensions"
        )
    theta = rope.number("rope_theta")
    if theta <= 1:
        raise rope.error("rope_theta", "a number above 1", theta)
    return RopeSpec(dim=dim, theta=theta, kind=kind, **_SCALINGS[kind](f, rope, dim))


def _linear(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    return {"factor": rope.number("factor")}


def _dynamic(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    if dim == 2:
        raise rope.error("rope_type", "a head of more than 2 dimensions for 'dynamic'", dim)
    return {"factor": _stretch(rope), "max_positions": f.integer("max_position_embeddings", high=2**30)}


def _stretch(rope: Fields, default: float | None = None) -> float:
    factor = rope.number("factor", default=default)
    if factor < 1:
        raise rope.error("factor", "1 or more", factor)
    return factor


def _original(f: Fields, rope: Fields) -> int:
    """Returns the original context length.

    A field outside the scaling's object wins, as in transformers.
    """
    fallback = f.integer("max_position_embeddings", high=2**30)
    inner = rope.integer("original_max_position_embeddings", low=2, high=2**30, default=fallback)
    return f.integer("original_max_position_embeddings", low=2, high=2**30, default=inner)


def _llama3(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor ({low})", high)
    return {
        "factor": rope.number("factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "max_positions": _original(f, rope),
    }


def _yarn(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    original = _original(f, rope)
    factor = _stretch(rope, f.integer("max_position_embeddings", high=2**30) / original)
    scale, all_dim = (rope.number(key, default=0.0, zero=True) for key in ("mscale", "mscale_all_dim"))
    derived = _yarn_magnitude(factor, 1.0)
    if scale and all_dim:
        derived = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, all_dim)
    return {
        "factor": factor,
        "max_positions": original,
        "attention_factor": rope.number("attention_factor", default=derived),
        "beta_fast": rope.number("beta_fast", default=32.0),
        "beta_slow": rope.number("beta_slow", default=1.0),
        "truncate": rope.get("truncate") is None or rope.flag("truncate"),
    }


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0


def _longrope(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    original = _original(f, rope)
    factor = rope.number("factor", default=f.integer("max_position_embeddings", high=2**30) / original)
    derived = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    factors = {key: _factors(rope, key, dim // 2) for key in ("short_factor", "long_factor")}
    attention_factor = rope.number("attention_factor", default=derived)
    return {"factor": factor, "max_positions": original, "attention_factor": attention_factor, **factors}


def _proportional(f: Fields, rope: Fields, dim: int) -> dict[str, Any]:
    share = rope.number("partial_rotary_factor", default=1.0, zero=True)
    if share > 1:
        raise rope.error("partial_rotary_factor", "a share from 0 to 1", share)
    return {"factor": rope.number("factor", default=1.0), "pairs": int(share * dim // 2)}


def _factors(rope: Fields, key: str, length: int) -> tuple[float, ...]:
    values = rope.items(key, length, (int, float)) or []
    if len(values) != length or not all(0 < value < 1e30 for value in values):
        raise rope.error(key, f"{length} numbers above 0", str(values)[:60])
    return tuple(float(value) for value in values)


_SCALINGS = {
    "default": lambda f, rope, dim: {},
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
