from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.config import OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.method.optimizer import find_gates, nalora, scale_by_channel
from nalora_jax.train.mechanisms import make_mechanisms
from nalora_jax.train.optimizers import make_optimizer, make_schedule

L, D_MODEL, R, D_FF = 2, 6, 3, 8
GATE, BLOCK = "layers/ffn/gate_proj", "layers/ffn"
GATES = {GATE: BLOCK}
ON = make_mechanisms(RunConfig().mechanisms, activation="silu")
OFF = make_mechanisms((), activation="silu")
ADAMW = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_share=0.0, weight_decay=0.3, clip_norm=1.0
)

# The contract that every transform of this library keeps.
TRANSFORMS = {
    "after": lambda: optax.chain(optax.sgd(0.05), scale_by_channel(GATES)),
    "before": lambda: optax.chain(scale_by_channel(GATES, "gradient_b"), optax.sgd(0.05)),
    "nalora on optax": lambda: nalora(optax.adamw(0.05), GATES, ON),
    "nalora on settings": lambda: nalora(make_optimizer(ADAMW, 50, 4.0), GATES, ON),
    "nalora off": lambda: nalora(optax.adamw(0.05), GATES, OFF),
    "adafactor": lambda: nalora(
        make_optimizer(OptimizerConfig(name="adafactor", learning_rate=0.05), 50), GATES, ON
    ),
    "lion": lambda: nalora(make_optimizer(OptimizerConfig(name="lion", learning_rate=0.01), 50), GATES, ON),
}
each_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def pair(fan_in, fan_out):
        return {
            "a": jnp.asarray(rng.normal(size=(L, fan_in, R)), dtype),
            "b": jnp.asarray(rng.normal(size=(L, R, fan_out)), dtype),
        }

    gate, up, down = pair(D_MODEL, D_FF), pair(D_MODEL, D_FF), pair(D_FF, D_MODEL)
    return {"layers": {"ffn": {"gate_proj": gate, "up_proj": up, "down_proj": down}}}


def factors(seed, low=0.3, high=1.7):
    rng = np.random.default_rng(seed)
    return {BLOCK: jnp.asarray(rng.uniform(low, high, size=(L, D_FF)), jnp.float32)}


FACTOR = factors(1)
EXTRA = {"gate_factors": {"update_b": FACTOR, "gradient_b": factors(2)}}


def gate_b(tree):
    return tree["layers"]["ffn"]["gate_proj"]["b"]


def run(optimizer, params, steps, **extra):
    """The updates of every step, on gradients that do not depend on the parameters."""
    state, trace, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(random_tree(100 + step), state, params, **extra)
        params = optax.apply_updates(params, updates)
        trace.append(updates)
    return trace, params


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@each_transform
def test_unknown_extra_arguments_are_ignored(make):
    params, optimizer = random_tree(0), make()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    plain, _ = update(random_tree(9), state, params, **EXTRA)
    more, _ = update(random_tree(9), state, params, **EXTRA, value=jnp.ones(()), rest=None)
    assert_same(plain, more)


@each_transform
def test_one_compilation_and_a_stable_state(make):
    params, optimizer = random_tree(0), make()
    update = jax.jit(lambda grads, state, params, extra: optimizer.update(grads, state, params, **extra))
    state = optimizer.init(params)
    for seed in range(3):
        before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        extra = {"gate_factors": {"update_b": factors(seed), "gradient_b": factors(seed + 10)}}
        updates, state = update(random_tree(seed), state, params, extra)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert update._cache_size() == 1


@each_transform
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(make, dtype):
    params, optimizer = random_tree(0, dtype), make()
    updates, _ = jax.jit(optimizer.update)(random_tree(9, dtype), optimizer.init(params), params, **EXTRA)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@each_transform
def test_scan_and_cond(make):
    params, optimizer = random_tree(0), make()
    grads = [random_tree(100 + step) for step in range(3)]

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params, **EXTRA)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    (scanned, _), _ = jax.lax.scan(step, start, stacked)
    _, looped = run(optimizer, params, 3, **EXTRA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), scanned, looped)
    kept = jax.jit(lambda go: jax.lax.cond(go, lambda: step(start, grads[0])[0], lambda: start))(False)
    assert_same(kept, start)


@each_transform
def test_multi_steps_is_one_step_on_the_mean_gradient(make):
    params, optimizer = random_tree(0), make()
    grads = [random_tree(100), random_tree(101)]
    accumulating = optax.MultiSteps(optimizer, every_k_schedule=2)
    state, update = accumulating.init(params), jax.jit(accumulating.update)
    for part in grads:
        updates, state = update(part, state, params, **EXTRA)
    mean = jax.tree.map(lambda *xs: sum(xs) / 2, *grads)
    expected, _ = optimizer.update(mean, optimizer.init(params), params, **EXTRA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, expected)


