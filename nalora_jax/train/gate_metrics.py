"""Log metrics of the gates: means of the channel statistics and the rules' factors, per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from nalora_jax.method import statistics
from nalora_jax.method.step import BlockStats
from nalora_jax.method.transform import Factors, Mechanisms


def layer_metrics(mechanisms: Mechanisms) -> Callable[[BlockStats, BlockStats, Factors], BlockStats]:
    """Returns the metrics of a step's blocks, for `nalora_jax.method.step.StepConfig.metrics`.

    The function takes sums by block (channels ``[layers, ..., d_ff]``, counts ``[layers, ...]``,
    maybe by shard), each mechanism's factors (`own_factors`) and their products
    (`channel_factors`). Per block it returns the metrics of `layer_means`, ``<label>_<metric>`` of
    each mechanism, and of the product on B's columns ``favoured`` (share of channels with a factor
    of 1 or more), ``factor_min`` and ``factor_max``; ``[layers]`` each. Experts are averaged over.
    """

    def metrics(stats: BlockStats, own_factors: BlockStats, factors: Factors) -> BlockStats:
        blocks = {path: layer_means(sums) for path, sums in stats.items()}
        for path, block in blocks.items():
            for label, mechanism in mechanisms.entries:
                if path not in own_factors.get(label, {}):
                    continue
                values = mechanism.metrics(_by_layer(own_factors[label][path]))
                block |= {f"{label}_{name}": value for name, value in values.items()}
            if path in factors.get("update_b", {}):
                joint = _by_layer(factors["update_b"][path])
                block["favoured"] = jnp.mean((joint >= 1.0).astype(jnp.float32), axis=1)
                block |= {"factor_min": jnp.min(joint, axis=1), "factor_max": jnp.max(joint, axis=1)}
        return blocks

    return metrics


def _by_layer(factor: Array) -> Array:
    """Returns ``[layers, channels]`` of ``[layers, ..., d_ff]``."""
    return factor.reshape(factor.shape[0], -1)


def layer_means(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Returns a block's log metrics: means over a layer's tokens, channels and experts, and `RATIOS`.

    Args:
      sums: ``[layers, ..., d_ff]``, ``[layers, ..., parts, d_ff]``, counts ``[layers, ...]``; the
        axes between may be experts and shards.

    Returns:
      By metric ``[layers]`` or ``[layers, parts]``; NaN in a layer without a measured token.
    """
    means: dict[str, Array] = {}
    totals = {name: _layer_total(value, _parts(name)) for name, value in sums.items()}
    for name in (name for name in sums if name in statistics.TABLE and statistics.get(name).metric):
        count = totals[statistics.get(name).count] * sums[name].shape[-1]
        if statistics.get(name).parts:
            count = count[:, None]
        value = totals[name] / jnp.where(count > 0, count, 1.0)
        means[statistics.get(name).metric] = jnp.where(count > 0, value, jnp.nan)
    for name, (above, below) in statistics.RATIOS.items():
        if above in sums and below in sums:
            count = totals[statistics.get(below).count]
            means[name] = jnp.where(count > 0, statistics.ratio(name, totals), jnp.nan)
    return means


def _parts(name: str) -> int:
    if name in statistics.TABLE:
        return statistics.get(name).parts
    return 0


def _layer_total(x: Array, parts: int) -> Array:
    """Returns ``[layers]``, or ``[layers, parts]``; not reshaped, since axes may be sharded."""
    axes = (*range(1, x.ndim - 2), x.ndim - 1) if parts else tuple(range(1, x.ndim))
    return jnp.sum(x, axis=axes)
