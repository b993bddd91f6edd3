"""Adapter arithmetic against numpy float64, and the gated gradient against its definition."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.nn.lora import (
    AdapterSpec,
    LoRADense,
    Probe,
    TargetSpec,
    adapter_scale,
    batched_residual,
    column_norm,
    init_a,
    residual,
    resolve,
)
from nalora_jax.nn.matmul import Numerics

SHAPES = {"layers/ffn/gate_proj": (16, 40), "layers/ffn/up_proj": (16, 40), "layers/attn/q_proj": (16, 12)}


def _arrays(seed: int = 0, tokens: int = 6, d_in: int = 16, rank: int = 4, d_out: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(2, tokens // 2, d_in), (d_in, rank), (rank, d_out), (d_out,), (2, tokens // 2, d_out)]
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_residual_value_and_gradients_are_the_formulas_of_the_design(masked: bool) -> None:
    x, a, b, mask, g = _arrays()
    mask = np.abs(mask) * (np.arange(mask.size) % 3 > 0)
    scale = 1.7
    args = [jnp.asarray(v, jnp.float32) for v in (x, a, b)]
    given = jnp.asarray(mask, jnp.float32) if masked else None

    value, vjp = jax.vjp(lambda x, a, b: residual(x, a, b, scale, given), *args)
    dx, da, db = vjp(jnp.asarray(g, jnp.float32))

    flat, gf = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]) * scale
    np.testing.assert_allclose(value, scale * (x @ a) @ b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, (gf @ b.T @ a.T).reshape(x.shape), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(db, (flat @ a).T @ gf, rtol=1e-5, atol=1e-4)
    shaped = b * mask if masked else b
    np.testing.assert_allclose(da, flat.T @ (gf @ shaped.T), rtol=1e-5, atol=1e-4)


def test_without_a_mask_the_gradient_is_autodiffs() -> None:
    x, a, b, _, g = (jnp.asarray(v, jnp.float32) for v in _arrays(1))
    ours = jax.grad(lambda *v: jnp.sum(residual(*v, 0.5) * g), argnums=(0, 1, 2))(x, a, b)
    plain = jax.grad(lambda x, a, b: jnp.sum(0.5 * ((x @ a) @ b) * g), argnums=(0, 1, 2))(x, a, b)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_mask_never_changes_the_value() -> None:
    x, a, b, mask, _ = (jnp.asarray(v, jnp.float32) for v in _arrays(2))
    np.testing.assert_array_equal(residual(x, a, b, 2.0), residual(x, a, b, 2.0, mask))


def test_batched_residual_is_one_adapter_per_example() -> None:
    rng = np.random.default_rng(3)
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 5, 8), (2, 8, 4), (2, 4, 6)])
    ids = jnp.array([1, -1, 0])
    got = batched_residual(x, a, b, 1.5, ids)
    np.testing.assert_allclose(got[0], residual(x[0], a[1], b[1], 1.5), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], np.zeros_like(got[1]))
    np.testing.assert_allclose(got[2], residual(x[2], a[0], b[0], 1.5), rtol=1e-5, atol=1e-5)


def test_column_norm_is_the_norm_of_the_sum() -> None:
    rng = np.random.default_rng(4)
    w, a, b = rng.normal(size=(16, 12)), rng.normal(size=(16, 3)), rng.normal(size=(3, 12))
    want = np.linalg.norm(w + 0.7 * a @ b, axis=0)
    got = column_norm(*(jnp.asarray(v, jnp.float32) for v in (w, a, b)), 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_scales_follow_lora_and_rslora() -> None:
    spec = AdapterSpec((("layers/ffn/gate_proj", TargetSpec((8, 4, 0), (16.0, 16.0, 1.0))),))
    np.testing.assert_allclose(spec.scales("layers/ffn/gate_proj"), [2.0, 4.0, 0.0])
    assert adapter_scale(16, 4, rslora=True) == 8.0


def test_rules_decide_in_order_and_per_layer() -> None:
    config = LoRAConfig(
        rules=(LoRARule(r"layers/1/ffn/gate", 2, 3.0), LoRARule("gate_proj", 8), LoRARule("q_proj", 4, 4.0))
    )
    spec = resolve(config, SHAPES, n_layers=3)
    assert spec.target("layers/ffn/gate_proj") == TargetSpec((8, 2, 8), (16.0, 3.0, 16.0))
    assert spec.target("layers/attn/q_proj") == TargetSpec((4, 4, 4), (4.0, 4.0, 4.0))
    assert spec.target("layers/ffn/up_proj") is None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((LoRARule("nothing_like_it"),), "matches nothing.*layers/\\*/ffn/gate_proj"),
        ((LoRARule("gate_proj", 17),), "rank.*0 to 16.*found 17"),
        ((LoRARule("gate_proj", -1),), "rank"),
        ((LoRARule("gate_proj", 4, 0.0),), "alpha"),
        ((LoRARule("gate_proj", 0),), "at least one adapter"),
        ((LoRARule("gate_(proj"),), "regular expression"),
    ],
)
def test_bad_rules_are_refused_by_name(rules: tuple[LoRARule, ...], message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        resolve(LoRAConfig(rules=rules), SHAPES, n_layers=2)


def _layer(**options: object) -> tuple[LoRADense, dict, jax.Array]:
    layer = LoRADense(40, TargetSpec((4,), (8.0,)), use_bias=True, **options)
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
    want = np.asarray(x) @ (whole / np.linalg.norm(whole, axis=0) * np.asarray(lora["magnitude"])) + np.asarray(bias)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    layer, variables, x = _layer(dropout=0.5)
    lora = jax.tree.map(lambda v: jnp.ones_like(v), variables["lora"])
    variables = {**variables, "lora": lora}
    still, _ = layer.apply(variables, x)
    np.testing.assert_array_equal(still, layer.apply(variables, x)[0])
    moved, delta = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(7)})
    base, _ = layer.apply(variables, x, adapted=False)
    np.testing.assert_allclose(moved - delta, base, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(still - moved)).max() > 0.1


def test_low_precision_operands_keep_float32_masters() -> None:
    layer, variables, x = _layer(numerics=Numerics("bfloat16", "float32", "bfloat16"))
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["params"])
    lora = jax.tree.map(lambda v: v + 0.1, variables["lora"])

    def loss(lora: dict) -> jax.Array:
        return jnp.sum(jnp.square(layer.apply({"params": params, "lora": lora}, x)[0]))

    grads = jax.grad(loss)(lora)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_probe_takes_the_layer_apart_fused_or_not() -> None:
    layer, variables, x = _layer()
    lora = jax.tree.map(lambda v: v + 0.1, variables["lora"])
    variables = {"params": variables["params"] | {"bias": jnp.ones(40)}, "lora": lora}
    fused = layer.clone(numerics=Numerics(fused=True))

    def probe(layer: LoRADense, x: jax.Array) -> tuple[jax.Array, Probe]:
        y, delta = layer(x, 2.0)
        assert delta is None  # kept for nothing but the probe, it would be written whole
        return y, layer.probe(x, y, delta, 2, 2.0)

    want_y, want = nn.apply(probe, layer)(variables, x)
    y, got = nn.apply(probe, fused)(variables, x)
    base, _ = layer.apply(variables, x, adapted=False)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-5)
    for taken in (got, want):
        np.testing.assert_allclose(taken.base, base[:, ::2], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(taken.delta, (want_y - base)[:, ::2], rtol=1e-5, atol=1e-5)


def test_init_a_has_pefts_bound() -> None:
    a = init_a(jax.random.key(0), (256, 64))
    assert float(jnp.abs(a).max()) <= 1 / 16
    np.testing.assert_allclose(jnp.std(a), 1 / 16 / np.sqrt(3), rtol=0.03)
