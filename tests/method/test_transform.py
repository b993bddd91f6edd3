"""The transform: the contract of optax, averages in its state, factors after the preconditioner."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.assembly.optimizers import make_optimizer, make_schedule
from nalora_jax.config import OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.transform import make_mechanisms, masks, nalora, scale_by_gates

L, D_MODEL, R, D_FF = 2, 6, 3, 8
GATE, BLOCK = "layers/ffn/gate_proj", "layers/ffn"
GATES = {GATE: BLOCK}
ON = make_mechanisms(RunConfig().mechanisms, activation="silu")
ADAMW = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_share=0.0, weight_decay=0.3, clip_norm=1.0
)
TRANSFORMS = {
    "chain": lambda: optax.chain(optax.sgd(0.05), scale_by_gates(ON, GATES)),
    "nalora on settings": lambda: nalora(make_optimizer(ADAMW, 50, 4.0), ON, GATES),
}


def random_tree(seed):
    rng = np.random.default_rng(seed)

    def pair(fan_in, fan_out):
        shapes = {"a": (L, fan_in, R), "b": (L, R, fan_out)}
        return {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
        }

    gate, up, down = pair(D_MODEL, D_FF), pair(D_MODEL, D_FF), pair(D_FF, D_MODEL)
    return {"layers": {"ffn": {"gate_proj": gate, "up_proj": up, "down_proj": down}}}


def stats(seed, tokens=5.0):
    rng = np.random.default_rng(seed)
    shapes = {
        name: statistics.get_statistic(name).shape((L, D_FF))
        for name in ("slope", "excess", "response")
    }
    sums = {
        name: jnp.asarray(rng.uniform(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    return {BLOCK: sums | {"tokens": jnp.full(L, tokens), "probe_tokens": jnp.full(L, tokens)}}


EXTRA = {"gate_stats": stats(2)}


def gate_b(tree):
    return tree["layers"]["ffn"]["gate_proj"]["b"]


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_compiled_step_keeps_its_state_and_multi_steps_is_one_step_on_the_mean_gradient(make):
    params, optimizer = random_tree(0), make()
    grads = [random_tree(100), random_tree(101)]
    accumulating = optax.MultiSteps(optimizer, every_k_schedule=2)
    state, update = accumulating.init(params), jax.jit(accumulating.update)
    for part in grads:
        updates, state = update(part, state, params, **EXTRA)
    assert update._cache_size() == 1
    mean = jax.tree.map(lambda *xs: sum(xs) / 2, *grads)
    expected, _ = jax.jit(optimizer.update)(mean, optimizer.init(params), params, **EXTRA)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, expected
    )


def test_columns_masked_out_keep_length_and_direction():
    """Of B and of DoRA's magnitude; other layers train."""
    params = random_tree(0)
    for name in ("gate_proj", "up_proj"):
        params["layers"]["ffn"][name]["magnitude"] = jnp.ones((L, D_FF))
    rules = make_mechanisms(("hard:warmup=0,keep=0.5",), activation="silu")
    optimizer = nalora(optax.adamw(1e-2), rules, GATES)
    state = optimizer.update(params, optimizer.init(params), params, gate_stats=stats(3))[1]
    kept = masks(state, rules)[BLOCK] > 0
    updates, _ = optimizer.update(params, state, params, gate_stats=stats(4))
    np.testing.assert_array_equal((gate_b(updates) != 0).any(axis=1), kept)
    moved = updates["layers"]["ffn"]
    np.testing.assert_array_equal(moved["gate_proj"]["magnitude"] != 0, kept)
    assert (moved["up_proj"]["magnitude"] != 0).all()
    assert 0 < kept.sum() < kept.size


def test_gates_are_those_of_the_tree():
    assert find_gates(random_tree(0)) == GATES
    assert find_gates({"vision": {"in_proj": {"b": 0}}, "q_proj": {"b": 0}}) == {
        "vision/in_proj": "vision"
    }
    with pytest.raises(
        NaloraError,
        match=r"gates: expected a parameter layers/mlp/gate_proj/b, found .*down_proj/b",
    ):
        nalora(optax.sgd(1.0), ON, {"layers/mlp/gate_proj": BLOCK}).init(random_tree(0))


def test_what_is_missing_is_named():
    optimizer = nalora(optax.sgd(1.0), ON, GATES)
    state = optimizer.init(random_tree(0))
    few = {BLOCK: {name: stats(0)[BLOCK][name] for name in ("slope", "tokens", "probe_tokens")}}
    for given, message in (
        ({}, "gate_stats=.*: expected the statistics of layers/ffn"),
        (
            {"gate_stats": few},
            "gate_stats: expected a leaf layers/ffn/excess.*measure with the rules",
        ),
    ):
        with pytest.raises(NaloraError, match=message):
            optimizer.update(random_tree(0), state, **given)
    for settings, message in (
        ({"name": "adagrad"}, "adamw, adam, sgd"),
        ({"name": "adam", "weight_decay": 0.1}, "use adamw"),
        ({"schedule": "step"}, "cosine"),
    ):
        with pytest.raises(NaloraError, match=message):
            make_optimizer(OptimizerConfig(learning_rate=1e-3, **settings), 10)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_weight_decay_is_decoupled_and_follows_the_learning_rate(name):
    without = OptimizerConfig(name=name, learning_rate=2e-2, warmup_share=0.0, clip_norm=0.0)
    config = replace(without, weight_decay=0.25)
    params = random_tree(0)
    optimizers = (make_optimizer(settings, 20) for settings in (config, without))
    decayed, plain = (of.update(random_tree(100), of.init(params), params)[0] for of in optimizers)
    expected = jax.tree.map(lambda update, p: update - 2e-2 * 0.25 * p, plain, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), decayed, expected
    )


def test_clipping_bounds_the_gradient():
    grads = random_tree(7)
    for clip, expected in ((0.5, 0.5), (0.0, float(optax.tree.norm(grads)))):
        config = OptimizerConfig(name="sgd", learning_rate=1.0, warmup_share=0.0, clip_norm=clip)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        assert float(optax.tree.norm(updates)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind):
    config = OptimizerConfig(learning_rate=0.2, schedule=kind, warmup_share=0.1, final_ratio=0.25)
    rate = np.array([float(make_schedule(config, 100)(step)) for step in range(101)])
    np.testing.assert_allclose(rate[:11], 0.2 * np.arange(1, 12) / 11, rtol=1e-5)
    share = np.linspace(0, 1, 91)
    decay = {
        "cosine": 0.5 * (1 + np.cos(np.pi * share)),
        "linear": 1 - share,
        "constant": np.ones(91),
    }
    np.testing.assert_allclose(rate[10:], 0.2 * (0.25 + 0.75 * decay[kind]), rtol=1e-5)


@pytest.mark.parametrize(("steps", "expected"), [(0, 10), (7, 7), (200, 99)])
def test_the_rate_peaks_after_the_steps_of_the_warmup(steps, expected):
    config = OptimizerConfig(learning_rate=0.2, warmup_share=0.095, warmup_steps=steps)
    rate = [float(make_schedule(config, 100)(step)) for step in range(100)]
    assert int(np.argmax(rate)) == expected
    assert max(rate) == pytest.approx(0.2)