@each_transform
def test_a_small_problem_converges(make):
    target, params, optimizer = random_tree(5), random_tree(6), make()

    def loss(params):
        return sum(
            jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True)
        )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, **EXTRA)
        return optax.apply_updates(params, updates), state

    state, start = optimizer.init(params), loss(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < 0.75 * start


def acts_after_preconditioner(optimizer, plain, **extra):
    """Whether B's first update is the plain one times the factor."""
    params = random_tree(0)
    scaled, _ = run(optimizer, params, 1, **extra)
    expected, _ = run(plain, params, 1)
    return np.allclose(
        gate_b(scaled[0]), gate_b(expected[0]) * FACTOR[BLOCK][:, None, :], rtol=1e-5, atol=1e-9
    )


def test_soft_factors_act_after_the_preconditioner():
    plain = optax.adamw(1e-2, weight_decay=0.3)
    extra = {"gate_factors": {"update_b": FACTOR, "gradient_b": FACTOR}}
    assert acts_after_preconditioner(nalora(plain, GATES, ON), plain, **extra)
    # The same factors before Adam are close to a no-op; the check must see the difference.
    wrong = optax.with_extra_args_support(optax.chain(scale_by_channel(GATES, "gradient_b"), plain))
    assert not acts_after_preconditioner(wrong, plain, **extra)


def test_factors_before_the_preconditioner_are_factors_of_the_gradient():
    chain = optax.chain(scale_by_channel(GATES, "gradient_b"), optax.sgd(1.0))
    updates, _ = run(chain, random_tree(0), 1, gate_factors={"gradient_b": FACTOR})
    plain, _ = run(optax.sgd(1.0), random_tree(0), 1)
    np.testing.assert_allclose(gate_b(updates[0]), gate_b(plain[0]) * FACTOR[BLOCK][:, None, :], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_nalora_multiplies_the_plain_update_weight_decay_included(name):
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.5)
    plain, _ = run(make_optimizer(config, 20), random_tree(0), 1)
    both, _ = run(nalora(make_optimizer(config, 20), GATES, ON), random_tree(0), 1, **EXTRA)
    np.testing.assert_allclose(gate_b(both[0]), gate_b(plain[0]) * FACTOR[BLOCK][:, None, :], rtol=1e-5)
    both[0]["layers"]["ffn"]["gate_proj"]["b"] = gate_b(plain[0])
    assert_same(both[0], plain[0])  # and nothing else changed


def test_columns_masked_out_do_not_move():
    mask = {BLOCK: jnp.asarray(np.random.default_rng(3).uniform(size=(L, D_FF)) > 0.5, jnp.float32)}
    params, optimizer = random_tree(0), nalora(make_optimizer(ADAMW, 10), GATES, ON)
    _, trained = run(optimizer, params, 5, gate_factors={"update_b": mask})
    moved = (gate_b(trained) != gate_b(params)).any(axis=1)
    np.testing.assert_array_equal(moved, mask[BLOCK] > 0)


def test_the_magnitude_of_a_column_follows_its_factor():
    params = random_tree(0)
    params["layers"]["ffn"]["gate_proj"]["magnitude"] = jnp.ones((L, D_FF))
    params["layers"]["ffn"]["up_proj"]["magnitude"] = jnp.ones((L, D_FF))
    mask = {BLOCK: jnp.asarray(np.random.default_rng(3).uniform(size=(L, D_FF)) > 0.5, jnp.float32)}
    optimizer = nalora(optax.adamw(1e-2), GATES, ON)
    updates, _ = optimizer.update(params, optimizer.init(params), params, gate_factors={"update_b": mask})
    moved = updates["layers"]["ffn"]["gate_proj"]["magnitude"] != 0
    np.testing.assert_array_equal(moved, mask[BLOCK] > 0)
    assert (updates["layers"]["ffn"]["up_proj"]["magnitude"] != 0).all()


def test_both_off_is_the_plain_chain_to_the_bit():
    params = random_tree(0)
    plain, off = make_optimizer(ADAMW, 20), nalora(make_optimizer(ADAMW, 20), GATES, OFF)
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(off.init(params))
    for left, right in zip(run(plain, params, 4)[0], run(off, params, 4, **EXTRA)[0], strict=True):
        assert_same(left, right)
    by_hand = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.3))
    for left, right in zip(run(by_hand, params, 4)[0], run(plain, params, 4)[0], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right)


