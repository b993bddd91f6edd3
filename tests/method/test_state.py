from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.method.transform import init_gate_state, make_mechanisms, update_gate_state

BOTH = make_mechanisms(("soft:power=2,decay=0.9", "homogeneity:decay=0.6"), activation="silu")


def start(shapes, mechanisms=BOTH):
    return init_gate_state(shapes, mechanisms)


def importance(state, path="layers/ffn"):
    return state.memory["mask"][path]["slope"]


def occupancy(state, path="layers/ffn"):
    return state.memory["step_scale"][path]["occupancy"]


def draw_stats(rng, shape, tokens=None):
    tokens = rng.integers(1, 50, size=shape[:-1]) if tokens is None else np.asarray(tokens)
    slope = rng.uniform(size=shape) * tokens[..., None]
    occupancy = rng.dirichlet(np.ones(4), size=shape) * tokens[..., None, None]
    values = {"tokens": tokens, "slope": slope, "occupancy": np.moveaxis(occupancy, -1, -2)}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def advance(state, stats):
    return update_gate_state(state, stats, BOTH)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 4, 6)])
def test_averages_are_bias_corrected(shape):
    rng = np.random.default_rng(0)
    state = start({"layers/ffn": shape})
    raw = {"slope": 0.0, "occupancy": 0.0}
    for n in range(1, 6):
        stats = draw_stats(rng, shape)
        state = advance(state, {"layers": {"ffn": stats}})
        tokens = np.asarray(stats["tokens"], np.float64)
        for name, decay in (("slope", 0.9), ("occupancy", 0.6)):
            value = np.asarray(stats[name], np.float64)
            mean = value / tokens.reshape(tokens.shape + (1,) * (value.ndim - tokens.ndim))
            raw[name] = decay * raw[name] + (1 - decay) * mean
            got = {"slope": importance, "occupancy": occupancy}[name](state)
            np.testing.assert_allclose(got, raw[name] / (1 - decay**n), rtol=1e-5)
        assert int(state.count) == n


def test_experts_without_tokens_keep_their_averages():
    rng, path = np.random.default_rng(2), "layers/ffn"
    state = start({path: (1, 2, 4)})
    busy, idle = draw_stats(rng, (1, 2, 4)), draw_stats(rng, (1, 2, 4), tokens=[[7, 0]])
    first = advance(state, {path: busy})
    second = advance(first, {path: idle})
    np.testing.assert_array_equal(second.updates[path], [[2, 1]])
    np.testing.assert_array_equal(importance(second)[0, 1], importance(first)[0, 1])
    np.testing.assert_array_equal(occupancy(second)[0, 1], occupancy(first)[0, 1])
    assert (importance(second)[0, 0] != importance(first)[0, 0]).all()
    # The pause does not enter the bias correction: the next update weighs as a second one.
    third = advance(second, {path: busy})
    again = advance(first, {path: busy})
    np.testing.assert_allclose(importance(third)[0, 1], importance(again)[0, 1], rtol=1e-6)
