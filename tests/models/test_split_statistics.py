"""The sample of experts' rows in parts of sequences against the sample of whole sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.models.routing import RouterSpec, route, sample, samples_of_parts
from nalora_jax.ops.split_rows import split

BATCH, EXPERTS, TOP_K = 2, 6, 3


def taken(samples: Any, routing: Any, numbers: jax.Array) -> jax.Array:
    """Returns the weights in statistics, ``[tokens, experts]``, of tokens with these numbers."""
    weights = jnp.zeros((1000, EXPERTS))
    rows = jnp.arange(routing.token.shape[0]) if samples.rows is None else samples.rows
    return weights.at[numbers.reshape(-1)[routing.token[rows]]].add(samples.weights.T)


@pytest.mark.parametrize(("context", "seq"), [(2, 64), (4, 61)])
def test_rows_of_experts_are_sampled_as_of_whole_sequences(context: int, seq: int) -> None:
    """Sequences begin or end with padding, and one of them has no token in the last blocks."""
    rng, strides = np.random.default_rng(0), (1, 5, 8)
    logits = rng.normal(size=(BATCH, seq, EXPERTS)) + 2 * np.sin(np.arange(EXPERTS))
    place = np.arange(seq)
    real = np.stack([place > 9, (place < 40) & (place % 7 > 0)])
    weights = jnp.asarray(real * rng.uniform(0.5, 1, real.shape), jnp.float32)
    numbers = jnp.arange(BATCH * seq).reshape(BATCH, seq)
    mesh = distributed.make_mesh(MeshConfig(1, 2, 1, context), jax.devices()[: 2 * context])
    sharding = distributed.row_sharding(mesh)

    def of(logits: jax.Array, weights: jax.Array, numbers: jax.Array, length: int) -> Any:
        routing = route(logits.reshape(-1, EXPERTS), TOP_K, RouterSpec())
        if not length:
            return [taken(sample(routing, weights, stride), routing, numbers) for stride in strides]
        of_strides = (samples_of_parts(routing, weights, (s, s), length)[0] for s in strides)
        return [taken(samples, routing, numbers)[None] for samples in of_strides]

    arrays = jnp.asarray(logits, jnp.float32), weights, numbers
    rows = P(sharding.spec[0])
    mapped = jax.shard_map(
        lambda *parts: of(*parts, seq), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    ours = jax.jit(mapped)(*(split(x, sharding) for x in arrays))
    for part, expected in zip(ours, jax.jit(of, static_argnums=3)(*arrays, 0), strict=True):
        np.testing.assert_allclose(part.sum(0), expected, rtol=1e-6)
