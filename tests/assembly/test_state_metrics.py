"""What is logged of a state, against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from nalora_jax.assembly.state_metrics import adapter_norms, factor_histogram
from nalora_jax.method.rules import Mechanism
from nalora_jax.models.targets import AdapterSpec, TargetSpec


def test_channels_are_counted_as_numpy_counts_them() -> None:
    rng = np.random.default_rng(0)
    factor = np.exp(rng.normal(0, 1.5, (3, 2, 500))).astype(np.float32)
    factor[0, 0, :4] = 0, 1, 0.125, 8  # on edges, and below the first
    counts = np.asarray(factor_histogram(jnp.asarray(factor), Mechanism.bins))
    edges = np.array([-np.inf, *np.float32(Mechanism.bins), np.inf])
    expected = [np.histogram(rows, edges)[0] for rows in factor.reshape(3, -1)]
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(counts.sum(1), 1000)


def test_norms_are_those_of_the_whole_updates() -> None:
    rng = np.random.default_rng(1)
    targets = (
        ("layers/attn/q_proj", TargetSpec((4, 2, 0), (8.0, 2.0, 1.0))),
        ("layers/ffn/gate_proj", TargetSpec((4, 4, 4), (4.0, 8.0, 2.0))),  # experts
    )
    shapes = [((3, 12, 4), (3, 4, 10)), ((3, 5, 12, 4), (3, 5, 4, 9))]
    leaves = {
        f"{path}/{name}": rng.normal(size=shape).astype(np.float32)
        for (path, _), pair in zip(targets, shapes, strict=True)
        for name, shape in zip("ab", pair, strict=True)
    }
    found = adapter_norms(
        {name: jnp.asarray(leaf) for name, leaf in leaves.items()}, AdapterSpec(targets)
    )
    for path, spec in targets:
        whole = leaves[f"{path}/a"].astype(np.float64) @ leaves[f"{path}/b"].astype(np.float64)
        scale = [
            alpha / rank if rank else 0.0
            for alpha, rank in zip(spec.alphas, spec.ranks, strict=True)
        ]
        expected = scale * np.sqrt(np.square(whole).sum(axis=tuple(range(1, whole.ndim))))
        np.testing.assert_allclose(found[path], expected, rtol=1e-5)
    for path, _ in targets:
        lead = leaves[f"{path}/a"].shape[:-2]
        leaves[f"{path}/singular"] = np.full((*lead, 4), -2.0, np.float32)
    doubled = adapter_norms(leaves, AdapterSpec(targets, adalora=True))
    for path, _ in targets:
        np.testing.assert_allclose(doubled[path], 2 * found[path], rtol=1e-5)
