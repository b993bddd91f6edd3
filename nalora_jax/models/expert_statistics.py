"""Statistics of the gates of a mixture's experts, from sampled rows of one device's tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.method import activations, statistics
from nalora_jax.models.router import Routing
from nalora_jax.ops.reductions import sampled as sampled_positions


class SampledRows(NamedTuple):
    """Sorted rows that statistics are computed from."""

    rows: jax.Array | None  # int [taken]; None: all rows
    # float32 [experts, taken]: the row's token weight in its own expert, 0 in the others
    weights: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """Returns ``[taken, ...]`` of ``[rows, ...]``."""
        if self.rows is None:
            return x
        return x.at[self.rows].get(mode="promise_in_bounds")


def sample(routing: Routing, token_weights: jax.Array, stride: int) -> SampledRows:
    """Samples one in ``stride`` rows of every sequence, with real tokens preferred to padding.

    Single rows are sampled instead of runs, because an expert may have few. The rows of each
    sequence are sorted by expert separately, so that a sequence counts the same in any batch.

    Args:
      routing: of all tokens of the batch.
      token_weights: ``[batch, seq]``, 0 for padding.
      stride: 1 or more.
    """
    token_weights = lax.stop_gradient(token_weights).astype(jnp.float32)
    rows, expert = None, routing.expert
    weights = jnp.take(token_weights.reshape(-1), routing.token)
    if stride > 1:
        batch = token_weights.shape[0]
        experts = routing.expert[routing.back].reshape(batch, -1)
        # [batch, seq * top_k]: indices of a sequence's rows among all sorted rows, by expert
        places = jnp.take_along_axis(
            routing.back.reshape(batch, -1), jnp.argsort(experts, axis=1, stable=True), axis=1
        )
        positions = sampled_positions(places[..., None], jnp.take(weights, places), stride, run=1)
        rows = positions.reshape(-1)
        weights, expert = jnp.take(weights, rows), jnp.take(expert, rows)
    return SampledRows(rows, by_expert(weights, expert, routing))


def by_expert(weights: jax.Array, expert: jax.Array, routing: Routing) -> jax.Array:
    """Returns the weights ``[experts, taken]`` of `SampledRows`."""
    reached = expert[None, :] == jnp.arange(routing.sizes.shape[0])[:, None]
    return jnp.where(reached, weights[None, :], 0.0)


def expert_statistics(
    z: jax.Array,
    start: jax.Array,
    dz: jax.Array,
    samples: tuple[SampledRows, SampledRows],
    activation: activations.Activation,
    names: Iterable[str],
) -> dict[str, jax.Array]:
    """Returns `nalora_jax.method.measurement.gate_statistics` of every expert over its tokens.

    Args:
      z: ``[taken, d_ff]`` full pre-activations of the first sample's rows.
      start: ``[probed, d_ff]`` frozen pre-activations of the second sample's rows.
      dz: ``[probed, d_ff]`` the adapter's change of them.
      samples: rows for the gate's statistics and rows for the probe.
      activation: the gate's.
      names: statistics of the forward pass.

    Returns:
      The same names with a leading ``[experts]`` axis.
    """
    partition = activations.partition(activation.name)

    def one(of_gate: jax.Array, of_probe: jax.Array) -> dict[str, jax.Array]:
        stats = statistics.channel_statistics(z, of_gate, activation, partition, names)
        return stats | statistics.probe_statistics(start, dz, of_probe, activation, names)

    return jax.vmap(one)(samples[0].weights, samples[1].weights)


def expert_cotangent_statistics(
    delta: jax.Array, of: SampledRows, names: Iterable[str]
) -> dict[str, jax.Array]:
    """Returns `nalora_jax.method.statistics.cotangent_statistics` by expert.

    ``delta`` is ``[rows, d_ff]``; the results have a leading axis ``[experts]``.
    """
    sampled = of.take(delta)
    return jax.vmap(lambda weights: statistics.cotangent_statistics(sampled, weights, names))(of.weights)
