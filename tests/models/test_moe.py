"""The mixture against loops over experts: gradients of adapters and statistics of every expert's
channels."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from nalora_jax.method import activations, statistics
from nalora_jax.method.ffn import Adapters
from nalora_jax.method.low_rank import low_rank
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.parts import PartOptions
from nalora_jax.models.routing import ExpertGroups, RouterSpec, grouped_residual
from nalora_jax.ops.dispatch import Numerics, Platform
from nalora_jax.ops.shardings import Shardings
from tests.models.family_fields import tiny_config
from tests.observed import observed

EXPERTS, D, F, RANK = 4, 8, 12, 3
SIZES = np.array([5, 0, 3, 2], np.int32)
EXPERT = np.repeat(np.arange(EXPERTS), SIZES)
NUMERICS, STATS = Numerics(), GateStatsConfig()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# On a GPU the experts' factors are joined.
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_grouped_adapter_is_each_experts_own_with_gradients(platform):
    groups, numerics = (
        ExpertGroups(SIZES, jnp.asarray(EXPERT)),
        Numerics(platform=Platform(platform)),
    )
    x, a, b = normal(10, D), normal(EXPERTS, D, RANK, seed=1), normal(EXPERTS, RANK, F, seed=2)
    mask = np.random.default_rng(3).uniform(size=(EXPERTS, F)).astype(np.float32)

    def loop(x, a, b):
        ends = np.cumsum(SIZES)
        rows = [slice(end - n, end) for end, n in zip(ends, SIZES, strict=True)]
        return jnp.concatenate(
            [low_rank(x[rows[e]], a[e], b[e], 0.7, mask[e]) for e in range(EXPERTS)]
        )

    ours, back = jax.vjp(
        lambda x, a, b: grouped_residual(x, a, b, 0.7, groups, numerics, mask), x, a, b
    )
    theirs, back_loop = jax.vjp(loop, x, a, b)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    g = normal(10, F, seed=4)
    for one, other in zip(back(g), back_loop(g), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert not np.any(back(g)[1][1])  # an expert that no token reached


def block(
    rank: int = RANK,
    *,
    dropout: float = 0.0,
    numerics: Numerics = NUMERICS,
    stats: GateStatsConfig = STATS,
    sharding: NamedSharding | None = None,
    experts: str = "auto",
    **fields: Any,
) -> MoEFFN:
    """The experts of a model of width D, with other ``fields`` of its config."""
    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": EXPERTS}
    config = dataclasses.replace(tiny_config("mixtral", num_experts_per_tok=2, **sizes), **fields)
    adapters = Adapters(
        tuple((f"{name}_proj", rank) for name in ("gate", "up", "down")), dropout=dropout
    )
    shardings = Shardings(routed=sharding)
    options = PartOptions("layers", "ffn", adapters, numerics, stats, shardings, experts)
    return MoEFFN(config, RouterSpec(), options)


def variables_of(module: MoEFFN):
    """Random values; initializers would take longer to compile than the block."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, D)))
    return jax.tree.map(lambda leaf: 0.4 * normal(*leaf.shape), shapes)


def test_statistics_of_gpt_oss_experts_against_float64():
    """Biases of router and experts and the clamped gate, whose outputs test_families.py
    compares."""
    stats, limit, slope = GateStatsConfig(stride=1, probe_stride=1), 0.9, 1.3
    name = f"clamped_swish({slope!r},{limit!r})"
    module = block(stats=stats, ffn_bias=True, router_bias=True, up_limit=limit, activation=name)
    x, variables = normal(2, 9, D), variables_of(module)
    params = variables["params"]
    names = (*statistics.STANDARD, "excess")
    _, measured = jax.jit(lambda v: observed(module, v, x, names=names))(variables)

    def rho(z):
        low = np.minimum(z, limit)
        return low / (1 + np.exp(-slope * low)) / z

    flat, step, cuts = x.reshape(-1, D).astype(np.float64), 1e-6, activations.partition(name)
    logits = flat @ params["router"]["kernel"] + params["router"]["bias"]
    chosen = np.argsort(-logits, axis=1)[:, :2]
    gate, a, b = params["gate_proj"], *map(variables["lora"]["gate_proj"].get, "ab")
    for e in range(EXPERTS):
        rows = flat[np.any(chosen == e, axis=1)]
        z, dz = rows @ gate["kernel"][e] + gate["bias"][e], rows @ a[e] @ b[e]
        full = z + dz
        phi_slope = ((full + step) * rho(full + step) - (full - step) * rho(full - step)) / (
            2 * step
        )
        above = full > limit
        contracting, expanding = (
            ((full >= cuts.z0) & (full < 0)) | above,
            (full >= 0) & (full < cuts.z1),
        )
        regions = full < cuts.z0, contracting, expanding & ~above
        drho, moved = (rho(z + step) - rho(z - step)) / (2 * step), (rho(full) - rho(z)) * full
        sums = {
            "slope": np.abs(phi_slope),
            "feature": np.abs(rho(z) * dz),
            "selection": np.abs(moved),
            "linear": np.abs(z * drho * dz),
            "excess": np.abs(moved - z * drho * dz),
        }
        of_expert = {key: value[e] for key, value in measured.items()}
        assert of_expert["tokens"] == len(rows)
        for key, value in sums.items():
            np.testing.assert_allclose(
                of_expert[key], value.sum(axis=0), rtol=1e-4, atol=1e-5, err_msg=key
            )
        counts = [region.sum(axis=0) for region in regions]
        np.testing.assert_array_equal(of_expert["occupancy"], [*counts, len(rows) - sum(counts)])
        assert above.any()


def test_statistics_are_the_same_where_adapters_are_joined():
    """On a TPU, which also computes the adapters' output on probed rows a second time."""
    x, stats, results = normal(2, 8, D), GateStatsConfig(stride=2, probe_stride=4), []
    for platform in ("cpu", "tpu"):
        module = block(stats=stats, numerics=Numerics(platform=Platform(platform)))
        results.append(jax.jit(partial(observed, module))(variables_of(module), x))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *results)


def test_dropout_acts_on_the_adapters_input_only():
    module, x, options = (
        block(dropout=0.5),
        normal(1, 6, D),
        {"rngs": {"dropout": jax.random.key(0)}},
    )
    still = jax.jit(lambda variables: module.apply(variables, x))
    drop = jax.jit(lambda variables: module.apply(variables, x, deterministic=False, **options))
    variables = variables_of(module)
    base = {"params": variables["params"]}
    assert np.abs(drop(variables) - still(variables)).max() > 1e-3
    np.testing.assert_array_equal(drop(base), still(base))
