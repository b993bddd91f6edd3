"""The lookup of tokens where a mesh splits the rows of the batch, and rows and columns of the table."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.cli.planning.program import architecture
from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.config import ComputeConfig, MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.embedding import Embedding
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.train.program import next_token

VOCAB, D, ROWS, SEQ = 4096, 64, 16, 32  # a table larger than its lookups, as in every model
COLLECTIVE = re.compile(
    r"= f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
)


def compiled(sharding: NamedSharding, of_lookup: NamedSharding | None) -> tuple[jax.stages.Compiled, tuple]:
    """A program that looks tokens up and returns them sharded, and its arguments: table and tokens."""
    rng = np.random.default_rng(0)
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(VOCAB, D)), jnp.float32)}}
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SEQ)), jnp.int32)
    placed = jax.device_put(params, distributed.shardings(params, sharding.mesh, distributed.PARAM_RULES))
    module = Embedding(VOCAB, D, of_lookup)

    def read(table: jax.Array, tokens: jax.Array) -> jax.Array:
        x = module.apply({"params": table}, tokens, Numerics()).astype(jnp.float32) * 2.0
        return jax.lax.with_sharding_constraint(x, sharding)

    arguments = placed["embed"], jax.device_put(tokens, sharding)
    return jax.jit(read).lower(*arguments).compile(), arguments


def share_received(program: jax.stages.Compiled) -> float:
    """Floats that collectives put on one device, divided by those of all lookups."""
    sizes = COLLECTIVE.findall(program.as_text())
    return sum(math.prod(map(int, size.split(","))) for size in sizes) / (ROWS * SEQ * D)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 4, 1), (1, 4, 2)], ids=str)
def test_no_device_receives_more_of_a_lookup_than_a_quarter(sizes):
    sharding = NamedSharding(distributed.make_mesh(MeshConfig(*sizes)), P(BATCH_AXES))
    program, (table, tokens) = compiled(sharding, sharding)
    rows = program(table, tokens)
    np.testing.assert_array_equal(rows, 2.0 * np.asarray(table["embedding"])[np.asarray(tokens)])
    assert rows.sharding.is_equivalent_to(sharding, 3)
    assert share_received(program) <= 0.25


@pytest.mark.parametrize(("vocab", "exchanges"), [(VOCAB, True), (VOCAB + 4, False)])
def test_a_tied_head_is_gathered_by_rows_if_the_devices_can_divide_them(vocab, exchanges):
    """Parts of a table's columns, side by side, would be padded to tiles and transposed."""
    base = replace(architecture("llama-3.1-8b"), vocab_size=vocab, d_model=D, tie_embeddings=True)
    mesh = distributed.make_mesh(MeshConfig(1, 8, 1))
    objective = next_token(base, Decoder(base), ComputeConfig(), mesh)
    params = {"embed": {"embedding": jnp.arange(vocab * D, dtype=jnp.float32).reshape(vocab, D)}}
    placed = jax.device_put(params, distributed.shardings(params, mesh, distributed.PARAM_RULES))
    program = jax.jit(objective.kernel).lower(placed).compile()
    text = program.as_text()
    assert (f"f32[{vocab // 8},8]" in text and " all-to-all(" in text) == exchanges
    assert (f"= f32[{vocab},{D}]" in text and "dimensions={0}" in text) == exchanges
    np.testing.assert_array_equal(program(placed), params["embed"]["embedding"])
