"""The rules of studies/new_rules, against NumPy in float64; their controls only permute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common import imports
from nalora_jax.method import activations, ffn, statistics
from nalora_jax.method.low_rank import Adapter, Dense
from nalora_jax.method.measurement import GateStatsConfig, Measurement
from nalora_jax.method.rules import MECHANISMS
from nalora_jax.method.transform import (
    init_gate_state,
    make_mechanisms,
    own_factors,
    scale_by_gates,
    update_gate_state,
)
from nalora_jax.ops import dispatch
from nalora_jax.ops.dispatch import Numerics, Platform

STUDIES = Path(__file__).parents[2] / "studies"
BLOCK, GATES, LAYERS, RANK, CHANNELS = "layers/ffn", {"gate": "layers/ffn"}, 3, 4, 48
CPU = Numerics(platform=Platform("cpu"))


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of feature_gradient.py; the names of the three files are registered for one
    test."""
    dispatch.register_all()
    registered = {
        "_IMPORTED": imports,
        "IMPLEMENTATIONS": dispatch,
        "implementations": ffn.gated_mlp,
    }
    for name, owner in (
        *registered.items(),
        ("_values", MECHANISMS),
        ("_values", statistics.TABLE),
    ):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    for name in ("agreement", "feature_gradient", "two_regions"):
        imports.import_file(str(STUDIES / f"{name}.py"))
    return ffn.gated_mlp.implementations["feature_gradient"].__globals__


@pytest.fixture
def step() -> tuple[np.ndarray, np.ndarray]:
    """An update of B, and the shares of the four regions."""
    rng = np.random.default_rng(0)
    update = rng.standard_normal((LAYERS, RANK, CHANNELS)) * rng.uniform(
        0.1, 2, (LAYERS, 1, CHANNELS)
    )
    occupancy = rng.dirichlet(np.ones(4), (LAYERS, CHANNELS)).swapaxes(1, 2)
    return update.astype(np.float32), occupancy


def stepped(rule: str, updates: np.ndarray, occupancy: np.ndarray) -> tuple[Any, np.ndarray]:
    """The factors after a step of these statistics, and the second update of B."""
    mechanisms = make_mechanisms((rule,), activation="silu")
    sums = {"tokens": jnp.full(LAYERS, 10.0), "slope": jnp.ones((LAYERS, CHANNELS))}
    sums["occupancy"] = jnp.asarray(10 * occupancy, jnp.float32)
    state = init_gate_state({BLOCK: (LAYERS, CHANNELS)}, mechanisms)
    state = update_gate_state(state, {BLOCK: sums}, mechanisms)
    transform = scale_by_gates(mechanisms, GATES)
    scaled, _ = transform.update(
        {"gate": {"b": jnp.asarray(updates)}}, state, gate_stats={BLOCK: sums}
    )
    return own_factors(state, mechanisms), np.asarray(scaled["gate"]["b"])


def test_agreement_is_the_column_of_adams_ratio_over_its_layers_mean(rules, step) -> None:
    update, occupancy = step
    _, scaled = stepped("agreement:warmup=0", update, occupancy)
    exact = update.astype(np.float64)
    importance = np.sqrt((exact**2).mean(1))
    want = exact * (importance / importance.mean(-1, keepdims=True))[:, None]
    want *= np.sqrt((exact**2).sum((1, 2)) / (want**2).sum((1, 2)))[:, None, None]
    np.testing.assert_allclose(scaled, want, rtol=1e-5)


def test_two_regions_weigh_the_sides_of_zero(rules, step) -> None:
    factors, _ = stepped("two_regions:warmup=0", *step)
    below = step[1][:, :2].sum(1)
    np.testing.assert_allclose(factors["two_regions"][BLOCK], 0.5 * below + (1 - below), rtol=1e-5)
    z = np.linspace(-5, 5, 101)
    sides = activations.regions(jnp.asarray(z), activations.partition("silu"))
    np.testing.assert_array_equal(np.asarray(sides[0]) | np.asarray(sides[1]), z < 0)


