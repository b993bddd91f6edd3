"""What training remembers about its gates: bias-corrected averages of the channel statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jax import Array

from nalora_jax import trees
from nalora_jax.config import MaskConfig, StepScaleConfig
from nalora_jax.errors import NaloraError


class GateState(NamedTuple):
    """Averages over optimizer steps, by the path of the block that wrote the statistics, e.g. "layers/ffn".

    Channel axes are [L, d_ff], of mixtures of experts [L, E, d_ff], of an unstacked block [d_ff].
    """

    # Mean |phi'(z)|: [..., d_ff] float32.
    importance: dict[str, Array]
    # Share of tokens per region: [..., 4, d_ff] float32.
    occupancy: dict[str, Array]
    # Updates with tokens of each layer or expert, which the bias correction needs: [...] int32.
    updates: dict[str, Array]
    # Optimizer steps seen: [] int32.
    count: Array  # type: ignore[assignment]  # a tuple has a method of this name, which nothing here calls


def gate_shapes(stats: Any) -> dict[str, tuple[int, ...]]:
    """Channel shape of each block in a ``gate_stats`` collection, of arrays or of ``jax.eval_shape``'s results."""
    flat = trees.flatten(stats)
    return {path.rpartition("/")[0]: leaf.shape for path, leaf in flat.items() if path.split("/")[-1] == "slope"}


def init_gate_state(shapes: Mapping[str, tuple[int, ...]]) -> GateState:
    """Averages before the first step.

    Args:
      shapes: channel shape of each block, e.g. ``{"layers/ffn": (L, d_ff)}``.
    """
    return GateState(
        importance={path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()},
        occupancy={path: jnp.zeros((*shape[:-1], 4, shape[-1]), jnp.float32) for path, shape in shapes.items()},
        updates={path: jnp.zeros(shape[:-1], jnp.int32) for path, shape in shapes.items()},
        count=jnp.zeros((), jnp.int32),
    )


def update_gate_state(state: GateState, stats: Any, mask_config: MaskConfig, step_config: StepScaleConfig) -> GateState:
    """The averages after one optimizer step.

    A layer or expert that saw no token keeps its averages, and its bias correction does not move.

    Args:
      stats: the step's ``gate_stats`` collection (nested, or by block), sums over all its micro-batches and hosts.

    Raises:
      NaloraError: the statistics of a block are missing.
    """
    flat = trees.flatten(stats)
    importance, occupancy, updates = {}, {}, {}
    for path in state.importance:
        tokens, slope, regions = (_leaf(flat, path, name) for name in ("tokens", "slope", "occupancy"))
        chex.assert_equal_shape([slope, state.importance[path]])
        updates[path] = state.updates[path] + (tokens > 0).astype(jnp.int32)
        importance[path] = _average(state.importance[path], slope, tokens, updates[path], mask_config.decay)
        occupancy[path] = _average(state.occupancy[path], regions, tokens, updates[path], step_config.decay)
    return GateState(importance, occupancy, updates, state.count + 1)


def _leaf(flat: Mapping[str, Array], path: str, name: str) -> Array:
    key = f"{path}/{name}".removeprefix("/")
    if key not in flat:
        raise NaloraError("gate_stats", expected=f"a leaf {key}", found=", ".join(sorted(flat)) or "nothing")
    return flat[key]


def _average(average: Array, total: Array, tokens: Array, updates: Array, decay: float) -> Array:
    """One step of the bias-corrected exponential average of ``total / tokens``; unchanged where tokens is 0.

    With n updates the corrected average moves by (1 - decay) / (1 - decay^n) of the difference: wholly at n = 1.
    """
    log_decay = math.log(decay) if decay > 0 else -math.inf
    rate = math.expm1(log_decay) / jnp.expm1(log_decay * jnp.maximum(updates, 1).astype(jnp.float32))
    rate, tokens = (x.reshape(x.shape + (1,) * (average.ndim - x.ndim)) for x in (rate, tokens))
    moved = average + rate * (total / jnp.where(tokens > 0, tokens, 1) - average)
    return jnp.where(tokens > 0, moved, average)
