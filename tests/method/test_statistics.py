from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nalora_jax.assembly.mechanisms import layer_means
from nalora_jax.method import activations, statistics
from nalora_jax.ops import reductions

NAMES = ("silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "relu", "relu2", "identity")
SILU, PARTITION = activations.get_activation("silu"), activations.partition("silu")
WIDE = st.floats(-1e4, 1e4, width=32)


channel_statistics = jax.jit(statistics.channel_statistics, static_argnums=(2, 3))
probe_statistics = jax.jit(statistics.probe_statistics, static_argnums=(3, 4))


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


@settings(max_examples=40, deadline=None)
@given(
    z=st.lists(WIDE, min_size=4, max_size=4),
    dz=st.lists(WIDE | st.floats(-1, 1, width=32), min_size=4, max_size=4),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_gate_compensation_identity(z, dz, name, dtype):
    activation = activations.get_activation(name)
    z, dz = jnp.array(z, dtype), jnp.array(dz, dtype)
    feature, moved = statistics.gate_decomposition(z, dz, activation)
    before, after = activation.phi(z), activation.phi(z + dz)
    # Every product and sum above is rounded once, relative to its own size.
    terms = feature, moved, before, after, activation.rho(z) * z
    size = sum(jnp.abs(x).astype(jnp.float32) for x in terms)
    error = jnp.abs((feature + moved).astype(jnp.float32) - (after - before).astype(jnp.float32))
    assert (error <= 8 * float(jnp.finfo(dtype).eps) * size + 1e-30).all()
    assert feature.dtype == moved.dtype == dtype


def test_misalignment_of_a_normal_gate():
    # Design: 0.275 in the limit, 0.297 at dz of deviation 0.3, for SiLU with z ~ N(0, 1) and an
    # independent dz.
    z, dz = normal(4, 400_000, 1), normal(5, 400_000, 1, scale=0.3)
    sums = probe_statistics(z, dz, jnp.ones(400_000, bool), SILU)
    for name, value in (("misalignment", 0.297), ("limit", 0.275)):
        assert float(statistics.ratio(name, sums)[0]) == pytest.approx(value, abs=0.002)


def test_cut_points_belong_to_the_region_above():
    z = jnp.float32([[PARTITION.z0], [0.0], [-0.0], [PARTITION.z1], [-1e4], [1e4]])
    for weights in (jnp.ones(6, bool), jnp.ones(6)):
        stats = channel_statistics(z, weights, SILU, PARTITION)
        np.testing.assert_array_equal(stats["occupancy"][:, 0], [1, 1, 2, 2])


def test_cotangents_are_those_of_the_mean_loss():
    delta, weights, names = normal(22, 12, 4), jnp.ones(12), ("delta", "delta_squared")
    of_sum = statistics.cotangent_statistics(delta, weights, names)
    of_mean = statistics.cotangent_statistics(delta / 5, weights, names)
    for name, got in statistics.scale_to_targets(of_sum, jnp.float32(5)).items():
        np.testing.assert_allclose(got, of_mean[name], rtol=1e-6)


def test_means_divide_by_their_own_count():
    # Two layers, of which the second saw no token, but one on the probe.
    stats = {
        "tokens": jnp.array([4.0, 0.0]),
        "slope": jnp.array([[2.0, 8.0], [0.0, 0.0]]),
        "occupancy": jnp.ones((2, 4, 2)),
        "probe_tokens": jnp.array([2.0, 1.0]),
        "feature": jnp.array([[2.0, 4.0], [3.0, 3.0]]),
        "selection": jnp.array([[1.0, 1.0], [0.0, 0.6]]),
        "linear": jnp.array([[0.5, 1.0], [0.0, 0.3]]),
    }
    slope, occupancy, feature = (
        statistics.mean(name, stats) for name in ("slope", "occupancy", "feature")
    )
    np.testing.assert_allclose(slope, [[0.5, 2.0], [np.nan, np.nan]])  # not measured is not 0
    np.testing.assert_allclose(occupancy[0], jnp.full((4, 2), 0.25))
    np.testing.assert_allclose(feature, [[1.0, 2.0], [3.0, 3.0]])
    np.testing.assert_allclose(statistics.ratio("misalignment", stats), [[0.5, 0.25], [0.0, 0.2]])
    layer = layer_means(stats)
    np.testing.assert_allclose(layer["misalignment"], [2 / 6, 0.1], rtol=1e-6)
    np.testing.assert_allclose(layer["limit"], [1.5 / 6, 0.05], rtol=1e-6)


@partial(jax.jit, static_argnums=1)
def sampled_both_ways(weights, stride):
    """Positions and their weights, the positions of the first row alone, and the weights where they
    lie."""
    places = jnp.broadcast_to(jnp.arange(weights.shape[1]), weights.shape)[..., None]
    taken = [
        reductions.sample_positions(x, weights, stride)[..., 0]
        for x in (places, weights[..., None])
    ]
    alone = reductions.sample_positions(places[:1], weights[:1], stride)[..., 0]
    return *taken, alone, reductions.sampled_weights(weights, stride)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 96), min_size=3, max_size=3),
    start=st.integers(0, 60),
    width=st.sampled_from([64, 90]),
    stride=st.sampled_from([1, 2, 8]),
)
@example(lengths=[3, 20, 96], start=5, width=64, stride=8)  # real tokens on one side of the row
def test_every_row_that_has_a_real_token_is_measured(lengths, start, width, stride):
    place = np.arange(width)[None, :]
    weights = ((place >= start) & (place < start + np.array(lengths)[:, None])).astype(np.float32)
    positions, counted, alone, thinned = map(
        np.asarray, sampled_both_ways(jnp.asarray(weights), stride)
    )
    np.testing.assert_array_equal(counted.sum(1) > 0, weights.sum(1) > 0)
    assert positions.shape[1] <= -(-width // stride)
    real = counted > 0
    np.testing.assert_array_equal(
        counted[real], np.take_along_axis(weights, np.minimum(positions, width - 1), 1)[real]
    )
    # No position twice, and a row is sampled alike whatever stands beside it.
    assert all(len(set(row)) == len(row) for row in positions)
    np.testing.assert_array_equal(positions[:1], alone)
    np.testing.assert_array_equal(thinned.sum(1), counted.sum(1))
