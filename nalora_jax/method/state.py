"""The memory of the mechanisms, and the factors of a step.

A step reads the factors (`channel_factors`), which were computed from the averages after the step
before, and updates the averages once with its statistics (`update_gate_state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from nalora_jax import trees
from nalora_jax.errors import NaloraError
from nalora_jax.mechanism import PLACES, Context, Mechanism, Memory
from nalora_jax.method import activations, statistics

# By place (`nalora_jax.mechanism.PLACES`), then by block: [..., d_ff] float32.
Factors = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Mechanisms:
    """The mechanisms of a run, each with the label of its memory and its metrics."""

    entries: tuple[tuple[str, Mechanism], ...]
    activation: str
    tolerance: float = 0.05  # |h - 1| at which the linear region starts
    total_steps: int = 0  # of the run; 0 if unknown
    seed: int = 0  # of the run
    others: tuple[tuple[str, str], ...] = ()  # blocks with another activation: (path, its name)
    # Orders of the channels by (label, path), in place of the mechanisms' own permutations.
    orders: Mapping[tuple[str, str], Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for _, mechanism in self.entries:
            for name in mechanism.statistics:
                statistics.get(name)
            unknown = sorted(set(mechanism.places) - set(PLACES))
            if unknown:
                field = f"mechanism {mechanism.name}"
                raise NaloraError(field, expected=f"places of {PLACES}", found=unknown)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics that blocks measure for them, sorted."""
        return tuple(sorted({name for _, m in self.entries for name in m.statistics}))

    @property
    def places(self) -> tuple[str, ...]:
        """The places where at least one of them acts."""
        return tuple(place for place in PLACES if any(place in m.places for _, m in self.entries))

    def context(self, count: Array, block: str) -> Context:
        """Returns the arguments of the rules at a step."""
        name = dict(self.others).get(block, self.activation)
        partition = activations.partition(name, self.tolerance)
        return Context(count, self.total_steps, partition, block, self.seed)


class GateState(NamedTuple):
    """The memory of the mechanisms by path of the block that wrote the statistics ("layers/ffn").

    Channel axes are [L, d_ff], of mixtures of experts [L, E, d_ff], of an unstacked block [d_ff].
    """

    # By label and block: averages by statistic, float32 [..., d_ff] or [..., parts, d_ff].
    memory: dict[str, dict[str, Memory]]
    updates: dict[str, Array]  # [...] int32: steps with tokens of each layer or expert
    # Optimizer steps: [] int32.
    count: Array  # type: ignore[assignment]  # shadows tuple.count, which is unused here


def gate_shapes(stats: Any) -> dict[str, tuple[int, ...]]:
    """Returns the channel shape of each block in a ``gate_stats`` collection (or its shapes)."""
    slopes = {path: x for path, x in trees.flatten(stats).items() if path.split("/")[-1] == "slope"}
    return {path.rpartition("/")[0]: leaf.shape for path, leaf in slopes.items()}


def init_gate_state(shapes: Mapping[str, tuple[int, ...]], mechanisms: Mechanisms) -> GateState:
    """Returns the memory before the first step.

    Args:
      shapes: channel shape of each block, e.g. ``{"layers/ffn": (L, d_ff)}``.
      mechanisms: of the run.
    """
    return GateState(
        memory={
            label: {path: mechanism.init(shape) for path, shape in shapes.items()}
            for label, mechanism in mechanisms.entries
        },
        updates={path: jnp.zeros(shape[:-1], jnp.int32) for path, shape in shapes.items()},
        count=jnp.zeros((), jnp.int32),
    )


