"""The router's choice, rows of tokens by place with their gradients, and samples of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.models.routing import (
    Places,
    RouterSpec,
    choose,
    route,
    sample,
    samples_of_parts,
    spread,
    summed,
)
from nalora_jax.ops.split_rows import split

TOKENS, TOP_K, WIDTH = 6, 3, 4


@pytest.mark.parametrize("unused", [0, 5])
def test_the_gradients_scatter_no_rows(unused: int) -> None:
    """The 18 rows of six tokens are in random places, some of which may be unused."""
    count = TOKENS * TOP_K + unused
    of_rows = np.random.default_rng(1).permutation(count)[: TOKENS * TOP_K]
    token, used = np.zeros(count, int), np.zeros(count, bool)
    token[of_rows], used[of_rows] = np.arange(TOKENS * TOP_K) // TOP_K, True
    places = Places(jnp.array(token), jnp.array(of_rows), jnp.array(used) if unused else None)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(summed(spread(x, places, TOP_K), places, TOP_K) ** 2)

    lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((TOKENS, WIDTH))).as_text()
    assert "gather" in lowered
    assert "scatter" not in lowered


def test_experts_are_chosen_within_the_best_groups():
    """Group 0 has the highest score, group 1 the highest sum of two; the weights do not have the correction."""
    scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.2, 0.2]])
    logits, spec = (
        jnp.asarray(np.log(scores / (1 - scores)), jnp.float32),
        RouterSpec("sigmoid", groups=3, groups_kept=1),
    )
    weights, chosen = choose(logits, 2, spec)
    assert chosen.tolist() == [[2, 3]]
    np.testing.assert_allclose(weights, [[6 / 11, 5 / 11]], rtol=1e-6)
    corrected = jnp.asarray([0, 0, 0, 0, 1.0, 0.5])
    weights, chosen = choose(logits, 2, RouterSpec("sigmoid", False, True, 3, 1, 2.5), corrected)
    assert chosen.tolist() == [[4, 5]]
    np.testing.assert_allclose(weights, [[0.5, 0.5]], rtol=1e-6)


BATCH, EXPERTS, CHOSEN = 2, 6, 3


def taken(samples: Any, routing: Any, numbers: jax.Array) -> jax.Array:
    """Returns the weights in statistics, ``[tokens, experts]``, of tokens with these numbers."""
    weights = jnp.zeros((1000, EXPERTS))
    rows = jnp.arange(routing.token.shape[0]) if samples.rows is None else samples.rows
    return weights.at[numbers.reshape(-1)[routing.token[rows]]].add(samples.weights.T)


def test_rows_of_experts_are_sampled_as_of_whole_sequences() -> None:
    """Sequences begin or end with padding, and one of them has no token in the last blocks."""
    context, seq = 4, 61
    rng, strides = np.random.default_rng(0), (1, 5, 8)
    logits = rng.normal(size=(BATCH, seq, EXPERTS)) + 2 * np.sin(np.arange(EXPERTS))
    place = np.arange(seq)
    real = np.stack([place > 9, (place < 40) & (place % 7 > 0)])
    weights = jnp.asarray(real * rng.uniform(0.5, 1, real.shape), jnp.float32)
    numbers = jnp.arange(BATCH * seq).reshape(BATCH, seq)
    mesh = distributed.make_mesh(MeshConfig(1, 2, 1, context), jax.devices()[: 2 * context])
    sharding = distributed.row_sharding(mesh)

    def of(logits: jax.Array, weights: jax.Array, numbers: jax.Array, length: int) -> Any:
        routing = route(logits.reshape(-1, EXPERTS), CHOSEN, RouterSpec())
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
