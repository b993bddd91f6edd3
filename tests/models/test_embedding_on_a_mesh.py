"""The lookup of tokens where a mesh splits the rows of the batch, and rows and columns of the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed
from nalora_jax.config import MeshConfig
from nalora_jax.models.decoder import Embedding
from nalora_jax.ops.dispatch import Numerics

VOCAB, D, ROWS, SEQ = 40, 16, 8, 6
WARNING = "Involuntary full rematerialization"  # of XLA's partitioner, on the standard error of the process


def looked_up(sharding: NamedSharding, of_lookup: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
    """Rows on the mesh, from a program that nothing has compiled before, and on one device."""
    rng = np.random.default_rng(0)
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(VOCAB, D)), jnp.float32)}}
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SEQ)), jnp.int32)
    placed = jax.device_put(params, distributed.shardings(params, sharding.mesh, distributed.PARAM_RULES))
    module = Embedding(VOCAB, D, of_lookup)

    def read(table: jax.Array, tokens: jax.Array) -> jax.Array:
        x = module.apply({"params": table}, tokens, Numerics()).astype(jnp.float32) * 2.0
        return jax.lax.with_sharding_constraint(x, sharding)

    found = jax.jit(read)(placed["embed"], jax.device_put(tokens, sharding))
    return found, 2.0 * params["embed"]["embedding"][tokens]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 1), (1, 4, 2)], ids=str)
def test_what_is_looked_up_is_not_made_whole_on_every_device(sizes, capfd):
    sharding = NamedSharding(distributed.make_mesh(MeshConfig(*sizes)), P(distributed.BATCH_AXES))
    found, expected = looked_up(sharding, sharding)
    np.testing.assert_array_equal(found, expected)
    assert found.sharding.is_equivalent_to(sharding, 3)
    assert WARNING not in capfd.readouterr().err


def test_the_compiler_still_warns_of_what_is_left_to_it(capfd):
    """Without which the test above could not fail."""
    sharding = NamedSharding(distributed.make_mesh(MeshConfig(2, 2, 2)), P(distributed.BATCH_AXES))
    looked_up(sharding, None)
    assert WARNING in capfd.readouterr().err