@pytest.mark.parametrize("name", ["agreement", "two_regions"])
def test_a_control_only_permutes(rules, step, name) -> None:
    update, _ = step
    both = [stepped(f"{name}:warmup=0{more}", *step)[1] / update for more in ("", ",permute=3")]
    assert (np.abs(both[0] - both[1]) > 1e-3).mean() > 0.8
    ratios = [np.sort(factors[:, 0], axis=-1) for factors in both]
    np.testing.assert_allclose(*[each / each.mean(-1, keepdims=True) for each in ratios], rtol=1e-4)
    for factors in both if name == "agreement" else ():
        norms = [np.linalg.norm(each, axis=(1, 2)) for each in (update, factors * update)]
        np.testing.assert_allclose(*norms, rtol=1e-5)


TOKENS, D_MODEL = 10, 12


def block(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """x, the kernels of gate, up and down, and A and B."""
    into, shapes = (D_MODEL, CHANNELS), ((CHANNELS, D_MODEL), (D_MODEL, RANK), (RANK, CHANNELS))
    x = rng.standard_normal((1, TOKENS, D_MODEL))
    return (x, *(rng.standard_normal(shape) / np.sqrt(shape[0]) for shape in (into, into, *shapes)))


def gradients(rule: str, arrays: tuple[np.ndarray, ...]) -> tuple[Any, Any]:
    """The block's output and the gradients of x, A and B of its sum of squares."""
    x, gate, up, down, a, b = (jnp.asarray(array, jnp.float32) for array in arrays)
    taps = statistics.taps(
        dict.fromkeys((*statistics.STANDARD, *([rule] if rule else []))), (CHANNELS,)
    )
    silu, measured = (
        activations.get_activation("silu"),
        Measurement(jnp.ones((1, TOKENS)), GateStatsConfig(), taps),
    )

    def loss(x, a, b):
        layer = Dense(gate, Adapter(a, b, jnp.float32(0.5)))
        y, _ = ffn.gated_mlp(x, layer, Dense(up), Dense(down), silu, CPU, measured)
        return jnp.sum(y**2), y

    (_, y), of = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, a, b)
    return y, of


def reference(
    keep: float, arrays: tuple[np.ndarray, ...], order: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The gradients of A and B by NumPy, with the factor's channels in an order."""
    (x,), gate, up, down, a, b = arrays
    z = x @ gate + 0.5 * x @ a @ b
    rho = 1 / (1 + np.exp(-z))
    drho = rho * (1 - rho)
    slope = rho + z * drho
    factor = np.clip((rho + keep * z * drho) / slope, -10, 10)[:, order]
    of_z = 2 * ((z * rho) * (x @ up)) @ down @ down.T * (x @ up) * slope * factor
    return 0.5 * x.T @ of_z @ b.T, 0.5 * (x @ a).T @ of_z


@pytest.mark.parametrize("rule", ["", "_half_permuted"])
def test_the_adapter_of_a_gate_follows_the_feature(rules, rule) -> None:
    arrays = block(np.random.default_rng(2))
    y, (of_x, *ours) = gradients(f"feature_gradient{rule}", arrays)
    plain_y, (plain_x, plain_a, _) = gradients("", arrays)
    np.testing.assert_array_equal(y, plain_y)
    np.testing.assert_allclose(
        of_x, plain_x, rtol=1e-4, atol=1e-4
    )  # exact, also for the layers below
    order = rules["permutation"](CHANNELS) if rule else np.arange(CHANNELS)
    np.testing.assert_array_equal(np.sort(order), np.arange(CHANNELS))
    want = reference(0.5 if rule else 0.0, arrays, order)
    for actual, expected in zip(ours, want, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    assert np.linalg.norm(ours[0] - plain_a) > 0.05 * np.linalg.norm(plain_a)
