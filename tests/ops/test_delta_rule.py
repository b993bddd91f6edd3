"""The gated delta rule against transformers: values, gradients, packed segments, padding,
memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from nalora_jax.ops.delta_rule import CHUNK_TOKENS, DeltaInputs, gated_delta_rule, solve_unit
from nalora_jax.ops.dispatch import Numerics, Platform

PLAIN, ON_CPU = Numerics(), Numerics(platform=Platform("cpu"))
BATCH, GROUPS, N, D_K, D_V = 2, 2, 2, 8, 4
RULE = jax.jit(gated_delta_rule)
LENGTHS = (90, 3, 61)  # segments of a packed row: longer than a chunk, within one, over its end


def random_inputs(seq: int, seed: int = 0) -> DeltaInputs:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=(BATCH, seq, GROUPS, *shape)).astype(np.float32)  # noqa: E731
    # Of one head nothing is left after a chunk, of the other half.
    rates = np.array([0.2, 0.006], np.float32)
    decay, beta = -rates * np.exp(draw(N)), 1 / (1 + np.exp(-draw(N)))
    return DeltaInputs(draw(D_K), draw(D_K), draw(N, D_V), decay, beta)


def theirs(rule, inputs: DeltaInputs, state=None):
    """Outputs and state of transformers, which has one axis of value heads."""
    q, k, v, g, beta = (torch.as_tensor(np.asarray(x)).requires_grad_() for x in inputs)
    flat = lambda x: x.reshape(*x.shape[:2], GROUPS * N, *x.shape[4:])  # noqa: E731
    if state is not None:
        state = torch.tensor(np.asarray(state)).reshape(BATCH, GROUPS * N, D_K, D_V)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "initial_state": state}
    out, state = rule(q, k, flat(v), g=flat(g), beta=flat(beta), **options)
    return (q, k, v, g, beta), out.reshape(*v.shape), state.reshape(BATCH, GROUPS, N, D_K, D_V)


def close(ours, expected, scale=1e-5):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=scale * np.abs(expected).max())


@pytest.mark.parametrize("seq", [1, 2 * CHUNK_TOKENS + 9])
def test_outputs_and_state_equal_the_recurrence(seq):
    ours_state = None
    for inputs in (random_inputs(7), random_inputs(seq, 1)):
        _, expected, state = theirs(torch_recurrent_gated_delta_rule, inputs, ours_state)
        ours, ours_state = RULE(inputs, np.ones((1, inputs.q.shape[1]), np.int32), ours_state)
        close(ours, expected)
        close(ours_state, state)


@pytest.mark.parametrize("numerics", [PLAIN, ON_CPU], ids=["plain", "cpu"])
def test_packed_segments_and_their_gradients_equal_separate_rows(numerics):
    seq = sum(LENGTHS) + 4
    segments = np.repeat([0, 1, 2, 3, 0], [1, *LENGTHS, 3])[None].repeat(BATCH, axis=0)
    inputs, weights = random_inputs(seq), random_inputs(seq, 1).v

    def loss(inputs):
        out, state = gated_delta_rule(inputs, segments, numerics=numerics)
        return jnp.sum(jnp.where((segments > 0)[..., None, None, None], out * weights, 0.0)), (
            out,
            state,
        )

    gradient, (out, state) = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    start = 1
    for length in LENGTHS:
        place = slice(start, start + length)
        alone = DeltaInputs(*(x[:, place] for x in inputs))
        leaves, expected, last = theirs(torch_chunk_gated_delta_rule, alone)
        (expected * torch.as_tensor(weights[:, place])).sum().backward()
        close(out[:, place], expected)
        for mine, leaf in zip(gradient, leaves, strict=True):
            close(mine[:, place], leaf.grad, 2e-5)
        start += length
    close(state, last)
    for mine in gradient:
        assert not np.asarray(mine)[segments == 0].any()


def test_padding_leaves_the_state_unchanged():
    inputs, real = random_inputs(8), np.array([[0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0, 0]])
    _, state = RULE(inputs, real)
    for row in range(BATCH):
        alone = DeltaInputs(*(x[row : row + 1, real[row] > 0] for x in inputs))
        _, expected = RULE(alone, np.ones((1, 3), np.int32))
        np.testing.assert_allclose(state[row], expected[0], rtol=1e-5, atol=1e-6)
    _, after = RULE(inputs, np.zeros((1, 8), np.int32), state)
    np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("numerics", [PLAIN, ON_CPU], ids=["plain", "cpu"])
def test_triangular_systems_of_equal_keys_are_solved_exactly(numerics):
    # Powers of this matrix reach 1e17; its inverse is 1 on the diagonal and -1 below it.
    solve = jax.jit(solve_unit, static_argnums=2)
    solution = solve(
        np.tril(np.ones((CHUNK_TOKENS, CHUNK_TOKENS), np.float32), -1),
        np.ones((CHUNK_TOKENS, 1), np.float32),
        numerics,
    )
    np.testing.assert_array_equal(solution[:, 0], np.arange(CHUNK_TOKENS) == 0)
    rng = np.random.default_rng(0)
    system = np.tril(rng.normal(size=(3, CHUNK_TOKENS, CHUNK_TOKENS)) / 4, -1).astype(np.float32)
    target = rng.normal(size=(3, CHUNK_TOKENS, 5)).astype(np.float32)
    exact = np.linalg.solve(np.eye(CHUNK_TOKENS) + system.astype(float), target.astype(float))
    np.testing.assert_allclose(
        solve(system, target, numerics), exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max()
    )


def test_training_saves_one_state_per_chunk():
    def temporary(seq: int) -> float:
        """Returns the bytes of temporary memory of a gradient, in states of one head."""
        shapes = (64,), (64,), (1, 64), (1,), (1,)
        inputs = DeltaInputs(
            *(jax.ShapeDtypeStruct((1, seq, 1, *shape), "float32") for shape in shapes)
        )
        loss = lambda x: jnp.sum(jnp.square(gated_delta_rule(x, jnp.ones((1, seq), jnp.int32))[0]))  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (64 * 64 * 4)

    more = (temporary(32 * CHUNK_TOKENS) - temporary(16 * CHUNK_TOKENS)) / 16
    # A chunk's q, k, v, output and their gradients are as large as a state each; a state per token
    # would be 64 of them.
    assert 1 <= more < 16