def test_factors_of_one_change_nothing():
    ones = {BLOCK: jnp.ones((L, D_FF))}
    plain, _ = run(make_optimizer(ADAMW, 20), random_tree(0), 3)
    on, _ = run(
        nalora(make_optimizer(ADAMW, 20), GATES, ON), random_tree(0), 3, gate_factors={"update_b": ones}
    )
    assert_same(plain, on)


def test_a_user_s_own_tree_and_names():
    params = {"block": {"w1": {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 5))}}}
    optimizer = optax.chain(optax.sgd(1.0), scale_by_channel({"block/w1": "mine"}, leaf="lora_B"))
    mask = jnp.array([0.0, 0.5, 1.0, 2.0, 0.0])
    updates, _ = optimizer.update(
        params, optimizer.init(params), params, gate_factors={"update_b": {"mine": mask}}
    )
    np.testing.assert_allclose(updates["block"]["w1"]["lora_B"], -jnp.broadcast_to(mask, (2, 5)))
    np.testing.assert_allclose(updates["block"]["w1"]["lora_A"], -jnp.ones((4, 2)))


def test_gates_are_those_of_the_tree():
    assert find_gates(random_tree(0)) == GATES
    with pytest.raises(NaloraError, match="gates: expected a parameter layers/mlp/gate_proj/b"):
        nalora(optax.sgd(1.0), {"layers/mlp/gate_proj": BLOCK}, ON).init(random_tree(0))


def test_what_is_missing_is_named():
    optimizer = nalora(optax.sgd(1.0), GATES, ON)
    with pytest.raises(NaloraError, match="gate_factors"):
        optimizer.update(random_tree(0), optimizer.init(random_tree(0)))
    with pytest.raises(NaloraError, match="adamw, adam, sgd"):
        make_optimizer(OptimizerConfig(name="adagrad", learning_rate=1e-3), 10)
    with pytest.raises(NaloraError, match="use adamw"):
        make_optimizer(OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.1), 10)
    with pytest.raises(NaloraError, match="cosine"):
        make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="step"), 10)


def test_lora_plus_trains_b_at_its_own_rate():
    plain, _ = run(make_optimizer(ADAMW, 20), random_tree(0), 1)
    plus, _ = run(make_optimizer(ADAMW, 20, plus_ratio=8.0), random_tree(0), 1)
    for name in ("gate_proj", "up_proj", "down_proj"):
        before, after = plain[0]["layers"]["ffn"][name], plus[0]["layers"]["ffn"][name]
        np.testing.assert_array_equal(after["a"], before["a"])
        np.testing.assert_allclose(after["b"], 8 * before["b"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_weight_decay_is_decoupled_and_follows_the_learning_rate(name):
    config = OptimizerConfig(
        name=name, learning_rate=2e-2, warmup_share=0.0, weight_decay=0.25, clip_norm=0.0
    )
    without = OptimizerConfig(name=name, learning_rate=2e-2, warmup_share=0.0, clip_norm=0.0)
    params = random_tree(0)
    decayed, plain = (run(make_optimizer(c, 20), params, 1)[0][0] for c in (config, without))
    expected = jax.tree.map(lambda update, p: update - 2e-2 * 0.25 * p, plain, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), decayed, expected)


def test_clipping_bounds_the_gradient():
    grads = random_tree(7)
    optimizer = make_optimizer(
        OptimizerConfig(name="sgd", learning_rate=1.0, warmup_share=0.0, clip_norm=0.5), 10
    )
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert norm(updates) == pytest.approx(0.5, rel=1e-5)
    free = make_optimizer(
        OptimizerConfig(name="sgd", learning_rate=1.0, warmup_share=0.0, clip_norm=0.0), 10
    )
    updates, _ = free.update(grads, free.init(grads), grads)
    assert norm(updates) == pytest.approx(norm(grads), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind):
    config = OptimizerConfig(learning_rate=0.2, schedule=kind, warmup_share=0.1, final_ratio=0.25)
    rate = np.array([float(make_schedule(config, 100)(step)) for step in range(101)])
    np.testing.assert_allclose(rate[:11], 0.2 * np.arange(1, 12) / 11, rtol=1e-5)
    share = np.linspace(0, 1, 91)
    decay = {"cosine": 0.5 * (1 + np.cos(np.pi * share)), "linear": 1 - share, "constant": np.ones(91)}[
        kind
    ]
    np.testing.assert_allclose(rate[10:], 0.2 * (0.25 + 0.75 * decay), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_train_at_the_peak_rate(steps):
    rate = make_schedule(OptimizerConfig(learning_rate=0.2, warmup_share=1.0), steps)
    assert float(rate(steps - 1)) == pytest.approx(0.2)
