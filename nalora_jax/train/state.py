"""What training changes: adapters, optimizer, gate averages, and the counters that make a step repeatable."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nalora_jax import trees
from nalora_jax.optim.nalora import GateState, Mechanisms, init_gate_state


class TrainState(NamedTuple):
    """One pytree that a step maps to the next; base weights are not in it.

    Attributes:
      step: int32, optimizer steps done.
      lora: the adapters, float32.
      opt_state: the optimizer's.
      gate: what the mechanisms remember of the gates (by default averages of importance and occupancy).
      key: uint32 key data; a step's dropout key is this one folded with ``step``, so that a resumed run continues
        exactly.
    """

    step: jax.Array
    lora: Any
    opt_state: Any
    gate: GateState
    key: jax.Array


def init_state(
    lora: Any,
    optimizer: optax.GradientTransformation,
    gate_shapes: dict[str, tuple[int, ...]],
    mechanisms: Mechanisms,
    seed: int,
) -> TrainState:
    """The state before the first step.

    Args:
      lora: fresh adapters.
      optimizer: the one that the step will use.
      gate_shapes: shape of the channel statistics by path, e.g. ``{"layers/ffn": (30, 1536)}``.
      mechanisms: those of the run.
      seed: of the dropout keys.
    """
    key = jax.random.key_data(jax.random.key(seed))
    start = jnp.zeros((), jnp.int32)
    return TrainState(start, lora, optimizer.init(lora), init_gate_state(gate_shapes, mechanisms), key)


def non_finite(state: Any) -> list[str]:
    """Returns the paths of the floating-point arrays with NaN or infinity, e.g. ``["opt_state/0/mu/..."]``.

    Reads the state once and fetches once; every process has to call it.
    """
    floats = {path: leaf for path, leaf in trees.flatten(state).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if not floats:
        return []
    found = jax.device_get(_all_finite(list(floats.values())))
    return [path for path, finite in zip(floats, found, strict=True) if not finite]


def first_bad_row(array: jax.Array) -> int:
    """Returns the first index of axis 0 with NaN or infinity: the layer, in an array of stacked layers."""
    return int(jax.device_get(_first_bad_row(jnp.atleast_1d(array))))


@jax.jit
def _first_bad_row(array: jax.Array) -> jax.Array:
    return jnp.argmin(jnp.isfinite(array).all(axis=tuple(range(1, array.ndim))))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    """bool [leaves]: whether every element of each is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
