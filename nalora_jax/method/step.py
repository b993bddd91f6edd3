"""One optimizer step as a pure function.

Step t:

1. computes the factors of the mechanisms from their averages after step t - 1;
2. sums loss, gradients and statistics over the micro-batches of the global batch (on a mesh the
   statistics are summed by shard first, and over shards once);
3. divides the gradients by the number of target tokens, so that any split of the batch is the same step;
4. updates the adapters, with the factors before or after the preconditioner;
5. updates the averages with the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax import trees
from nalora_jax.method import statistics
from nalora_jax.method.state import (
    Factors,
    GateState,
    Mechanisms,
    channel_factors,
    init_gate_state,
    mask_collection,
    own_factors,
    update_gate_state,
)
from nalora_jax.ops.reductions import count, pinned

Batch = Mapping[str, Array]
BlockStats = dict[str, dict[str, Array]]  # by block, then by statistic


class TrainState(NamedTuple):
    """The pytree that a step maps to the next; base weights are not in it."""

    step: Array  # int32, optimizer steps done
    lora: Any  # the adapters, float32
    opt_state: Any  # the optimizer's state
    gate: GateState  # the mechanisms' memory
    # uint32 key data. A step's dropout key is this key folded with ``step``, so that a resumed run
    # continues exactly.
    key: Array


class Evaluated(NamedTuple):
    """The value of an objective on one micro-batch."""

    loss: Array  # summed
    gate_stats: Any  # the collection that the blocks wrote
    measured: Mapping[str, Array] = MappingProxyType({})  # sums of further log metrics by name


class Objective(Protocol):
    """A loss over one micro-batch; implementations are in `nalora_jax.train.objectives`."""

    def loss(self, variables: Mapping[str, Any], params: Any, batch: Batch, key: Array) -> Evaluated:
        """Returns the summed loss and the statistics.

        Args:
          variables: argument of the model's ``apply``, with the collections of the step.
          params: the frozen weights in ``variables``, in any storage form.
          batch: one micro-batch, arrays ``[rows, ...]``.
          key: of dropout.
        """

    def counts(self, batch: Batch) -> tuple[Array, Array]:
        """Returns float32 scalars: units read (tokens, rows), and units that the loss is a mean over."""


@dataclass(frozen=True)
class StepConfig:
    """The static settings of a step."""

    mechanisms: Mechanisms
    # Of adapters and masks within the step, if the state is sharded further.
    lora_sharding: Any = None
    mask_sharding: NamedSharding | None = None
    stats_sharding: NamedSharding | None = None  # the blocks' (`measurement.GateStatsConfig`)
    # Log metrics from a block's statistics, the mechanisms' own factors and their products.
    metrics: Callable[[BlockStats, BlockStats, Factors], Any] | None = None
    verify: Callable[[BlockStats], None] | None = None  # asserts with chex


Step = Callable[[Any, TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def init_state(
    lora: Any,
    optimizer: optax.GradientTransformation,
    gate_shapes: Mapping[str, tuple[int, ...]],
    mechanisms: Mechanisms,
    seed: int,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      lora: fresh adapters.
      optimizer: of the step.
      gate_shapes: shape of the channel statistics by path, e.g. ``{"layers/ffn": (30, 1536)}``.
      mechanisms: of the run.
      seed: of the dropout keys.
    """
    key, gate = jax.random.key_data(jax.random.key(seed)), init_gate_state(gate_shapes, mechanisms)
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), gate, key)


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs, config: StepConfig, objective: Objective
) -> Step:
    """Returns the pure step ``(params, state, batch) -> (state, metrics)``, which the caller jits.

    Args:
      optimizer: from `nalora_jax.method.optimizer.nalora`; takes ``gate_factors``.
      config: static settings.
      objective: the loss.

    Returns:
      A function of params (frozen, in any storage form), a `TrainState` and a batch of arrays
      ``[micro_batches, rows, ...]``. Metrics are ``loss`` (mean per target token), ``grad_norm``,
      ``tokens`` (real), ``target_tokens``, ``measured`` (the objective's metrics, also means),
      ``layers`` (from ``config.metrics``), and ``idle``: by mechanism, True if it should have acted
      for 10 steps and has no measured token.
    """
    mechanisms, evaluate = config.mechanisms, micro_gradients(objective, config)

    def step(params: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        factors_of_rules = own_factors(state.gate, mechanisms)
        factors = channel_factors(state.gate, mechanisms, factors_of_rules)
        masks = None
        if "gradient_a" in factors:
            masks = mask_collection(factors["gradient_a"])
        channels = {path: f.shape for blocks in factors_of_rules.values() for path, f in blocks.items()}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        lora = state.lora
        if config.lora_sharding is not None:  # gathered once, not in every layer
            lora = lax.with_sharding_constraint(lora, config.lora_sharding)
            place = lambda mask: lax.with_sharding_constraint(mask, config.mask_sharding)  # noqa: E731
            masks = jax.tree.map(place, masks)
        sums = accumulate(lambda b, k: evaluate(params, lora, channels, masks, b, k), batch, key)
        if config.verify is not None:
            config.verify(sums["stats"])
        targets = jnp.maximum(sums["target_tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / targets, sums["grads"])
        stats = {path: statistics.per_target(s, targets) for path, s in sums["stats"].items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora, gate_factors=factors)
        reduced = over_shards(stats, mechanisms.statistics, config.stats_sharding)
        gate = update_gate_state(state.gate, reduced, mechanisms)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {
            "loss": sums["loss"] / targets,
            "measured": {name: value / targets for name, value in sums["measured"].items()},
            "grad_norm": optax.tree.norm(grads),
            "tokens": sums["tokens"],
            "target_tokens": sums["target_tokens"],
            "layers": {} if config.metrics is None else config.metrics(stats, factors_of_rules, factors),
            "idle": idle(gate, mechanisms),
        }
        return TrainState(state.step + 1, lora, opt_state, gate, state.key), metrics

    return step


def micro_gradients(objective: Objective, config: StepConfig) -> Callable[..., dict[str, Any]]:
    """Returns the function that sums loss, grads, statistics and counts of one micro-batch."""
    names, sharding = statistics.cotangent(config.mechanisms.statistics), config.stats_sharding

    def loss_sum(
        lora: Any, taps: Any, params: Any, masks: Any, batch: Batch, key: Array
    ) -> tuple[Array, tuple[BlockStats, dict[str, Array]]]:
        frozen = params if "params" in params else {"params": params}
        variables = {**frozen, "lora": lora}
        if masks:
            variables["gate_mask"] = masks
        if taps:
            variables["gate_taps"] = taps
        value = objective.loss(variables, frozen["params"], batch, key)
        return value.loss, (_by_block(value.gate_stats), dict(value.measured))

    def sums(params: Any, lora: Any, channels: Any, masks: Any, batch: Batch, key: Array) -> dict[str, Any]:
        taps = _taps(names, channels, sharding) if names else {}
        argnums = (0, 1) if names else 0
        differentiate = jax.value_and_grad(loss_sum, argnums=argnums, has_aux=True)
        (loss, aux), grads = differentiate(lora, _nested(taps), params, masks, batch, key)
        stats, measured = aux
        if names:
            grads, cotangents = grads
            for path, block in _by_block(cotangents).items():
                stats[path] = stats[path] | block
        stats = pinned(stats, sharding, axis=1)
        tokens, targets = objective.counts(batch)
        counts = {"tokens": tokens, "target_tokens": targets}
        return {"loss": loss, "grads": grads, "stats": stats, "measured": measured} | counts

    return sums


def _taps(
    names: tuple[str, ...], channels: Mapping[str, tuple[int, ...]], sharding: NamedSharding | None
) -> BlockStats:
    """Returns zeros by block whose gradients are the cotangent statistics ``names``, by shard."""
    shards = count(sharding)
    shapes = dict(channels)
    if shards > 1:
        shapes = {path: (shape[0], shards, *shape[1:]) for path, shape in channels.items()}
    zeros = {path: statistics.taps(names, shape) for path, shape in shapes.items()}
    sharded: BlockStats = pinned(zeros, sharding, axis=1)
    return sharded


def over_shards(stats: BlockStats, names: tuple[str, ...], sharding: NamedSharding | None) -> BlockStats:
    """Returns sums by block over the global batch: the only reduction of statistics in a step."""
    if count(sharding) == 1:
        return stats
    with jax.named_scope("statistics"):
        return {path: statistics.over_shards(block, names) for path, block in stats.items()}


def accumulate(sums: Callable[[Batch, Array], dict[str, Any]], batch: Batch, key: Array) -> dict[str, Any]:
    """Returns ``sums`` added up over the leading axis of the batch; traced once."""
    micro_batches = next(iter(batch.values())).shape[0]
    first = {name: value[0] for name, value in batch.items()}
    if micro_batches == 1:
        return sums(first, jax.random.fold_in(key, 0))

    def body(total: dict[str, Any], item: tuple[Batch, Array]) -> tuple[dict[str, Any], None]:
        micro, index = item
        addend = sums(micro, jax.random.fold_in(key, index))
        return trees.map_named(statistics.merged, total, addend), None

    # Zeros are neutral for sums and for maxima of non-negative numbers.
    shapes = jax.eval_shape(sums, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(body, zeros, (dict(batch), jnp.arange(micro_batches)))[0]


def _by_block(collection: Any) -> BlockStats:
    """Returns ``{"layers/ffn": {"slope": ...}}`` of ``{"layers": {"ffn": {"slope": ...}}}``."""
    blocks: BlockStats = {}
    for path, value in trees.flatten(collection).items():
        block, _, name = path.rpartition("/")
        blocks.setdefault(block, {})[name] = value
    return blocks


def _nested(blocks: BlockStats) -> Any:
    """Returns the inverse of `_by_block`."""
    leaves = ((f"{path}/{name}", x) for path, block in blocks.items() for name, x in block.items())
    return trees.unflatten({path.removeprefix("/"): x for path, x in leaves})


def idle(state: GateState, mechanisms: Mechanisms, patience: int = 10) -> dict[str, Array]:
    """Returns True by label for a mechanism without a token ``patience`` steps after its warm-up."""
    measured = [jnp.max(updates) > 0 for updates in state.updates.values()]
    none = ~jnp.any(jnp.stack(measured)) if measured else jnp.asarray(True)
    return {label: none & (state.count >= m.warmup + patience) for label, m in mechanisms.entries}
