"""Per-channel factors on the columns of a gate's adapter: where the mechanisms meet the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from nalora_jax import trees
from nalora_jax.errors import NaloraError

# Projections that compute a gate's pre-activation: of a gated and of a non-gated feed-forward block.
_GATE_NAMES = ("gate_proj", "in_proj")


def find_gates(lora: Any, *, leaf: str = "b") -> dict[str, str]:
    """The adapted gates of a LoRA tree, and the block whose statistics describe each.

    Example:
      >>> find_gates({"layers": {"ffn": {"gate_proj": {"a": a, "b": b}, "up_proj": {"a": a, "b": b}}}})
      {'layers/ffn/gate_proj': 'layers/ffn'}
    """
    parents = (path.removesuffix(f"/{leaf}") for path in trees.flatten(lora) if path.endswith(f"/{leaf}"))
    split = {parent: parent.rpartition("/") for parent in sorted(parents)}
    return {parent: block for parent, (block, _, name) in split.items() if name in _GATE_NAMES}


def require_gates(params: Any, gates: Mapping[str, str], leaf: str) -> None:
    """Refuse gates that the parameter tree does not hold: their mechanism would silently do nothing.

    Raises:
      NaloraError: names the missing leaf and lists those of its kind.
    """
    paths = trees.flatten(params)
    for gate in gates:
        if f"{gate}/{leaf}" not in paths:
            found = ", ".join(path for path in paths if path.endswith(f"/{leaf}")) or f"no leaf named {leaf!r}"
            raise NaloraError("gates", expected=f"a parameter {gate}/{leaf}", found=found)


def multiply_columns(
    updates: Any,
    factors: Mapping[str, Array] | None,
    gates: Mapping[str, str],
    *,
    argument: str,
    leaf: str = "b",
    magnitude: str = "magnitude",
) -> Any:
    """``updates`` with the columns of every gate's ``leaf``, and their magnitudes, multiplied by its block's factors.

    Args:
      updates: a tree whose leaf ``<gate>/<leaf>`` has shape [..., r, d_ff], and ``<gate>/<magnitude>``, where there is
        one (DoRA), [..., d_ff]: a column that rests keeps its length as well as its direction.
      factors: by block, [..., d_ff].
      gates: block of each gate, as `find_gates` returns it.
      argument: the name under which the caller got ``factors``, for the error.
      leaf: the name of B under a gate's path.
      magnitude: that of DoRA's magnitude.

    Raises:
      NaloraError: factors that are absent, or whose shape does not fit.
    """
    if not gates:
        return updates
    missing = sorted(set(gates.values()) - set(factors or ()))
    if factors is None or missing:
        found = "no such argument" if factors is None else f"only {sorted(factors)}"
        raise NaloraError(f"optimizer.update(..., {argument}=)", expected=f"factors of {missing}", found=found)
    columns = {f"{gate}/{leaf}": factors[block] for gate, block in gates.items()}
    lengths = {f"{gate}/{magnitude}": factors[block] for gate, block in gates.items()}

    def scale(path: str, update: Array) -> Array:
        if path not in columns and path not in lengths:
            return update
        factor = columns[path] if path in columns else lengths[path]
        expected = (*update.shape[:-2], update.shape[-1]) if path in columns else update.shape
        if factor.shape != expected:
            raise NaloraError(f"{argument} of {path}", expected=f"shape {expected}", found=factor.shape)
        factor = jnp.expand_dims(factor, -2) if path in columns else factor
        return update * factor.astype(update.dtype)

    return trees.map_named(scale, updates)


def scale_by_channel(
    gates: Mapping[str, str], place: str = "update_b", *, leaf: str = "b"
) -> optax.GradientTransformationExtraArgs:
    """Multiply the columns of every gate's B (and DoRA's magnitudes) by the factors given at each update.

    For the place "update_b" it belongs after the preconditioner and the weight decay: Adam undoes any factor that stays
    constant before it. For "gradient_b" it belongs before them.

    Args:
      gates: block of each gate, e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}`` (`find_gates`).
      place: which of the factors.
      leaf: name of B under a gate's path; its shape is [..., r, d_ff], that of a factor [..., d_ff].

    Returns:
      A stateless transform; ``update(..., gate_factors={"update_b": {"layers/ffn": factor}})``.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        require_gates(params, gates, leaf)
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        gate_factors: Mapping[str, Mapping[str, Array]] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra_args
        factors = None if gate_factors is None else gate_factors.get(place)
        return multiply_columns(updates, factors, gates, argument="gate_factors", leaf=leaf), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
