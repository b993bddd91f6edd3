"""The decoder's own promises: cache, adapters, mask and statistics through the scanned stack, rematerialisation."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.layout.estimates import attention_flops
from nalora_jax.method.ffn import Adapters
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Block, Decoder, init_cache
from nalora_jax.models.parts import LayerInputs, PartOptions, SharedInputs
from nalora_jax.models.ropes import rope_tables
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.ops.delta_rule import CHUNK, DeltaInputs, gated_delta_rule
from nalora_jax.ops.dispatch import Numerics
from tests.models.family_fields import tiny_config
from tests.observed import observed
from tests.param_trees import init_params

CONFIGS = {
    "dense": tiny_config("gemma3_text", head_dim=8, sliding_window=5, attention_bias=True),
    "experts": tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "self-gated": dataclasses.replace(tiny_config("llama", hidden_act="gelu", mlp_bias=True), gated=False),
}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
HEADS |= {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 2}
DELTA_NET = tiny_config("qwen3_5_text", layer_types=["linear_attention", "full_attention"], **HEADS)
CONVOLUTION = tiny_config(
    "lfm2", layer_types=["conv", "full_attention"], conv_bias=True, num_hidden_layers=2
)
CACHED = {"windows": CONFIGS["dense"], "delta rule": DELTA_NET, "convolution": CONVOLUTION}
RANKS = TargetSpec(ranks=(3, 0, 2), alphas=(6.0, 1.0, 1.0))


def everywhere(config: ModelConfig, **options) -> AdapterSpec:
    return AdapterSpec(tuple((path, RANKS) for path in sorted(projection_shapes(config))), **options)


def trained(config: ModelConfig, spec: AdapterSpec, params=None):
    """Adapters whose B is not zero; the padding beyond a layer's rank stays zero, as in training."""
    lora, rng = flatten(init_lora(config, spec, jax.random.key(1), params)), np.random.default_rng(0)
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
    return applied(model, {"params": params} | ({} if lora is None else {"lora": lora}), tokens, options)


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_calls_with_a_cache_continue_after_padding_on_either_side(config):
    model, params, tokens = Decoder(config), init_params(config, jax.random.key(0)), tokens_of(2, 12)
    # Row 0 has no padding, row 1 has it before, between and after its tokens; positions count tokens.
    real = np.ones((2, 12), np.int32)
    real[1, [0, 1, 5, 6, 7, 11]] = 0
    cache, pieces = init_cache(config, 2, 12), []
    for piece in (slice(0, 4), slice(4, 8), slice(8, 12)):
        hidden, cache = run(model, params, tokens[:, piece], segment_ids=real[:, piece], cache=cache)
        pieces.append(hidden)
    ours = np.concatenate(pieces, axis=1)
    assert np.asarray(cache.lengths).tolist() == [12, 6]
    for row in range(2):
        place = real[row] > 0
        expected = run(model, params, tokens[row : row + 1, place])
        np.testing.assert_allclose(ours[row, place], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "dora"), [("dense", True), ("experts", True), ("self-gated", False)])
def test_adapters_equal_merged_weights(name, dora):
    """Every projection, ranks that differ by layer, a layer without: ``W + s A B``, for DoRA its columns rescaled.

    Fresh adapters are the identity.
    """
    config = CONFIGS[name]
    spec, params = everywhere(config, dora=dora), init_params(config, jax.random.key(0))
    lora, tokens = trained(config, spec, params), tokens_of(2, 8)
    fresh, plain = init_lora(config, spec, jax.random.key(1), params), run(Decoder(config), params, tokens)
    np.testing.assert_allclose(run(Decoder(config, spec), params, tokens, fresh), plain, atol=1e-5)
    merged, adapters = flatten(params), flatten(lora)
    for path, _ in spec.targets:
        a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
        scale = spec.scales(path).reshape(-1, *(1,) * (a.ndim - 1))
        kernel = merged[f"{path}/kernel"] + scale * jnp.einsum("...dr,...ro->...do", a, b)
        if dora:
            norm = jnp.linalg.norm(kernel, axis=-2, keepdims=True)
            kernel = jnp.where(
                scale == 0, kernel, kernel / norm * adapters[f"{path}/magnitude"][..., None, :]
            )
        merged[f"{path}/kernel"] = kernel
    ours = run(Decoder(config, spec), params, tokens, lora)
    np.testing.assert_allclose(ours, run(Decoder(config), unflatten(merged), tokens), atol=3e-5)
    assert np.abs(ours - plain).max() > 0.05


@functools.cache
def gradient(config: ModelConfig, remat: str = "none"):
    """Returns the loss and the adapters' gradients as a function of parameters, adapters and mask."""
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
    masks = np.ones(shape, np.float32), np.random.default_rng(3).uniform(size=shape).astype(np.float32)
    (plain, without), (masked, with_mask) = (gradient(config)(lora, params, mask) for mask in masks)
    assert plain == masked
    if (
        config.n_experts
    ):  # rematerialization changes no gradient; XLA:CPU takes the host's memory for its own
        _, saved = gradient(config, "dots_offload")(lora, params, masks[0])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), without, saved)
    without, with_mask = flatten(without), flatten(with_mask)
    for path in without:
        same = np.allclose(without[path], with_mask[path], rtol=1e-5, atol=1e-5)
        assert same == (path != "layers/ffn/gate_proj/a"), path


def test_dropout_of_attention_is_for_training_only():
    config = dataclasses.replace(CONFIGS["dense"], attn_dropout=0.5)
    params, tokens, model = init_params(config, jax.random.key(0)), tokens_of(2, 8), Decoder(config)
    still = run(model, params, tokens)
    np.testing.assert_array_equal(still, run(Decoder(CONFIGS["dense"]), params, tokens))
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    dropped = jax.jit(lambda params: model.apply({"params": params}, tokens, **options))(params)
    assert np.abs(dropped - still).max() > 0.01