def update_gate_state(state: GateState, stats: Any, mechanisms: Mechanisms) -> GateState:
    """Returns the memory after one optimizer step.

    A layer or expert without a token keeps its averages and its number of updates.

    Args:
      state: before the step.
      stats: the step's ``gate_stats`` collection (nested or by block), summed over micro-batches and
        hosts, with the sums of cotangents (`nalora_jax.method.statistics.per_target`).
      mechanisms: of the run.

    Raises:
      NaloraError: a block's statistics are missing.
    """
    flat = trees.flatten(stats)
    updates, memory = {}, {label: dict(blocks) for label, blocks in state.memory.items()}
    for path, before in state.updates.items():
        updates[path] = before + (_leaf(flat, path, "tokens") > 0).astype(jnp.int32)
        for label, mechanism in mechanisms.entries:
            counts = (statistics.get(name).count for name in mechanism.statistics)
            names = sorted({*mechanism.statistics, *counts})
            sums = {name: _leaf(flat, path, name) for name in names}
            memory[label][path] = mechanism.advance(memory[label][path], sums, updates[path])
    return GateState(memory, updates, state.count + 1)


def _leaf(flat: Mapping[str, Array], path: str, name: str) -> Array:
    key = f"{path}/{name}".removeprefix("/")
    if key not in flat:
        paths = ", ".join(sorted(flat)) or "nothing"
        raise NaloraError("gate_stats", expected=f"a leaf {key}", found=paths)
    return flat[key]


# ---------------------------------------------------------------- factors


def own_factors(state: GateState, mechanisms: Mechanisms) -> dict[str, dict[str, Array]]:
    """Returns each mechanism's factors for the next step by label and block, not normalized.

    They are [..., d_ff] float32, and 1 during a warm-up and for layers without a token so far.
    """
    factors: dict[str, dict[str, Array]] = {}
    for label, mechanism in mechanisms.entries:
        factors[label] = {}
        for path, updates in state.updates.items():
            context = mechanisms.context(state.count, path)
            factor = mechanism.factor(state.memory[label][path], context)
            factor = mechanism.permuted(factor, context, mechanisms.orders.get((label, path)))
            active = (state.count >= mechanism.warmup) & (updates > 0)
            factors[label][path] = jnp.where(active[..., None], factor, 1).astype(jnp.float32)
    return factors


def channel_factors(
    state: GateState, mechanisms: Mechanisms, own: Mapping[str, Mapping[str, Array]] | None = None
) -> Factors:
    """Returns the factor of each channel in the next step by place and block, [..., d_ff] float32.

    Factors that reallocate are multiplied and normalized to a root mean square of 1 over each layer's
    channels (`equalized`); then the other factors are multiplied on.

    Args:
      state: after the step before.
      mechanisms: of the run.
      own: `own_factors` of both, if already computed.
    """
    if own is None:
        own = own_factors(state, mechanisms)
    return {
        place: {path: _product(place, path, mechanisms, own) for path in state.updates}
        for place in mechanisms.places
    }


def _product(
    place: str, path: str, mechanisms: Mechanisms, factors: Mapping[str, Mapping[str, Array]]
) -> Array:
    acting = [(m, factors[label][path]) for label, m in mechanisms.entries if place in m.places]
    product = jnp.ones_like(acting[0][1])
    for factor in (factor for mechanism, factor in acting if mechanism.reallocates):
        product = product * factor
    product = equalized(product)
    for factor in (factor for mechanism, factor in acting if not mechanism.reallocates):
        product = product * factor
    return product


def equalized(factor: Array) -> Array:
    """Returns ``factor`` [..., d_ff] over its root mean square in each layer.

    The norm of a layer's update stays about the same, so the factor is not a hidden learning rate. A
    layer whose channels all have one factor, 0 included, gets ones.
    """
    low, high = (
        jnp.broadcast_to(f(factor, axis=-1, keepdims=True), factor.shape) for f in (jnp.min, jnp.max)
    )
    size = jnp.sqrt(jnp.mean(jnp.square(factor), axis=-1, keepdims=True))
    return jnp.where(low == high, 1.0, factor / jnp.where(size > 0, size, 1.0))


def mask_collection(masks: Mapping[str, Array]) -> dict[str, Any]:
    """Returns the factors of one place as the ``gate_mask`` collection of ``model.apply``.

    Example:
      >>> mask_collection({"layers/ffn": mask})
      {'layers': {'ffn': {'mask': mask}}}
    """
    return trees.unflatten({f"{path}/mask".removeprefix("/"): m for path, m in masks.items()})
