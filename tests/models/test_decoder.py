"""Adapters, masks, statistics and dropout through the scanned stack, with rematerialization."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.merge import merged_tensors
from tests.models.family_fields import tiny_config
from tests.observed import observed
from tests.param_trees import init_params, params_from_tensors

CONFIGS = {
    "dense": tiny_config("gemma3_text", head_dim=8, sliding_window=5, attention_bias=True),
    "experts": tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2),
}
RANKS = TargetSpec(ranks=(3, 0, 2), alphas=(6.0, 1.0, 1.0))


def everywhere(config: ModelConfig, **options) -> AdapterSpec:
    return AdapterSpec(
        tuple((path, RANKS) for path in sorted(projection_shapes(config))), **options
    )


def trained(config: ModelConfig, spec: AdapterSpec, params=None):
    """Adapters whose B is not zero; the padding beyond a layer's rank stays zero, as in
    training."""
    lora, rng = (
        flatten(init_lora(config, spec, jax.random.key(1), params)),
        np.random.default_rng(0),
    )
    for path, leaf in lora.items():
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith("/b"):
            used = np.any(np.asarray(lora[f"{path[:-2]}/a"]) != 0, axis=-2)[..., None]
            lora[path] = np.where(used, 0.1 * noise, 0.0).astype(np.float32)
        elif path.endswith("/magnitude"):
            lora[path] = np.asarray(leaf) * (1 + 0.1 * noise)
    return unflatten(lora)


def tokens_of(rows: int, seq: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (rows, seq))


@pytest.fixture(params=["dense", "experts"], scope="module")
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, tokens, options):
    return model.apply(variables, tokens, **options)


def run(model, params, tokens, lora=None, **options):
    return applied(
        model, {"params": params} | ({} if lora is None else {"lora": lora}), tokens, options
    )


def test_adapters_equal_merged_weights(config, params):
    """Every projection with DoRA, ranks that differ by layer, a layer without; fresh adapters are
    the identity.

    tests/weights/test_merge.py has the merged weights.
    """
    spec = everywhere(config, dora=True)
    lora, tokens = trained(config, spec, params), tokens_of(2, 8)
    fresh, plain = (
        init_lora(config, spec, jax.random.key(1), params),
        run(Decoder(config), params, tokens),
    )
    np.testing.assert_allclose(run(Decoder(config, spec), params, tokens, fresh), plain, atol=1e-5)
    tensors = dict(merged_tensors(config, jax.device_get(params), lora, spec))
    merged = run(Decoder(config), params_from_tensors(config, tensors.__getitem__), tokens)
    ours = run(Decoder(config, spec), params, tokens, lora)
    np.testing.assert_allclose(ours, merged, atol=3e-5)
    assert np.abs(ours - plain).max() > 0.05


@functools.cache
def gradient(config: ModelConfig, remat: str = "none"):
    """Returns the loss and the adapters' gradients as a function of parameters, adapters and
    mask."""
    model, tokens = Decoder(config, everywhere(config), remat=remat), tokens_of(2, 8)

    def loss(lora, params, mask):
        masks = {"layers": {"ffn": {"mask": mask}}}
        hidden = model.apply({"params": params, "lora": lora, "gate_mask": masks}, tokens)
        return jnp.sum(jnp.sin(hidden))

    return jax.jit(jax.value_and_grad(loss))


def channels(config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a statistic."""
    experts = (config.n_experts,) if config.n_experts else ()
    return (config.n_layers, *experts, config.d_ff)


def test_mask_shapes_the_gates_a_and_nothing_else_in_every_way_to_save(config, params):
    shape, lora = channels(config), trained(config, everywhere(config))
    masks = (
        np.ones(shape, np.float32),
        np.random.default_rng(3).uniform(size=shape).astype(np.float32),
    )
    (plain, without), (masked, with_mask) = (gradient(config)(lora, params, mask) for mask in masks)
    assert plain == masked
    if config.n_experts:
        # Rematerialization changes no gradient; XLA:CPU takes the host's memory for its own.
        _, saved = gradient(config, "dots_offload")(lora, params, masks[0])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), without, saved
        )
    without, with_mask = flatten(without), flatten(with_mask)
    for path in without:
        same = np.allclose(without[path], with_mask[path], rtol=1e-5, atol=1e-5)
        assert same == (path != "layers/ffn/gate_proj/a"), path


def test_statistics_are_sums_over_real_tokens(config, params):
    """Packed rows with padding give the sum of what the sequences give alone, per layer (and
    expert) and channel."""
    spec, tokens = everywhere(config), tokens_of(1, 12)
    model = Decoder(config, spec, stats=GateStatsConfig(stride=1, probe_stride=1))
    variables = {"params": params, "lora": trained(config, spec)}

    @jax.jit
    def statistics(tokens, segments):
        return flatten(observed(model, variables, tokens, segment_ids=segments)[1])

    packed = statistics(tokens, np.repeat([1, 2, 0], [6, 4, 2])[None])
    firsts = (tokens, 6), (np.roll(tokens, -6, axis=1), 4)
    alone = [statistics(row, (np.arange(12) < n)[None].astype(int)) for row, n in firsts]
    *lead, d_ff = channels(config)
    assert packed["layers/ffn/slope"].shape == (*lead, d_ff)
    assert packed["layers/ffn/occupancy"].shape == (*lead, 4, d_ff)
    routed = config.experts_per_token or 1
    of_layers = packed["layers/ffn/tokens"].reshape(config.n_layers, -1).sum(1)
    assert of_layers.tolist() == [10.0 * routed] * config.n_layers
    for path, value in packed.items():
        np.testing.assert_allclose(value, alone[0][path] + alone[1][path], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rate", "silent"),
    [
        ("attn_dropout", "ffn/down_proj"),
        ("residual_dropout", "ffn/down_proj"),
        ("residual_dropout", "attn/o_proj"),
    ],
)
def test_dropout_of_both_parts_is_for_training_only(rate, silent):
    """With the last kernel of one part at zero, only the other's output can change."""
    plain = tiny_config("seed_oss", attention_dropout=0.0, residual_dropout=0.0)
    params = flatten(init_params(plain, jax.random.key(0)))
    params = unflatten(params | {f"layers/{silent}/kernel": 0 * params[f"layers/{silent}/kernel"]})
    model, tokens = Decoder(replace(plain, **{rate: 0.5})), tokens_of(2, 8)
    still = run(model, params, tokens)
    np.testing.assert_array_equal(still, run(Decoder(plain), params, tokens))
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    dropped = jax.jit(lambda params: model.apply({"params": params}, tokens, **options))(params)
    assert np.abs(dropped - still).max() > 0.01
