"""Per-channel factors on the columns of a gate's B: where both mechanisms meet the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
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
    updates: Any, factors: Mapping[str, Array] | None, gates: Mapping[str, str], *, argument: str, leaf: str
) -> Any:
    """``updates`` with the columns of every gate's ``leaf`` multiplied by its block's factors.

    Args:
      updates: a tree whose leaf ``<gate>/<leaf>`` has shape [..., r, d_ff].
      factors: by block, [..., d_ff].
      gates: block of each gate, as `find_gates` returns it.
      argument: the name under which the caller got ``factors``, for the error.

    Raises:
      NaloraError: factors that are absent, or whose shape does not fit.
    """
    if not gates:
        return updates
    missing = sorted(set(gates.values()) - set(factors or ()))
    if factors is None or missing:
        found = "no such argument" if factors is None else f"only {sorted(factors)}"
        raise NaloraError(f"optimizer.update(..., {argument}=)", expected=f"factors of {missing}", found=found)
    targets = {f"{gate}/{leaf}": factors[block] for gate, block in gates.items()}

    def scale(path: str, update: Array) -> Array:
        if path not in targets:
            return update
        factor, expected = targets[path], (*update.shape[:-2], update.shape[-1])
        if factor.shape != expected:
            raise NaloraError(f"{argument} of {path}", expected=f"shape {expected}", found=factor.shape)
        return update * jnp.expand_dims(factor, -2).astype(update.dtype)

    return trees.map_named(scale, updates)
