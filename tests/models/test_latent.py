"""Latent attention: what generation stores of a token, and absorbed products with adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common.trees import map_named
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.cache import grow
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder, init_cache
from nalora_jax.models.latent import LatentAttention
from nalora_jax.models.stacks import depths
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.ops import attention
from nalora_jax.ops.dispatch import Numerics
from tests.models.family_fields import LATENT, TINY, YARN
from tests.param_trees import init_params, quantize_params

# Sizes of DeepSeek-V3; the others are the family's defaults.
V3 = {"model_type": "deepseek_v3", "vocab_size": 129_280, "hidden_size": 7168}
V3 |= {"intermediate_size": 18_432, "num_hidden_layers": 61, "num_attention_heads": 128}
SMALL = TINY | LATENT | {"model_type": "youtu", "num_hidden_layers": 2}
SMALL |= {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}}
SEQ = 24


def test_generation_stores_the_latent_and_the_rotated_key_of_a_token():
    """DeepSeek-V3: 512 + 64 numbers in each of 61 layers, in bf16."""
    config = ModelConfig.from_hf(V3)
    cache = jax.eval_shape(partial(init_cache, config, 3, 10, Numerics(operand="bfloat16")))
    stored = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(cache.states))
    assert stored == 3 * 10 * 70_272


def adapted(config: ModelConfig, **variant: Any) -> tuple[dict[str, Any], AdapterSpec]:
    """Variables of a model with adapters of every projection, B not zero."""
    targets = tuple((path, TargetSpec((3,) * n, (6.0,) * n)) for path, n in depths(config).items())
    spec = AdapterSpec(targets, **variant)
    params = init_params(config, jax.random.key(0))
    lora = init_lora(config, spec, jax.random.key(1), params)

    def moved(path: str, leaf: jax.Array) -> jax.Array:
        if path.endswith("/b"):
            return 0.2 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
        return leaf * 1.3  # DoRA's magnitude, too

    return {"params": params, "lora": map_named(moved, lora)}, spec


# Tokens of each call, after which the cache is read; whether all products are absorbed, none, or
# those that take fewer flops.
CALLS = [(SEQ - 8, 1, 1, 6), (1,) * SEQ, (9, 15)]


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize("absorbs", [True, False, None])
@pytest.mark.parametrize("kind", ["plain", "dora", "int8"])
def test_calls_with_a_cache_equal_one_without(kind, absorbs, calls, monkeypatch):
    if absorbs is not None:
        monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: absorbs)
    config = ModelConfig.from_hf(SMALL)
    variables, spec = adapted(config, dora=kind == "dora")
    if kind == "int8":
        variables["params"] = quantize_params(variables["params"], "int8")
    model = Decoder(config, spec)
    tokens = np.random.default_rng(0).integers(0, 64, (2, SEQ))
    whole = model.apply(variables, tokens)
    cache = init_cache(config, 2, SEQ + 3)
    parts = []
    first = 0
    for count in calls:
        given = tokens[:, first : first + count]
        hidden, cache = model.apply(variables, given, cache=cache)
        parts.append(hidden)
        first += count
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


def test_a_cache_without_slots_grows():
    config = ModelConfig.from_hf(SMALL)
    model = Decoder(config)
    variables = {"params": init_params(config, jax.random.key(0))}
    tokens = np.random.default_rng(0).integers(0, 64, (2, SEQ))
    first, cache = model.apply(variables, tokens[:, :-1], cache=init_cache(config, 2, 0))
    last, _ = model.apply(variables, tokens[:, -1:], cache=grow(cache, SEQ))
    parts = jnp.concatenate([first, last], axis=1)
    np.testing.assert_allclose(parts, model.apply(variables, tokens), atol=2e-5)


@pytest.mark.parametrize("absorbs", [True, False])
def test_a_long_cache_is_read_in_blocks(absorbs, monkeypatch):
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: absorbs)
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    config = ModelConfig.from_hf(SMALL)
    model = Decoder(config)
    variables = {"params": init_params(config, jax.random.key(0))}
    tokens = np.random.default_rng(0).integers(0, 64, (2, SEQ))
    cache = init_cache(config, 2, SEQ)
    before, cache = model.apply(variables, tokens[:, :13], cache=cache)
    after, _ = model.apply(variables, tokens[:, 13:], cache=cache)
    parts = jnp.concatenate([before, after], axis=1)
    np.testing.assert_allclose(parts, model.apply(variables, tokens), atol=2e-5)


@pytest.mark.parametrize(("queries", "chosen"), [(1, True), (40, True), (70, False), (128, False)])
def test_products_that_take_fewer_flops_are_chosen(queries, chosen, monkeypatch):
    """Those that XLA counts fewer flops for, in a compiled model of one layer."""
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32}
    raw = TINY | LATENT | sizes | {"model_type": "youtu", "num_hidden_layers": 1}
    config = ModelConfig.from_hf(raw | {"num_attention_heads": 4, "max_position_embeddings": 512})
    part = config.mixer
    assert isinstance(part, LatentAttention)
    slots = 256
    assert part.absorbs(config, queries, slots) == chosen

    def flops(absorbs: bool) -> float:
        monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: absorbs)
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        cache = jax.eval_shape(partial(init_cache, config, 1, slots))
        tokens = jax.ShapeDtypeStruct((1, queries), jnp.int32)

        def run(params: Any, tokens: jax.Array, cache: Any) -> jax.Array:
            hidden: jax.Array = Decoder(config).apply({"params": params}, tokens, cache=cache)[0]
            return hidden

        counted: Any = jax.jit(run).lower(params, tokens, cache).compile().cost_analysis()
        return float(counted["flops"])

    absorbed, expanded = flops(True), flops(False)
    assert chosen == (absorbed < expanded), (absorbed, expanded)
