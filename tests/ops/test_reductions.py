"""Sums that shards make of their own rows, against those of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.config import MeshConfig
from nalora_jax.mesh import distributed
from nalora_jax.method import statistics
from nalora_jax.ops.reductions import sum_by_shard

SEQ, D_FF = 3, 6


@pytest.fixture(scope="module")
def rows() -> NamedSharding:
    """Four shards; channels are split as well."""
    return NamedSharding(distributed.make_mesh(MeshConfig(2, 2, 2)), P(BATCH_AXES))


def sums(z, weights):
    return {"total": statistics.total(z, weights), "tokens": jnp.sum(weights)}


@pytest.mark.parametrize("batch", [10, 3])
def test_shards_together_have_the_sums_of_the_batch(rows, batch):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(batch, SEQ, D_FF)).astype(np.float32)
    weights = rng.integers(0, 2, (batch, SEQ)).astype(np.float32)
    found = jax.jit(lambda z, w: sum_by_shard(sums, rows, z, w))(z, weights)
    each = -(-batch // 4)
    for shard in range(4):
        own = slice(shard * each, (shard + 1) * each)
        expected = np.einsum("bsd,bs->d", z[own], weights[own])
        np.testing.assert_allclose(found["total"][shard], expected, rtol=1e-5, atol=1e-5)
        assert found["tokens"][shard] == weights[own].sum()


def test_over_the_shards_only_what_is_asked_for_is_summed():
    """``[layers, shards, experts, ...]``: the last region holds the tokens that the others
    leave."""
    rng = np.random.default_rng(0)
    # [layers, shards, experts, d_ff, parts]
    regions = rng.multinomial(9, [0.1, 0.5, 0.3, 0.1], size=(2, 4, 3, D_FF))
    block = {
        "tokens": np.full((2, 4, 3), 9.0, np.float32),
        "probe_tokens": np.full((2, 4, 3), 2.0, np.float32),
        "slope": rng.uniform(size=(2, 4, 3, D_FF)).astype(np.float32),
        "occupancy": np.moveaxis(regions, -1, -2).astype(np.float32),
        "feature": np.full((2, 4, 3, D_FF), np.nan, np.float32),
    }
    found = statistics.sum_over_shards(block, ("slope", "occupancy"))
    assert set(found) == {"tokens", "probe_tokens", "slope", "occupancy"}
    for name, value in found.items():
        np.testing.assert_allclose(value, block[name].sum(1), rtol=1e-6, err_msg=name)
    # A rounding error of the others is no negative share.
    block["tokens"] = block["tokens"] - np.float32(1e-3) - block["occupancy"][..., -1, :].max(-1)
    assert np.all(statistics.sum_over_shards(block, ("occupancy",))["occupancy"] >= 0)
