"""The rules: their formulas, what all entries of the registry have in common, and their
averages."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.errors import NaloraError
from nalora_jax.method import rules, statistics, transform
from nalora_jax.method.rules import MECHANISMS, CurvatureCap, HomogeneityStep, Mechanism, make
from nalora_jax.method.transform import (
    GateState,
    Mechanisms,
    channel_factors,
    make_mechanisms,
    own_factors,
)

PATH = "layers/ffn"


def factors_of(rule: Mechanism, activation: str = "silu", **averages: np.ndarray) -> jax.Array:
    """Returns a rule's factors ``[layers, channels]`` after one step with these averages."""
    mechanisms = make_mechanisms((rule,), activation=activation)
    ((label, _),) = mechanisms.entries
    memory = {name: jnp.asarray(value, jnp.float32) for name, value in averages.items()}
    layers = len(next(iter(memory.values())))
    state = GateState({label: {PATH: memory}}, {PATH: jnp.ones(layers, jnp.int32)}, jnp.int32(1))
    return own_factors(state, mechanisms)[label][PATH]


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.integers(0, 3), min_size=11, max_size=11),  # few levels: many ties
    keep=st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
)
def test_hard_mask_keeps_exactly_the_top_share(levels, keep):
    importance = np.float32(levels)
    mask = np.asarray(rules.hard_mask(jnp.asarray(importance), keep))
    kept = max(1, round(keep * len(levels)))
    expected = np.zeros(len(levels), np.float32)
    expected[np.argsort(-importance, kind="stable")[:kept]] = 1  # ties go to the lower index
    np.testing.assert_array_equal(mask, expected)


def test_soft_mask_is_the_clipped_power_of_the_ratio_to_the_mean():
    importance = np.random.default_rng(1).uniform(size=(2, 50)) ** 2
    ratio = importance / importance.mean(-1, keepdims=True)
    mask = rules.soft_mask(jnp.asarray(importance, jnp.float32), power=2.0, low=0.1, high=3.0)
    np.testing.assert_allclose(mask, np.clip(ratio**2, 0.1, 3.0), rtol=1e-5)
    assert (mask == np.float32(0.1)).any()
    assert (mask == 3).any()
    np.testing.assert_array_equal(
        rules.soft_mask(jnp.zeros((1, 4)), 2.0, 0.1, 3.0), jnp.ones((1, 4))
    )


def test_importance_by_delta_is_a_power_of_its_second_moment():
    squared = np.random.default_rng(0).uniform(0.1, 1.0, (2, 9))
    ratio = squared / squared.mean(-1, keepdims=True)
    for q in (-1.0, 0.0, 0.5):
        found = rules.delta_importance(jnp.asarray(squared, jnp.float32), q, 1e6)
        np.testing.assert_allclose(found, ratio ** (q / 2), rtol=1e-5)
    dead = rules.delta_importance(jnp.asarray([[0.0, 1.0]]), -1.0, 10.0)
    np.testing.assert_allclose(dead, [[10.0, 0.5**0.5]], rtol=1e-5)


def shares(seed, *shape):
    return np.moveaxis(np.random.default_rng(seed).dirichlet(np.ones(4), size=shape), -1, -2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gains=st.tuples(*[st.floats(0.1, 5.0)] * 4))
def test_scale_is_the_normalised_mean_gain(seed, gains):
    occupancy = shares(seed, 3, 7)
    raw = np.einsum("lkc,k->lc", occupancy, gains)
    scale = rules.homogeneity_scale(jnp.asarray(occupancy, jnp.float32), gains)
    np.testing.assert_allclose(scale, raw / raw.mean(-1, keepdims=True), rtol=1e-5)


