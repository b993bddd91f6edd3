"""The cap on steps of channels whose adapter has left the linear range."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from nalora_jax.method import activations
from nalora_jax.method.rules import CurvatureCap, curvature_cap
from nalora_jax.method.transform import GateState, make_mechanisms, own_factors

PATH = "layers/ffn"


def test_channels_that_have_moved_have_the_same_factor_to_the_bit_as_min_of_one_and_tau_over_chi() -> None:
    rng = np.random.default_rng(0)
    excess, response = (jnp.asarray(10.0 ** rng.uniform(-12, 1, (4, 999)), jnp.float32) for _ in range(2))
    expected = jnp.minimum(1.0, 0.1 * response / excess)
    np.testing.assert_array_equal(curvature_cap(excess, response, 0.1), expected)


def test_all_gates_of_mish_take_their_second_step_without_warm_up() -> None:
    """A fresh adapter has dz = 0, and XLA may round rho(z + 0) differently from rho(z)."""
    z = jnp.linspace(-4, 4, 64)
    rho = activations.get("mish").rho(z)
    noise = jnp.abs(
        (jnp.nextafter(rho, jnp.float32(2)) - rho) * z
    )  # X = (rho(z + dz) - rho(z)) z at dz = 0
    assert (noise > 0).any()
    memory = {"step_scale": {PATH: {"excess": noise[None], "response": jnp.zeros((1, 64))}}}
    state = GateState(memory, {PATH: jnp.array([1], jnp.int32)}, jnp.int32(1))
    factors = own_factors(state, make_mechanisms((CurvatureCap(warmup=0),), activation="mish"))
    np.testing.assert_array_equal(factors["step_scale"][PATH], np.ones((1, 64)))