@functools.partial(jax.jit, static_argnums=0)
def with_statistics(model, variables, tokens, segments):
    return observed(model, variables, tokens, segment_ids=segments)[1]


def statistics(config, params, lora, tokens, segments):
    model = Decoder(config, everywhere(config), stats=GateStatsConfig(stride=1, probe_stride=1))
    return flatten(with_statistics(model, {"params": params, "lora": lora}, tokens, segments))


def test_statistics_are_sums_over_real_tokens(config, params):
    """Packed rows with padding give the sum of what the sequences give alone, per layer (and expert) and channel."""
    lora, tokens = trained(config, everywhere(config)), tokens_of(1, 12)
    packed = statistics(config, params, lora, tokens, np.repeat([1, 2, 0], [6, 4, 2])[None])
    firsts = (tokens, 6), (np.roll(tokens, -6, axis=1), 4)
    alone = [
        statistics(config, params, lora, row, (np.arange(12) < n)[None].astype(int)) for row, n in firsts
    ]
    *lead, d_ff = channels(config)
    assert packed["layers/ffn/slope"].shape == (*lead, d_ff)
    assert packed["layers/ffn/occupancy"].shape == (*lead, 4, d_ff)
    routed = config.experts_per_token or 1
    of_layers = packed["layers/ffn/tokens"].reshape(config.n_layers, -1).sum(1)
    assert of_layers.tolist() == [10.0 * routed] * config.n_layers
    for path, value in packed.items():
        np.testing.assert_allclose(value, alone[0][path] + alone[1][path], rtol=1e-4, atol=1e-4)


def test_residual_dropout_drops_outputs_of_both_parts_in_training_only():
    """With one part's last kernel at zero, a block adds the other's output: each value is dropped or doubled."""
    config = tiny_config("seed_oss", attention_dropout=0.0, residual_dropout=0.5)
    options = PartOptions("layers", "", Adapters(), Numerics(), GateStatsConfig(), None, None)
    block = Block(config, AdapterSpec(), options)
    x = np.random.default_rng(0).normal(size=(2, 40, 16)).astype(np.float32)
    layers = jax.device_get(init_params(config, jax.random.key(1))["layers"])
    positions = np.arange(40)[None]
    segments = np.ones_like(positions)
    shared = SharedInputs({"layers": rope_tables(config, positions, segments)}, positions, segments, None)
    layer = LayerInputs(None, None, {}, None, None)

    @jax.jit
    def outputs(params):
        training = dataclasses.replace(shared, deterministic=False)
        rngs = {"dropout": jax.random.key(2)}
        added, _ = block.apply({"params": params}, x, layer, shared)
        dropped, _ = block.apply({"params": params}, x, layer, training, rngs=rngs)
        return added - x, dropped - x

    for part, projection in (("attn", "o_proj"), ("ffn", "down_proj")):
        params = jax.tree.map(lambda leaf: leaf[0].copy(), layers)
        params[part][projection]["kernel"] *= 0.0
        added, dropped = outputs(params)
        kept = np.abs(dropped) > 0
        np.testing.assert_allclose(np.where(kept, 2 * added, 0), dropped, atol=1e-5)
        assert 0.4 < kept.mean() < 0.6


# ---------------------------------------------------------------- mixers whose state has one size


def test_choices_with_a_common_context_are_scored_like_single_ones():
    model, variables = Decoder(DELTA_NET), {"params": init_params(DELTA_NET, jax.random.key(0))}
    rng = np.random.default_rng(1)
    contexts = [rng.integers(1, 48, n).tolist() for n in (9, 6, 4)]
    groups = [[(context, rng.integers(1, 48, n).tolist()) for n in (2, 3)] for context in contexts]
    together = score_groups(model, variables, groups)

    @jax.jit
    def log_probs_of(tokens):
        logits = model.apply(variables, model.apply(variables, tokens), method="unembed")
        return jax.nn.log_softmax(logits)[0]

    for group, scores in zip(groups, together, strict=True):
        for (context, continuation), score in zip(group, scores, strict=True):
            row = context + continuation
            log_probs = log_probs_of(np.array([row + [0] * (12 - len(row))]))[len(context) - 1 :]
            expected = sum(float(log_probs[i, token]) for i, token in enumerate(continuation))
            assert score.log_prob == pytest.approx(expected, abs=1e-4)


def test_flops_of_a_delta_rule_are_those_of_its_program():
    """A layer of the mixer alone."""
    mixer = dict(DELTA_NET.kinds[1])["mixer"]
    one = replace(DELTA_NET, kinds=(), layer_kinds=(), n_layers=1, mixer=mixer)
    sizes, lead = one.mixer, (1, CHUNK, one.mixer.key_heads)
    keys, rates = (*lead, sizes.key_dim), (*lead, sizes.value_heads // sizes.key_heads)
    shapes = keys, keys, (*rates, sizes.value_dim), rates, rates
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, CHUNK), "int32")
    program = jax.jit(lambda *x: gated_delta_rule(DeltaInputs(*x[:5]), x[5]))
    compiled = program.lower(*arguments, segments).compile().cost_analysis()["flops"]
    inverse = sizes.value_heads * 10 * 2 * CHUNK**3
    conv = 2 * sizes.conv_width * sizes.channels * CHUNK
    assert attention_flops(one, CHUNK) - conv + inverse == pytest.approx(compiled, rel=0.1)