def test_only_layers_whose_tokens_occupy_two_regions_are_scaled():
    rule, occupancy = HomogeneityStep(warmup=0), np.zeros((2, 4, 5))
    occupancy[0, 2] = 1  # the first layer lies wholly in the expanding region
    occupancy[1] = shares(1, 5)
    scale = factors_of(rule, occupancy=occupancy)
    np.testing.assert_array_equal(scale[0], np.ones(5))
    np.testing.assert_allclose(
        scale[1:], rules.homogeneity_scale(jnp.float32(occupancy[1:]), rule.gains)
    )
    barely = np.zeros((1, 4, 5))
    barely[:, 2], barely[:, 1, 0] = 1, 0.05  # 0.05 of one channel in five is 0.01 of the layer
    assert (factors_of(rule, occupancy=barely) == 1).all()
    assert (factors_of(HomogeneityStep(warmup=0, min_occupancy=0.005), occupancy=barely) != 1).all()


@pytest.mark.parametrize("name", ["relu", "identity"])
def test_constant_without_a_meaningful_partition_and_said_once(name, caplog):
    rules._log_constant_scale.cache_clear()
    with caplog.at_level(logging.INFO, logger="nalora_jax"):
        for _ in range(3):
            scale = factors_of(HomogeneityStep(warmup=0), name, occupancy=shares(2, 2, 6))
            assert (scale == 1).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"step scale: {name} has no meaningful effective-homogeneity partition, so the scale is 1"
    ]


def test_channels_that_have_moved_have_the_same_factor_to_the_bit_as_min_of_one_and_tau_over_chi():
    rng = np.random.default_rng(0)
    excess, response = (
        jnp.asarray(10.0 ** rng.uniform(-12, 1, (4, 999)), jnp.float32) for _ in range(2)
    )
    expected = jnp.minimum(1.0, 0.1 * response / excess)
    np.testing.assert_array_equal(rules.curvature_cap(excess, response, 0.1), expected)


def test_all_gates_of_mish_take_their_second_step_without_warm_up():
    """A fresh adapter has dz = 0, and XLA may round rho(z + 0) differently from rho(z)."""
    noise = np.full((1, 64), 1e-8)
    factors = factors_of(CurvatureCap(warmup=0), "mish", excess=noise, response=0 * noise)
    np.testing.assert_array_equal(factors, np.ones((1, 64)))


# ---------------------------------------------------------------- the registry

L, F = 3, 40


def only(*names: str, **options: Any) -> Mechanisms:
    return make_mechanisms(names, activation="silu", **options)


MEASURED = (
    "slope",
    "occupancy",
    "feature",
    "selection",
    "linear",
    "excess",
    "response",
    "delta_squared",
)


def stats_like(seed: int, tokens: Any = 20.0, shape: tuple[int, ...] = (L, F)) -> dict[str, Any]:
    """Random sums of every statistic over ``tokens`` of each layer (or expert)."""
    rng, tokens = np.random.default_rng(seed), np.broadcast_to(np.float32(tokens), shape[:-1])
    sums = {"tokens": jnp.asarray(tokens), "probe_tokens": jnp.asarray(tokens)}
    for name in MEASURED:
        values = rng.uniform(0.05, 1.0, statistics.get_statistic(name).shape(shape))
        counts = tokens.reshape(tokens.shape + (1,) * (values.ndim - tokens.ndim))
        sums[name] = jnp.asarray(counts * values, jnp.float32)
    return {PATH: sums}


def state_after(mechanisms: Mechanisms, steps: int = 12, tokens: float = 20.0) -> GateState:
    state = transform.init_gate_state({PATH: (L, F)}, mechanisms)
    for seed in range(steps):
        state = transform.update_gate_state(state, stats_like(seed, tokens), mechanisms)
    return state


