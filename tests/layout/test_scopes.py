"""Work of named parts, against compiled programs of which the other parts are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.layout.accounting import Program
from nalora_jax.layout.scopes import Work, work_of, works
from nalora_jax.ops.delta_rule import CHUNK, DeltaInputs, gated_delta_rule

ROWS, CHUNKS, HEADS, WIDTH, D = 2, 3, 2, 16, 40


def loss(kernel: jax.Array, heads: DeltaInputs) -> jax.Array:
    """Returns a sum over outputs of the rule, whose values come from one matmul."""
    values = (heads.v.reshape(ROWS, CHUNKS * CHUNK, D) @ kernel).reshape(heads.q.shape)[..., None, :]
    out, _ = gated_delta_rule(heads._replace(v=values), jnp.ones((1, CHUNKS * CHUNK), jnp.int32))
    return jnp.sum(out)


@pytest.fixture(scope="module")
def program() -> Program:
    keys, rates = jnp.ones((ROWS, CHUNKS * CHUNK, HEADS, WIDTH)), jnp.ones((ROWS, CHUNKS * CHUNK, HEADS, 1))
    heads = DeltaInputs(keys, keys, jnp.ones((ROWS, CHUNKS * CHUNK, D)), -rates, rates)
    step = jax.jit(jax.value_and_grad(loss))
    return Program(step.lower(jnp.ones((D, HEADS * WIDTH)), heads).compile().as_text())


def test_a_scope_has_all_work_but_that_of_other_matmuls(program):
    rule = work_of(program, "delta_rule")
    others = 2 * 2.0 * ROWS * CHUNKS * CHUNK * D * HEADS * WIDTH  # the matmul and its kernel's gradient
    assert 0 < rule.flops == program.flops - others
    arrays = 4.0 * ROWS * CHUNKS * CHUNK * HEADS * WIDTH
    assert 3 * arrays < rule.memory_bytes < program.memory_bytes - arrays


def test_a_program_without_a_scope_has_no_entry(program):
    assert work_of(program, "no_such_scope") == Work(0.0, 0.0)
    assert set(works(program)) == {"delta_rule"}
    assert (
        works(Program(jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).compile().as_text())) == {}
    )
