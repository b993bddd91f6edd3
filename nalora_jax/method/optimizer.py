"""The optax transformation: factors of the mechanisms around an inner optimizer.

    [factors on gradients] -> inner (clip, preconditioner, weight decay, learning rate) -> [on updates]

A factor on an update acts after the preconditioner, because Adam undoes a
constant factor before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from nalora_jax import trees
from nalora_jax.errors import NaloraError
from nalora_jax.method.state import Mechanisms

# Projections that compute a gate's pre-activation, in a gated and in a self-gated block.
_GATE_NAMES = ("gate_proj", "in_proj")


def nalora(
    inner: optax.GradientTransformation, gates: Mapping[str, str], mechanisms: Mechanisms
) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner`` with the mechanisms' factors on the gates' B.

    Args:
      inner: any optax optimizer.
      gates: block of each adapted gate (`find_gates`), ``{"layers/ffn/gate_proj": "layers/ffn"}``.
      mechanisms: of the run. A place without a mechanism adds no stage: without any mechanism the
        updates are bit-identical to those of ``inner``.

    Returns:
      A transform whose ``update`` takes ``gate_factors`` (`channel_factors`) and ignores
      other keyword arguments.

    Example:
      >>> optimizer = nalora(optax.adamw(1e-3), find_gates(lora), mechanisms)
      >>> state = optimizer.init(lora)
      >>> factors = channel_factors(gate_state, mechanisms)
      >>> updates, state = optimizer.update(grads, state, lora, gate_factors=factors)
    """
    before, after = (
        [scale_by_channel(gates, place) for place in mechanisms.places if place == acting]
        for acting in ("gradient_b", "update_b")
    )
    if before or after:
        inner = optax.chain(*before, inner, *after)
    return optax.with_extra_args_support(inner)


def find_gates(lora: Any, *, leaf: str = "b") -> dict[str, str]:
    """Returns the block of each adapted gate of a LoRA tree.

    Example:
      >>> adapter = {"a": a, "b": b}
      >>> find_gates({"layers": {"ffn": {"gate_proj": adapter, "up_proj": adapter}}})
      {'layers/ffn/gate_proj': 'layers/ffn'}
    """
    suffix = f"/{leaf}"
    paths = (path.removesuffix(suffix) for path in trees.flatten(lora) if path.endswith(suffix))
    split = {path: path.rpartition("/") for path in sorted(paths)}
    return {path: block for path, (block, _, name) in split.items() if name in _GATE_NAMES}


def require_gates(params: Any, gates: Mapping[str, str], leaf: str) -> None:
    """Raises a NaloraError for gates that the parameter tree does not have.

    Without the error their mechanism would have no effect. The message lists the leaves.
    """
    paths = trees.flatten(params)
    for gate in gates:
        if f"{gate}/{leaf}" not in paths:
            leaves = [path for path in paths if path.endswith(f"/{leaf}")]
            actual = ", ".join(leaves) or f"no leaf named {leaf!r}"
            raise NaloraError("gates", expected=f"a parameter {gate}/{leaf}", found=actual)


def multiply_columns(
    updates: Any,
    factors: Mapping[str, Array] | None,
    gates: Mapping[str, str],
    *,
    argument: str,
    leaf: str = "b",
    magnitude: str = "magnitude",
) -> Any:
    """Returns ``updates`` with the columns of every gate's B times its block's factors.

    DoRA's magnitudes are multiplied as well: a column with factor 0 keeps length and direction.

    Args:
      updates: a tree with leaves ``<gate>/<leaf>`` [..., r, d_ff] and, with DoRA,
        ``<gate>/<magnitude>`` [..., d_ff].
      factors: by block, [..., d_ff].
      gates: block of each gate, from `find_gates`.
      argument: the caller's name for ``factors``, for the error.
      leaf: the name of B under a gate's path.
      magnitude: the name of DoRA's magnitude.

    Raises:
      NaloraError: missing factors, or factors of another shape.
    """
    if not gates:
        return updates
    missing = sorted(set(gates.values()) - set(factors or ()))
    if factors is None or missing:
        actual = "no such argument" if factors is None else f"only {sorted(factors)}"
        field = f"optimizer.update(..., {argument}=)"
        raise NaloraError(field, expected=f"factors of {missing}", found=actual)
    columns = {f"{gate}/{leaf}": factors[block] for gate, block in gates.items()}
    lengths = {f"{gate}/{magnitude}": factors[block] for gate, block in gates.items()}

    def scale(path: str, update: Array) -> Array:
        if path in columns:
            factor, expected = columns[path], (*update.shape[:-2], update.shape[-1])
        elif path in lengths:
            factor, expected = lengths[path], update.shape
        else:
            return update
        if factor.shape != expected:
            raise NaloraError(f"{argument} of {path}", expected=f"shape {expected}", found=factor.shape)
        if path in columns:
            factor = jnp.expand_dims(factor, -2)
        return update * factor.astype(update.dtype)

    return trees.map_named(scale, updates)


def scale_by_channel(
    gates: Mapping[str, str], place: str = "update_b", *, leaf: str = "b"
) -> optax.GradientTransformationExtraArgs:
    """Returns a stateless transform that multiplies the columns of every gate's B by given factors.

    Args:
      gates: block of each gate, e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}`` (`find_gates`).
      place: "update_b", after preconditioner and weight decay, or "gradient_b", before them.
      leaf: name of B under a gate's path, of shape [..., r, d_ff]; a factor is [..., d_ff].

    Returns:
      A transform with ``update(..., gate_factors={"update_b": {"layers/ffn": factor}})``.
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
        factors = (gate_factors or {}).get(place)
        return multiply_columns(updates, factors, gates, argument="gate_factors", leaf=leaf), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