@pytest.mark.parametrize("name", sorted(MECHANISMS.names()))
def test_every_entry_keeps_the_contract(name: str) -> None:
    mechanisms = only(f"{name}:warmup=3", total_steps=100, seed=5)
    (label, one), *_ = mechanisms.entries
    assert (label, one.name) == (one.label or name, name)
    state = state_after(mechanisms)
    factor = jax.jit(lambda state: own_factors(state, mechanisms))(state)[label][PATH]
    assert factor.shape == (L, F)
    assert factor.dtype == jnp.float32
    assert np.isfinite(factor).all()
    assert (factor >= 0).all()
    joint = channel_factors(state, mechanisms)
    assert set(joint) == set(one.places)
    if one.reallocates:
        np.testing.assert_allclose(
            jnp.mean(joint["update_b"][PATH] ** 2, axis=-1), np.ones(L), rtol=1e-5
        )
    warm, after = (
        own_factors(state._replace(count=jnp.int32(n)), mechanisms)[label] for n in (2, 3)
    )
    assert (warm[PATH] == 1).all()
    assert (after[PATH] != 1).any()
    start = transform.init_gate_state({PATH: (L, F)}, mechanisms)._replace(count=jnp.int32(50))
    assert (own_factors(start, mechanisms)[label][PATH] == 1).all()
    again = jax.eval_shape(
        lambda s: transform.update_gate_state(s, stats_like(1), mechanisms), state
    )
    assert again == jax.eval_shape(lambda s: s, state)


def test_factors_that_reallocate_are_normalised_together_and_the_others_are_not() -> None:
    rules = ("soft:power=2,warmup=0", "homogeneity:warmup=0", "curvature_cap:tau=0.5,warmup=0")
    mechanisms = only(*rules)
    state = state_after(mechanisms)
    own = {label: np.float64(of[PATH]) for label, of in own_factors(state, mechanisms).items()}
    product = own["mask"] * own["step_scale"]
    product /= np.sqrt((product**2).mean(-1, keepdims=True))
    assert (own["curvature_cap"] < 1).any()
    factors = channel_factors(state, mechanisms)
    np.testing.assert_allclose(factors["update_b"][PATH], product * own["curvature_cap"], rtol=1e-5)
    mask = own["mask"] / np.sqrt((own["mask"] ** 2).mean(-1, keepdims=True))
    np.testing.assert_allclose(factors["gradient_a"][PATH], mask, rtol=1e-5)


def test_a_placebo_has_the_same_factors_on_other_channels() -> None:
    plain, placebo = only("squared:warmup=0"), only("squared:warmup=0,permute=4")
    (rule,) = own_factors(state_after(plain), plain).values()
    (moved,) = own_factors(state_after(placebo), placebo).values()
    np.testing.assert_array_equal(np.sort(moved[PATH], axis=-1), np.sort(rule[PATH], axis=-1))
    order = [np.argsort(np.argsort(x, axis=-1), axis=-1) for x in (moved[PATH], rule[PATH])]
    assert (order[0] != order[1]).mean() > 0.8
    # Fixed in a run, another one in a run of another seed, and another one in every layer and
    # block.
    (later,) = own_factors(state_after(placebo)._replace(count=jnp.int32(90)), placebo).values()
    np.testing.assert_array_equal(later[PATH], moved[PATH])
    other = only("squared:warmup=0,permute=4", seed=1)
    (differs,) = own_factors(state_after(other), other).values()
    assert (differs[PATH] != moved[PATH]).mean() > 0.8
    ((_, mechanism),) = placebo.entries
    orders = [mechanism.permutation((L, 64), block, 0) for block in (PATH, f"{PATH}/shared_ffn")]
    assert len({tuple(order) for order in np.concatenate(orders)}) == 2 * L
    np.testing.assert_array_equal(np.sort(orders[0], axis=-1), np.tile(np.arange(64), (L, 1)))


