"""What training remembers about its gates, and the factors that the mechanisms make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from nalora_jax import activations, statistics, trees
from nalora_jax.config import MaskConfig, StepScaleConfig
from nalora_jax.errors import NaloraError
from nalora_jax.optim import importance_mask
from nalora_jax.optim import step_scale as scaling
from nalora_jax.optim.mechanism import PLACES, Context, Mechanism, Memory, make

# By place (`nalora_jax.optim.mechanism.PLACES`), then by block: [..., d_ff] float32.
Factors = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class Mechanisms:
    """The mechanisms of a run, each under the label of its memory and its metrics.

    Example:
      >>> for label, _ in make_mechanisms(names=("delta:q=0.5",), activation="silu").entries:
      ...     print(label)
      mask
      step_scale
      delta
    """

    entries: tuple[tuple[str, Mechanism], ...]
    activation: str
    tolerance: float = 0.05  # |h - 1| at which the linear region starts
    total_steps: int = 0  # of the run; 0 where it is not known
    seed: int = 0  # of the run
    # Blocks whose gates have another activation: (path, its name).
    others: tuple[tuple[str, str], ...] = ()

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the blocks have to measure for them, each once, sorted."""
        return tuple(sorted({name for _, one in self.entries for name in one.statistics}))

    @property
    def places(self) -> tuple[str, ...]:
        """Where any of them acts."""
        return tuple(place for place in PLACES if any(place in one.places for _, one in self.entries))

    def context(self, count: Array, block: str) -> Context:
        """What the rules may depend on at a step."""
        partition = activations.partition(dict(self.others).get(block, self.activation), self.tolerance)
        return Context(count, self.total_steps, partition, block, self.seed)


def make_mechanisms(
    mask: MaskConfig | None = None,
    step_scale: StepScaleConfig | None = None,
    names: tuple[str, ...] = (),
    *,
    activation: str,
    total_steps: int = 0,
    seed: int = 0,
) -> Mechanisms:
    """The mechanisms that a run's settings ask for.

    Args:
      mask: the first of the method; None: as by default.
      step_scale: the second; None: as by default.
      names: further ones, as `nalora_jax.optim.mechanism.make` reads them.
      activation: the gates'.
      total_steps: of the run, for those that depend on how far it is.
      seed: of the run, for those that draw.

    Raises:
      NaloraError: a name or a setting is not known, or a place.
    """
    entries: dict[str, Mechanism | None] = {
        "mask": importance_mask.from_config(mask or MaskConfig()),
        "step_scale": scaling.from_config(step_scale or StepScaleConfig()),
    }
    for text in names:
        one = make(text)
        label, number = one.name, 2
        while label in entries:
            label, number = f"{one.name}_{number}", number + 1
        entries[label] = one
    chosen = tuple((label, one) for label, one in entries.items() if one is not None)
    for _, one in chosen:
        for name in one.statistics:
            statistics.get(name)
        unknown = sorted(set(one.places) - set(PLACES))
        if unknown:
            raise NaloraError(f"mechanism {one.name}", expected=f"places of {PLACES}", found=unknown)
    return Mechanisms(chosen, activation, total_steps=total_steps, seed=seed)


class GateState(NamedTuple):
    """What the mechanisms remember, by the path of the block that wrote the statistics, e.g. "layers/ffn".

    Channel axes are [L, d_ff], of mixtures of experts [L, E, d_ff], of an unstacked block [d_ff].
    """

    # Of each mechanism, by label and block: by default averages by statistic, float32 [..., d_ff], [..., parts, d_ff].
    memory: dict[str, dict[str, Memory]]
    # Steps with tokens of each layer or expert, which the bias correction needs: [...] int32.
    updates: dict[str, Array]
    # Optimizer steps seen: [] int32.
    count: Array  # type: ignore[assignment]  # a tuple has a method of this name, which nothing here calls


def gate_shapes(stats: Any) -> dict[str, tuple[int, ...]]:
    """Channel shape of each block in a ``gate_stats`` collection, of arrays or of ``jax.eval_shape``'s results."""
    flat = trees.flatten(stats)
    return {path.rpartition("/")[0]: leaf.shape for path, leaf in flat.items() if path.split("/")[-1] == "slope"}


def init_gate_state(shapes: Mapping[str, tuple[int, ...]], mechanisms: Mechanisms) -> GateState:
    """The memory before the first step.

    Args:
      shapes: channel shape of each block, e.g. ``{"layers/ffn": (L, d_ff)}``.
      mechanisms: those of the run.
    """
    return GateState(
        memory={label: {path: one.init(shape) for path, shape in shapes.items()} for label, one in mechanisms.entries},
        updates={path: jnp.zeros(shape[:-1], jnp.int32) for path, shape in shapes.items()},
        count=jnp.zeros((), jnp.int32),
    )


