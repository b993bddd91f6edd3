"""One optimizer step as a pure function: statistics and gradients of the micro-batches, then masks, then the update.

The only place that knows both the blocks that write statistics (`nalora_jax.nn`) and the transforms that consume what
becomes of them (`nalora_jax.optim`). The order within step t:

1. the factors of the mechanisms come from what they remember of step t - 1;
2. every micro-batch gives a loss sum, gradient sums and statistics, added up over the (global) batch; on a mesh the
   statistics by shard, and over the shards once;
3. gradients are divided by the number of target tokens, so that any split of the batch is the same step;
4. the optimizer updates the adapters, the factors acting before or after its preconditioner;
5. the mechanisms take in the statistics, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from nalora_jax import statistics, trees
from nalora_jax.distributed.devices import platform_name
from nalora_jax.ops import checks
from nalora_jax.ops.cross_entropy import Head
from nalora_jax.ops.numerics import Numerics, Platform
from nalora_jax.ops.programs import after_compilation
from nalora_jax.ops.shards import count, pinned
from nalora_jax.optim.gate_state import (
    Mechanisms,
    channel_factors,
    idle,
    mask_collection,
    own_factors,
    update_gate_state,
)
from nalora_jax.train.objectives import Batch, NextToken, Objective
from nalora_jax.train.state import TrainState

# How the message of a failed check begins.
BROKEN = "gate-compensation identity broken"

Step = Callable[[Any, TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def compile_ahead(step: Step, params: Any, state: TrainState, batch: Batch) -> Any:
    """Compiles ``step`` for arguments like these before its first call.

    A first call would compile as well, but allocate its buffers on top of the compiler's memory; an implementation may
    hand that back here. A second call with such arguments compiles no more.

    Returns:
      The ``jax.stages.Compiled``; None if the step is not jitted.
    """
    if not hasattr(step, "lower"):
        return None
    compiled = step.lower(params, state, batch).compile()  # the call of the step finds it compiled
    (device, *_) = jax.tree.leaves(batch)[0].devices()
    after_compilation(Numerics(platform=Platform(platform_name(device))))
    return compiled


@dataclass(frozen=True)
class StepConfig:
    """The static choices of a step."""

    mechanisms: Mechanisms
    head: Head
    numerics: Numerics = field(default_factory=Numerics)
    loss_chunk: int = 0
    batch_shards: int = 1  # parts that the mesh splits the batch into
    # Of adapters (and masks) within the step, where the state splits them further; a tree, and one for all masks.
    lora_sharding: Any = None
    mask_sharding: NamedSharding | None = None
    head_sharding: NamedSharding | None = None  # of the head's kernel in the loss, where the mesh splits it further
    stats_sharding: NamedSharding | None = None  # the blocks' own (`nalora_jax.ops.gated_mlp.GateStatsConfig`)
    check_gates: bool = False


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    config: StepConfig,
    objective: Objective | None = None,
) -> Step:
    """The pure step ``(params, state, batch) -> (state, metrics)``, to be jitted by the caller.

    Args:
      model: a `nalora_jax.models.decoder.Decoder` (or any module with its call and its ``gate_stats``).
      optimizer: from `nalora_jax.optim.nalora`; takes ``gate_factors``.
      config: static choices.
      objective: what is minimised; by default the cross-entropy of the model's next tokens.

    Returns:
      A function of params (frozen, or what `nalora_jax.ops.storage.prepare` makes of them), a `TrainState`, and a batch
      of ``tokens, targets, loss_weights, segment_ids, positions``, each ``[micro_batches, rows, seq]``. Metrics are
      ``loss`` (mean per target token), ``grad_norm``, ``tokens`` (real), ``target_tokens``, ``layers`` (see
      `layer_metrics`), ``measured`` (the objective's own numbers, means likewise), and ``idle``: by mechanism, whether
      it ought to act by now and has measured no token.
    """
    gradients = _micro_gradients(objective or next_token(model, config), config)
    mechanisms = config.mechanisms

    def step(params: Any, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        own = own_factors(state.gate, mechanisms)
        factors = channel_factors(state.gate, mechanisms, own)
        collection = mask_collection(factors["gradient_a"]) if "gradient_a" in factors else None
        channels = {path: factor.shape for blocks in own.values() for path, factor in blocks.items()}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        lora = state.lora
        if config.lora_sharding is not None:  # gathered once, not in every layer
            lora = lax.with_sharding_constraint(lora, config.lora_sharding)
            collection = jax.tree.map(lambda m: lax.with_sharding_constraint(m, config.mask_sharding), collection)
        sums = _accumulate(lambda b, k: gradients(params, lora, channels, collection, b, k), batch, key)
        if config.check_gates:
            _check_gates(sums["stats"])
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["target_tokens"], 1.0), sums["grads"])
        stats = {path: statistics.per_target(block, sums["target_tokens"]) for path, block in sums["stats"].items()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora, gate_factors=factors)
        gate = update_gate_state(state.gate, _reduced(stats, mechanisms.statistics, config), mechanisms)
        lora = optax.apply_updates(state.lora, updates)
        units = jnp.maximum(sums["target_tokens"], 1.0)
        metrics = {
            "loss": sums["loss"] / units,
            "measured": {name: value / units for name, value in sums["measured"].items()},
            "grad_norm": optax.tree.norm(grads),
            "tokens": sums["tokens"],
            "target_tokens": sums["target_tokens"],
            "layers": layer_metrics(stats, mechanisms, own, factors),
            "idle": idle(gate, mechanisms),
        }
        return TrainState(state.step + 1, lora, opt_state, gate, state.key), metrics

    return step


def make_gradients(model: Any, config: StepConfig) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """The first half of a step, without dropout: ``(params, lora, batch) -> sums`` of gradients and statistics.

    Returns:
      A function whose result holds ``grads`` (of ``lora``, summed over target tokens), ``stats`` (sums by block) and
      ``target_tokens``; batches as of `make_train_step`.
    """
    gradients = _micro_gradients(next_token(model, config), config)

    def sums(params: Any, lora: Any, batch: Batch) -> dict[str, Any]:
        found = _accumulate(lambda b, k: gradients(params, lora, {}, None, b, k), batch, jax.random.key(0))
        return found | {"stats": _reduced(found["stats"], statistics.STANDARD, config)}

    return sums


def next_token(model: Any, config: StepConfig) -> NextToken:
    """The cross-entropy of the model's next tokens, with a step's static choices."""
    return NextToken(model, config.head, config.numerics, config.loss_chunk, config.batch_shards, config.head_sharding)


def _micro_gradients(objective: Objective, config: StepConfig) -> Callable[..., dict[str, Any]]:
    """Sums of one micro-batch: loss, grads, statistics, token counts."""

    taps = statistics.cotangent(config.mechanisms.statistics)

    def loss_sum(
        lora: Any, taps: Any, params: Any, masks: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, dict[str, jax.Array]], dict[str, jax.Array]]]:
        frozen = params if "params" in params else {"params": params}
        variables = {**frozen, "lora": lora} | ({"gate_mask": masks} if masks else {})
        variables |= {"gate_taps": taps} if taps else {}
        found = objective.loss(variables, frozen["params"], batch, key)
        return found.loss, (_by_block(found.gate_stats), dict(found.measured))

    def sums(params: Any, lora: Any, channels: Any, masks: Any, batch: Batch, key: jax.Array) -> dict[str, Any]:
        differentiate = jax.value_and_grad(loss_sum, argnums=(0, 1) if taps else 0, has_aux=True)
        zeros = _sinks(taps, channels, config)
        (loss, (stats, measured)), grads = differentiate(lora, _nested(zeros), params, masks, batch, key)
        if taps:
            grads, seen = grads
            for path, found in _by_block(seen).items():
                stats[path] = stats[path] | found
        stats = pinned(stats, config.stats_sharding, axis=1)
        tokens, targets = objective.counts(batch)
        counts = {"tokens": tokens, "target_tokens": targets}
        return {"loss": loss, "grads": grads, "stats": stats, "measured": measured} | counts

    return sums


def _sinks(
    names: tuple[str, ...], channels: Mapping[str, tuple[int, ...]], config: StepConfig
) -> dict[str, dict[str, jax.Array]]:
    """Zeros by block whose gradients are the statistics ``names`` of cotangents, by shard where blocks sum so."""
    shards = count(config.stats_sharding)
    shapes = {path: shape if shards == 1 else (shape[0], shards, *shape[1:]) for path, shape in channels.items()}
    zeros = {path: statistics.taps(names, shape) for path, shape in shapes.items()} if names else {}
    placed: dict[str, dict[str, jax.Array]] = pinned(zeros, config.stats_sharding, axis=1)
    return placed


def _reduced(
    stats: dict[str, dict[str, jax.Array]], names: tuple[str, ...], config: StepConfig
) -> dict[str, dict[str, jax.Array]]:
    """Sums by block over the whole batch: the only ones of a step, after all layers and micro-batches."""
    if count(config.stats_sharding) == 1:
        return stats
    with jax.named_scope("statistics"):
        return {path: statistics.over_shards(block, names) for path, block in stats.items()}


def _nested(blocks: Mapping[str, Mapping[str, jax.Array]]) -> Any:
    """The inverse of `_by_block`."""
    leaves = {f"{path}/{name}".removeprefix("/"): x for path, block in blocks.items() for name, x in block.items()}
    return trees.unflatten(leaves)


def _by_block(collection: Any) -> dict[str, dict[str, jax.Array]]:
    """``{"layers": {"ffn": {"slope": ...}}}`` -> ``{"layers/ffn": {"slope": ...}}``."""
    blocks: dict[str, dict[str, jax.Array]] = {}
    for path, value in trees.flatten(collection).items():
        block, _, name = path.rpartition("/")
        blocks.setdefault(block, {})[name] = value
    return blocks


def _accumulate(sums: Callable[[Batch, jax.Array], dict[str, Any]], batch: Batch, key: jax.Array) -> dict[str, Any]:
    """``sums`` added up over the leading axis of the batch; traced once, however many micro-batches there are."""
    count = next(iter(batch.values())).shape[0]
    if count == 1:
        return sums({name: value[0] for name, value in batch.items()}, jax.random.fold_in(key, 0))

    def body(total: dict[str, Any], item: tuple[Batch, jax.Array]) -> tuple[dict[str, Any], None]:
        micro, index = item
        return _add(total, sums(micro, jax.random.fold_in(key, index))), None

    first = {name: value[0] for name, value in batch.items()}
    # Zero is where sums start, and maxima of what is never below it.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, first, key))
    return lax.scan(body, nothing, (dict(batch), jnp.arange(count)))[0]


def _add(total: Any, part: Any) -> Any:
    return trees.map_named(statistics.merged, total, part)


def layer_metrics(
    stats: Mapping[str, Mapping[str, jax.Array]],
    mechanisms: Mechanisms,
    own: Mapping[str, Mapping[str, jax.Array]],
    factors: Mapping[str, Mapping[str, jax.Array]],
) -> dict[str, dict[str, jax.Array]]:
    """What the log keeps of each block, per layer.

    Args:
      stats: sums by block; channels ``[layers, ..., d_ff]``, counts ``[layers, ...]``; they may be by shard.
      mechanisms: those of the run.
      own: each one's factors before this step, by label and block (`own_factors`).
      factors: what they made together, by place and block (`channel_factors`).

    Returns:
      By block, each ``[layers]`` or ``[layers, parts]``: the metrics and ratios of the table
      (`nalora_jax.statistics.layer_means`), NaN where no token was measured. With mechanisms: what each shows of its
      factor, as ``<label>_mean`` and the like, and of what they do together to B's columns ``favoured`` (share of
      channels with a factor of 1 or more), ``factor_min`` and ``factor_max``. Experts are averaged over.
    """
    found = {path: statistics.layer_means(sums) for path, sums in stats.items()}
    for path, metrics in found.items():
        for label, one in mechanisms.entries:
            shown = one.metrics(_by_layer(own[label][path]))
            metrics |= {f"{label}_{name}": value for name, value in shown.items()}
        if "update_b" in factors:
            joint = _by_layer(factors["update_b"][path])
            metrics["favoured"] = jnp.mean((joint >= 1.0).astype(jnp.float32), axis=1)
            metrics |= {"factor_min": jnp.min(joint, axis=1), "factor_max": jnp.max(joint, axis=1)}
    return found


def _by_layer(factor: jax.Array) -> jax.Array:
    """``[layers, ..., d_ff]`` -> ``[layers, channels]``."""
    return factor.reshape(factor.shape[0], -1)


def _check_gates(stats: Mapping[str, Mapping[str, jax.Array]]) -> None:
    """No check of the live blocks above 1; value checks, so the step must be chexified.

    They stand here because a check inside a differentiated scan is silently dropped.
    """
    for path, sums in stats.items():
        for name, meaning in checks.NAMES.items():
            excess = jnp.maximum(sums[name] - 1.0, 0.0)
            chex.assert_trees_all_close(
                excess, jnp.zeros_like(excess), rtol=0.0, atol=0.0, custom_message=f"{BROKEN} in {path}: {meaning}"
            )