def test_settings_are_read_by_type_and_refused_by_name() -> None:
    one = make("homogeneity:gains=0.1/0.2/0.3/0.4,warmup=7")
    assert (one.gains, one.warmup) == ((0.1, 0.2, 0.3, 0.4), 7)
    assert make("hard:mask_gradient=false").places == ("update_b",)
    for text, message in {
        "nothing": "^--mechanisms: expected one of curvature_cap, delta.*'nothing'",
        "hard:share=1": "a setting of .*keep.*, found share=1",
        "hard:keep=half": "keep of type float, found 'half'",
        "hard:keep=2": r"mechanism hard: keep: expected a share in \(0, 1\], found 2.0",
        "delta:decay=1": "mechanism delta: decay",
        "delta:warmup=-1": "mechanism delta: warmup",
        "delta:permute=-2": "mechanism delta: permute",
        "delta:q=9": "mechanism delta: q: expected a number from -8 to 8",
        "delta:limit=0.5": "mechanism delta: limit: expected 1 or more",
        "soft:power=0": "mechanism soft: power",
        "soft:low=1": "mechanism soft: low",
        "soft:high=1": "mechanism soft: high",
        "curvature_cap:tau=0": "mechanism curvature_cap: tau",
        "homogeneity:gains=0/0/0/0": "mechanism homogeneity: gains: expected .* not all 0",
        "homogeneity:min_occupancy=0.5": "mechanism homogeneity: min_occupancy",
    }.items():
        with pytest.raises(NaloraError, match=message):
            make(text)
    entries = only("curvature_cap", "delta:q=1", "delta:q=-1", "homogeneity", "soft").entries
    assert [label for label, _ in entries] == [
        "step_scale",
        "delta",
        "delta_2",
        "homogeneity",
        "mask",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squared", "mechanism 'squared': expected a name that is free"),
        ("no name", "a name of letters"),
    ],
)
def test_names_of_rules_are_free_and_of_letters(name: str, message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        rules.register_mechanism(name, statistics=("slope",))(
            lambda averages, context: averages["slope"]
        )


def test_an_entry_point_is_loaded_when_it_is_asked_for(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(MECHANISMS, "_values", dict(MECHANISMS._values))
    (tmp_path / "my_rules.py").write_text(
        "from nalora_jax.method.rules import register_mechanism\n"
        "@register_mechanism('from_a_package', statistics=('slope',))\n"
        "def rule(averages, context):\n    return averages['slope']\n"
    )
    info = tmp_path / "my_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rules\nVersion: 1.0\n")
    (tmp_path / "my_end.py").write_text("import sys\nsys.exit(0)\n")
    points = ("from_a_package = my_rules", "absent = my_rules:nothing", "ending = my_end")
    (info / "entry_points.txt").write_text("\n".join(("[nalora_jax.mechanisms]", *points)))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "from_a_package" in MECHANISMS.names()
    assert make("from_a_package:warmup=1").warmup == 1
    with pytest.raises(
        NaloraError, match=r"entry point absent = 'my_rules:nothing'.*AttributeError"
    ):
        make("absent")
    with pytest.raises(NaloraError, match=r"entry point ending = 'my_end'.*found SystemExit: 0"):
        make("ending")


# ---------------------------------------------------------------- running averages

BOTH = make_mechanisms(("soft:power=2,decay=0.9", "homogeneity:decay=0.6"), activation="silu")


def average(state: GateState, name: str) -> jax.Array:
    label = {"slope": "mask", "occupancy": "step_scale"}[name]
    return state.memory[label][PATH][name]


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6)])
def test_averages_are_bias_corrected(shape: tuple[int, ...]) -> None:
    """By the number of updates of each layer or expert, which keeps its averages if it has no
    token."""
    state, raw = transform.init_gate_state({PATH: shape}, BOTH), {"slope": 0.0, "occupancy": 0.0}
    updates = np.zeros(shape[:-1])
    for step in range(1, 6):
        tokens = np.random.default_rng(step).integers(1, 50, size=shape[:-1])
        tokens.flat[step % tokens.size] *= step == 1  # every layer or expert has been measured once
        updates += tokens > 0
        stats = stats_like(step, tokens, shape)
        state = transform.update_gate_state(state, stats, BOTH)
        np.testing.assert_array_equal(state.updates[PATH], updates)
        for name, decay in (("slope", 0.9), ("occupancy", 0.6)):
            value = np.asarray(stats[PATH][name], np.float64)
            count, n = (
                x.reshape(x.shape + (1,) * (value.ndim - x.ndim)) for x in (tokens, updates)
            )
            moved = decay * raw[name] + (1 - decay) * value / np.maximum(count, 1)
            raw[name] = np.where(count > 0, moved, raw[name])
            np.testing.assert_allclose(average(state, name), raw[name] / (1 - decay**n), rtol=1e-5)