def update_gate_state(state: GateState, stats: Any, mechanisms: Mechanisms) -> GateState:
    """The memory after one optimizer step.

    A layer or expert that saw no token keeps its averages, and its bias correction does not move.

    Args:
      stats: the step's ``gate_stats`` collection (nested, or by block), sums over all its micro-batches and hosts, with
        those of the cotangents (`nalora_jax.statistics.per_target`).
      mechanisms: those that ``state`` was made for.

    Raises:
      NaloraError: the statistics of a block are missing.
    """
    flat = trees.flatten(stats)
    updates, memory = {}, {label: dict(blocks) for label, blocks in state.memory.items()}
    for path, seen in state.updates.items():
        updates[path] = seen + (_leaf(flat, path, "tokens") > 0).astype(jnp.int32)
        for label, one in mechanisms.entries:
            names = {*one.statistics, *(statistics.get(name).count for name in one.statistics)}
            sums = {name: _leaf(flat, path, name) for name in sorted(names)}
            memory[label][path] = one.advance(state.memory[label][path], sums, updates[path])
    return GateState(memory, updates, state.count + 1)


def _leaf(flat: Mapping[str, Array], path: str, name: str) -> Array:
    key = f"{path}/{name}".removeprefix("/")
    if key not in flat:
        raise NaloraError("gate_stats", expected=f"a leaf {key}", found=", ".join(sorted(flat)) or "nothing")
    return flat[key]


# ---------------------------------------------------------------- factors


def own_factors(state: GateState, mechanisms: Mechanisms) -> dict[str, dict[str, Array]]:
    """Each mechanism's own factors for the coming step, by label and block: [..., d_ff] float32, not normalised.

    All ones during a mechanism's warm-up, and for layers that saw no token yet.
    """
    found: dict[str, dict[str, Array]] = {}
    for label, one in mechanisms.entries:
        found[label] = {}
        for path, updates in state.updates.items():
            context = mechanisms.context(state.count, path)
            factor = one.permuted(one.factor(state.memory[label][path], context), context)
            active = (state.count >= one.warmup) & (updates > 0)
            found[label][path] = jnp.where(active[..., None], factor, 1).astype(jnp.float32)
    return found


def channel_factors(
    state: GateState, mechanisms: Mechanisms, own: Mapping[str, Mapping[str, Array]] | None = None
) -> Factors:
    """What the mechanisms do to each channel in the coming step, at every place where any of them acts.

    The factors of all that re-allocate are multiplied, and their product is normalised to a root mean square of 1 over
    each layer's channels (`equalised`); the factors of the others follow.

    Args:
      state: after the step before.
      mechanisms: those that ``state`` was made for.
      own: `own_factors` of both, if they are at hand.

    Returns:
      By place and block: [..., d_ff] float32.
    """
    own = own_factors(state, mechanisms) if own is None else own
    return {
        place: {path: _product(place, path, mechanisms, own) for path in state.updates} for place in mechanisms.places
    }


def _product(place: str, path: str, mechanisms: Mechanisms, own: Mapping[str, Mapping[str, Array]]) -> Array:
    acting = [(one, own[label][path]) for label, one in mechanisms.entries if place in one.places]
    product = jnp.ones_like(acting[0][1])
    for one, factor in acting:
        product = product * factor if one.reallocates else product
    product = equalised(product)
    for one, factor in acting:
        product = product if one.reallocates else product * factor
    return product


def equalised(factor: Array) -> Array:
    """``factor`` [..., d_ff] divided by its root mean square over each layer's channels.

    A masked update then is as long as the unmasked one, where channels move alike and apart from one another: the
    factor re-allocates, and is no hidden learning rate. A layer whose channels all have one factor, 0 included, gets
    ones: there is nothing to re-allocate.
    """
    low, high = (jnp.broadcast_to(f(factor, axis=-1, keepdims=True), factor.shape) for f in (jnp.min, jnp.max))
    size = jnp.sqrt(jnp.mean(jnp.square(factor), axis=-1, keepdims=True))
    return jnp.where(low == high, 1.0, factor / jnp.where(size > 0, size, 1.0))


def idle(state: GateState, mechanisms: Mechanisms, patience: int = 10) -> dict[str, Array]:
    """By label, whether a mechanism that should have acted for ``patience`` steps has no token to act on: [] bool."""
    measured = [jnp.max(updates) > 0 for updates in state.updates.values()]
    nothing = ~jnp.any(jnp.stack(measured)) if measured else jnp.asarray(True)
    return {label: nothing & (state.count >= one.warmup + patience) for label, one in mechanisms.entries}


def mask_collection(masks: Mapping[str, Array]) -> dict[str, Any]:
    """Factors of one place by block as the ``gate_mask`` collection of ``model.apply``.

    Example:
      >>> mask_collection({"layers/ffn": mask})
      {'layers': {'ffn': {'mask': mask}}}
    """
    return trees.unflatten({f"{path}/mask".removeprefix("/"): mask for path, mask in masks.items()})
