"""One optimizer step as a pure function.

Step t:

1. computes the masks of the rules from their averages after step t - 1;
2. sums loss, gradients and statistics over the micro-batches of the global batch (on a mesh the
   statistics are summed by shard first, and over shards once);
3. divides the gradients by the number of target tokens, so that any split of the batch is the same
  step;
4. updates the adapters, and the averages with the statistics (`nalora_jax.method.transform`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from nalora_jax.common import trees
from nalora_jax.method import statistics
from nalora_jax.method.transform import (
    GateState,
    Mechanisms,
    RuleFactors,
    channel_factors,
    gate_state,
    own_factors,
)
from nalora_jax.method.tuned import LayerMasks, join_tuned, select_layers
from nalora_jax.ops.reductions import count, pin_to_shards
from nalora_jax.ops.shardings import UNSHARDED, RowSharding, Shardings

Batch = Mapping[str, Array]
BlockStats = dict[str, dict[str, Array]]  # by block, then by statistic


class TrainState(NamedTuple):
    """The pytree that a step maps to the next; base weights are not in it."""

    step: Array  # int32, optimizer steps done
    lora: Any  # the adapters, float32
    opt_state: Any  # the optimizer's state, with the averages of the gates
    # uint32 key data. A step's dropout key is this key folded with ``step``, so that a resumed run
    # continues exactly.
    key: Array

    @property
    def gate(self) -> GateState | None:
        """The averages of the gates; None without rules on gates."""
        return gate_state(self.opt_state)


class Evaluated(NamedTuple):
    """The value of an objective on one micro-batch (the taps' gradients are the statistics)."""

    loss: Array  # summed
    # sums of further log metrics by name
    measured: Mapping[str, Array] = MappingProxyType({})


class Objective(Protocol):
    """A loss over one micro-batch; implementations are in `nalora_jax.assembly.objectives`."""

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: Array
    ) -> Evaluated:
        """Returns the summed loss.

        Args:
          variables: argument of the model's ``apply``, with the collections of the step.
          params: the frozen weights in ``variables``, in any storage form.
          batch: one micro-batch, arrays ``[rows, ...]``.
          key: of dropout.
        """

    def counts(self, batch: Batch) -> tuple[Array, Array]:
        """Returns float32 scalars: units read (tokens, rows), and units that the loss is a mean
        over."""


@dataclass(frozen=True)
class StepConfig:
    """The static settings of a step."""

    mechanisms: Mechanisms
    # channel shape of each measured block, e.g. (L, d_ff)
    blocks: Mapping[str, tuple[int, ...]]
    shardings: Shardings = UNSHARDED
    # Log metrics from a block's statistics, the mechanisms' own factors and their products.
    metrics: Callable[[BlockStats, BlockStats, RuleFactors], Any] | None = None
    checks: tuple[str, ...] = ()  # names of the blocks' checks
    # Layers of trained weights, see `nalora_jax.method.tuned`.
    tuned_layers: LayerMasks = field(default_factory=dict)
    # Asserts with chex: batch, adapters, masks by block, sums of the step.
    verify: (
        Callable[[Batch, Any, Mapping[str, Array], Mapping[str, Any]], None] | None
    ) = None


