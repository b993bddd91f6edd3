"""The dense layer with an adapter: identity at first, DoRA's formula, dropout, dtypes, and the probe."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.method.ffn import LoRADense
from nalora_jax.method.low_rank import LowRankHidden
from nalora_jax.method.measurement import take_probe


def _layer(**options: object) -> tuple[LoRADense, dict, jax.Array]:
    layer = LoRADense(40, 4, use_bias=True, **options)
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    return layer, layer.init(jax.random.key(0), x), x


def test_a_fresh_adapter_is_the_identity_and_absent_adapters_are_the_base() -> None:
    for dora in (False, True):
        layer, variables, x = _layer(dora=dora)
        assert set(variables) == {"params", "lora"}
        with_adapter, _ = layer.apply(variables, x, 2.0)
        base, none = layer.apply({"params": variables["params"]}, x, 2.0)
        assert none is None
        np.testing.assert_allclose(with_adapter, base, rtol=1e-5, atol=1e-5)


def test_dora_is_the_papers_formula() -> None:
    layer, variables, x = _layer(dora=True)
    rng = np.random.default_rng(5)
    lora = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in variables["lora"].items()}
    bias = jnp.asarray(rng.normal(size=40), jnp.float32)
    params = {**variables["params"], "bias": bias}
    got, _ = layer.apply({"params": params, "lora": lora}, x, 0.5)
    w = np.asarray(params["kernel"], np.float64)
    whole = w + 0.5 * np.asarray(lora["a"], np.float64) @ np.asarray(lora["b"], np.float64)
    want = np.asarray(x) @ (
        whole / np.linalg.norm(whole, axis=0) * np.asarray(lora["magnitude"])
    ) + np.asarray(bias)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    layer, variables, x = _layer(dropout=0.5)
    lora = jax.tree.map(lambda v: jnp.ones_like(v), variables["lora"])
    variables = {**variables, "lora": lora}
    still, _ = layer.apply(variables, x)
    np.testing.assert_array_equal(still, layer.apply(variables, x)[0])
    moved, delta = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(7)})
    base, _ = layer.apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(moved - delta, base, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(still - moved)).max() > 0.1


def test_probe_takes_the_layer_apart(numerics: Any) -> None:
    layer, variables, x = _layer()
    lora = jax.tree.map(lambda v: v + 0.1, variables["lora"])
    variables = {"params": variables["params"] | {"bias": jnp.ones(40)}, "lora": lora}
    want, _ = layer.apply(variables, x, 2.0)
    base, _ = layer.apply({"params": variables["params"]}, x)
    y, delta = layer.clone(numerics=numerics()).apply(variables, x, 2.0)
    assert isinstance(delta, LowRankHidden)  # written to memory for nothing but the probe otherwise
    taken = take_probe(y, delta, jnp.ones((2, 3)), 2, numerics())
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taken.base, base[:, ::2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taken.delta, (want - base)[:, ::2], rtol=1e-5, atol=1e-5)
