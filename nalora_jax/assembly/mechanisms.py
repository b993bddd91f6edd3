"""Builds the mechanisms of a run from its settings, and the metrics of their gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from nalora_jax.config import RunConfig
from nalora_jax.method import statistics
from nalora_jax.method.step import BlockStats
from nalora_jax.method.transform import Mechanisms, RuleFactors, make_mechanisms

log = logging.getLogger(__name__)


def mechanisms_of(
    config: RunConfig,
    activation: str,
    blocks: Mapping[str, str],
    gates: Mapping[str, str],
) -> Mechanisms:
    """Returns the mechanisms of a run; none, with a warning, if no adapter is on a gate.

    Args:
      config: the run's settings.
      activation: of most blocks.
      blocks: activation of each measured block, by path.
      gates: see `nalora_jax.method.low_rank.find_gates`.
    """
    steps = config.steps
    seed = config.seed
    mechanisms = make_mechanisms(
        config.mechanisms, activation=activation, total_steps=steps, seed=seed
    )
    if mechanisms.entries and not gates:
        names = ", ".join(label for label, _ in mechanisms.entries)
        message = (
            "no adapter sits on a gate (gate_proj or in_proj): no mechanism acts (%s)"
        )
        log.warning(message, names)
        return replace(mechanisms, entries=())
    differing = tuple(
        (path, name) for path, name in blocks.items() if name != activation
    )
    return replace(mechanisms, others=differing)


def first_step(mechanisms: Mechanisms) -> int:
    """Returns the first optimizer step in which a mechanism acts, counted from 1; 0 without
    mechanisms."""
    return min((mechanism.warmup + 1 for _, mechanism in mechanisms.entries), default=0)


def log_first_step(mechanisms: Mechanisms, steps: int) -> None:
    """Logs the step from which mechanisms act; warns if a run of ``steps`` steps ends before."""
    first = first_step(mechanisms)
    if first > steps:
        message = (
            "mechanisms act from step %d, and the run ends at step %d: it is plain LoRA"
        )
        log.warning(message, first, steps)
    elif first:
        log.info("mechanisms act from step %d", first)


def layer_metrics(
    mechanisms: Mechanisms,
) -> Callable[[BlockStats, BlockStats, RuleFactors], BlockStats]:
    """Returns the metrics of a step's blocks, for `nalora_jax.method.step.StepConfig.metrics`.

    The function takes sums by block (channels ``[layers, ..., d_ff]``, counts ``[layers, ...]``,
    maybe by shard), each mechanism's factors (`own_factors`) and their products
    (`channel_factors`). Per block it returns the metrics of `layer_means`, ``<label>_<metric>`` of
    each mechanism, and of the product on B's columns ``favoured`` (share of channels with a factor
    of 1 or more), ``factor_min`` and ``factor_max``; ``[layers]`` each. Experts are averaged over.
    """

    def metrics(
        stats: BlockStats, own_factors: BlockStats, factors: RuleFactors
    ) -> BlockStats:
        """Returns the log metrics by block; see `layer_metrics`."""
        blocks = {path: layer_means(sums) for path, sums in stats.items()}
        for path, block in blocks.items():
            for label, mechanism in mechanisms.entries:
                if path not in own_factors.get(label, {}):
                    continue
                values = mechanism.metrics(_by_layer(own_factors[label][path]))
                block |= {f"{label}_{name}": value for name, value in values.items()}
            if path in factors.get("update_b", {}):
                # The product of all mechanisms' factors on B's columns.
                joint = _by_layer(factors["update_b"][path])
                block["favoured"] = jnp.mean((joint >= 1.0).astype(jnp.float32), axis=1)
                block |= {
                    "factor_min": jnp.min(joint, axis=1),
                    "factor_max": jnp.max(joint, axis=1),
                }
        return blocks

    return metrics


def _by_layer(factor: Array) -> Array:
    """Returns ``[layers, channels]`` of ``[layers, ..., d_ff]``."""
    return factor.reshape(factor.shape[0], -1)


def layer_means(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Returns a block's log metrics: means over a layer's tokens, channels and experts, and
    `RATIOS`.

    Args:
      sums: ``[layers, ..., d_ff]``, ``[layers, ..., parts, d_ff]``, counts ``[layers, ...]``; the
        axes between may be experts and shards.

    Returns:
      By metric ``[layers]`` or ``[layers, parts]``; NaN in a layer without a measured token.
    """
    means: dict[str, Array] = {}
    totals = {name: _layer_total(value, _parts(name)) for name, value in sums.items()}
    for name in (
        name
        for name in sums
        if name in statistics.TABLE and statistics.get_statistic(name).metric
    ):
        # Measured tokens times channels, [layers].
        count = totals[statistics.get_statistic(name).count] * sums[name].shape[-1]
        if statistics.get_statistic(name).parts:
            # Values are [layers, parts].
            count = count[:, None]
        value = totals[name] / jnp.where(count > 0, count, 1.0)
        means[statistics.get_statistic(name).metric] = jnp.where(
            count > 0, value, jnp.nan
        )
    for name, (above, below) in statistics.RATIOS.items():
        if above in sums and below in sums:
            count = totals[statistics.get_statistic(below).count]
            means[name] = jnp.where(count > 0, statistics.ratio(name, totals), jnp.nan)
    return means


def _parts(name: str) -> int:
    """Returns the number of parts of a statistic; 0 if it has none, as counts."""
    if name in statistics.TABLE:
        return statistics.get_statistic(name).parts
    return 0


def _layer_total(x: Array, parts: int) -> Array:
    """Returns the sums of each layer, ``[layers]``, or ``[layers, parts]`` of ``[layers, ...,
    parts, d_ff]``.

    It sums over several axes instead of reshaping, since axes may be sharded.
    """
    if parts:
        axes = (*range(1, x.ndim - 2), x.ndim - 1)
    else:
        axes = tuple(range(1, x.ndim))
    return jnp.sum(x, axis=axes)