Step = Callable[[Any, TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def init_state(
    lora: Any, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step.

    Args:
      lora: fresh adapters.
      optimizer: of the step.
      seed: of the dropout keys.
    """
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), key)


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs,
    config: StepConfig,
    objective: Objective,
) -> Step:
    """Returns the pure step ``(params, state, batch) -> (state, metrics)``, which the caller jits.

    Args:
      optimizer: from `nalora_jax.method.transform.nalora`; takes ``gate_stats``.
      config: static settings.
      objective: the loss.

    Returns:
      A function of params (frozen, in any storage form), a `TrainState` and a batch of arrays
      ``[micro_batches, rows, ...]``. Metrics are ``loss`` (mean per target token), ``grad_norm``,
      ``tokens`` (real), ``target_tokens``, ``measured`` (the objective's metrics, also means),
      ``layers`` (from ``config.metrics``), and ``idle``: by mechanism, True if it should have acted
      for 10 steps and has no measured token.
    """
    mechanisms = config.mechanisms
    evaluate = micro_gradients(objective, config)

    def step(
        params: Any, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after a step and the step's metrics, see `make_train_step`."""
        factors_of_rules = {}
        factors = {}
        if state.gate is not None:
            factors_of_rules = own_factors(state.gate, mechanisms)
            factors = channel_factors(state.gate, mechanisms, factors_of_rules)
        masks_of_blocks = factors.get("gradient_a", {})
        masks = _nested({path: {"mask": m} for path, m in masks_of_blocks.items()})
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        lora = state.lora
        shardings = config.shardings
        if shardings.adapters is not None:  # gathered once, not in every layer
            lora = lax.with_sharding_constraint(lora, shardings.adapters)
            masks = jax.tree.map(
                lambda mask: lax.with_sharding_constraint(mask, shardings.masks), masks
            )
        sums = accumulate(lambda b, k: evaluate(params, lora, masks, b, k), batch, key)
        if config.verify is not None:
            config.verify(batch, lora, masks_of_blocks, sums)
        targets = jnp.maximum(sums["target_tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / targets, sums["grads"])
        stats = {}
        for path, block in sums["stats"].items():
            stats[path] = statistics.scale_to_targets(block, targets)
        reduced = reduce_stats(stats, mechanisms.statistics, shardings.rows)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.lora, gate_stats=reduced
        )
        lora = optax.apply_updates(state.lora, updates)
        measured = {name: x / targets for name, x in sums["measured"].items()}
        layers = {}
        if config.metrics is not None:
            layers = config.metrics(stats, factors_of_rules, factors)
        metrics = {
            "loss": sums["loss"] / targets,
            "measured": measured,
            "grad_norm": optax.tree.norm(grads),
            "tokens": sums["tokens"],
            "target_tokens": sums["target_tokens"],
            "layers": layers,
            "idle": idle(gate_state(opt_state), mechanisms),
        }
        return TrainState(state.step + 1, lora, opt_state, state.key), metrics

    return step


def micro_gradients(
    objective: Objective, config: StepConfig
) -> Callable[..., dict[str, Any]]:
    """Returns the function that sums loss, grads, statistics and counts of one micro-batch."""

    def loss_sum(
        lora: Any, taps: Any, params: Any, masks: Any, batch: Batch, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of one micro-batch, whose gradients by the adapters and taps are taken,
        and the objective's metrics."""
        frozen = params  # collections; or the collection ``params`` alone
        if "params" not in params:
            frozen = {"params": params}
        trained = select_layers(lora, config.tuned_layers)
        weights, adapters = join_tuned(
            frozen["params"], trained, config.shardings.adapters
        )
        frozen = {**frozen, "params": weights}
        variables = {**frozen, "lora": adapters, "gate_taps": taps}
        if masks:
            variables["gate_mask"] = masks
        value = objective.loss(variables, frozen["params"], batch, key)
        return value.loss, dict(value.measured)

    def sums(
        params: Any, lora: Any, masks: Any, batch: Batch, key: Array
    ) -> dict[str, Any]:
        """Returns the sums of one micro-batch by name."""
        differentiate = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)
        (loss, measured), (grads, of_taps) = differentiate(
            lora, _taps(config), params, masks, batch, key
        )
        stats = pin_to_shards(_by_block(of_taps), config.shardings.rows, axis=1)
        tokens, targets = objective.counts(batch)
        return {
            "loss": loss,
            "grads": grads,
            "stats": stats,
            "measured": measured,
            "tokens": tokens,
            "target_tokens": targets,
        }

    return sums


def _taps(config: StepConfig) -> Any:
    """Returns zeros, nested by block, whose gradients are the statistics and checks, by shard."""
    names = (*statistics.STANDARD, *config.mechanisms.statistics)
    shards = count(config.shardings.rows)
    zeros: BlockStats = {}
    for path, (layers, *channels) in config.blocks.items():
        lead = (layers, shards) if shards > 1 else (layers,)
        zeros[path] = statistics.taps(dict.fromkeys(names), (*lead, *channels))
        zeros[path] |= {name: jnp.zeros(lead, jnp.float32) for name in config.checks}
    return _nested(pin_to_shards(zeros, config.shardings.rows, axis=1))


def reduce_stats(
    stats: BlockStats, names: tuple[str, ...], sharding: RowSharding
) -> BlockStats:
    """Returns sums by block over the global batch: the only reduction of statistics in a step."""
    if count(sharding) == 1:
        return stats
    with jax.named_scope("statistics"):
        return {
            path: statistics.sum_over_shards(block, names)
            for path, block in stats.items()
        }


def accumulate(
    sums: Callable[[Batch, Array], dict[str, Any]], batch: Batch, key: Array
) -> dict[str, Any]:
    """Returns ``sums`` added up over the leading axis of the batch; traced once."""
    micro_batches = next(iter(batch.values())).shape[0]
    first = {name: value[0] for name, value in batch.items()}
    if micro_batches == 1:
        return sums(first, jax.random.fold_in(key, 0))

    def body(
        total: dict[str, Any], item: tuple[Batch, Array]
    ) -> tuple[dict[str, Any], None]:
        """Adds the sums of one micro-batch to the total."""
        micro, index = item
        addend = sums(micro, jax.random.fold_in(key, index))
        return trees.map_named(statistics.merge_leaf, total, addend), None

    # Zeros are neutral for sums and for maxima of non-negative numbers.
    shapes = jax.eval_shape(sums, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(body, zeros, (dict(batch), jnp.arange(micro_batches)))
    return total


def _by_block(collection: Any) -> BlockStats:
    """Returns ``{"layers/ffn": {"slope": ...}}`` of ``{"layers": {"ffn": {"slope": ...}}}``."""
    blocks: BlockStats = {}
    for path, value in trees.flatten(collection).items():
        block, _, name = path.rpartition("/")
        blocks.setdefault(block, {})[name] = value
    return blocks


def _nested(blocks: BlockStats) -> Any:
    """Returns the inverse of `_by_block`."""
    leaves = {}
    for path, block in blocks.items():
        for name, x in block.items():
            leaves[f"{path}/{name}".removeprefix("/")] = x
    return trees.unflatten(leaves)


def idle(
    state: GateState | None, mechanisms: Mechanisms, patience: int = 10
) -> dict[str, Array]:
    """Returns, by label, True for a mechanism that should have acted for ``patience`` steps while
    no token was measured in any block."""
    if state is None:
        return {}
    measured = [jnp.max(updates) > 0 for updates in state.updates.values()]
    none_measured = jnp.asarray(True)
    if measured:
        none_measured = ~jnp.any(jnp.stack(measured))
    flags = {}
    for label, mechanism in mechanisms.entries:
        flags[label] = none_measured & (state.count >= mechanism.warmup + patience)
    return flags
