"""Decoders and experts on a mesh: eight devices are one, and each does an eighth of the work."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.assembly.program import Assembly, build_model
from nalora_jax.common import trees
from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.loading.adapted import load
from nalora_jax.mesh import distributed, sharding
from nalora_jax.method.measurement import CHECKS, GateChecks, GateStatsConfig
from nalora_jax.models import experts
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import gate_blocks, layer_numbers, projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.ops.dispatch import Numerics, Platform
from nalora_jax.ops.shardings import Shardings
from tests.models.family_fields import LATENT, TINY
from tests.models.test_moe import block, variables_of
from tests.observed import taps_of
from tests.param_trees import init_params, quantize_params, scaled_params

EXPERTS, D, F, RANK, ROWS, SEQ = 4, 64, 128, 3, 8, 12
WIDE = {"d_model": D, "d_ff": F}


def sharding_of(mesh: MeshConfig) -> NamedSharding:
    return NamedSharding(distributed.make_mesh(mesh), P(BATCH_AXES))


def shapes_of(rank: int = 0) -> Any:
    return jax.eval_shape(block(rank, **WIDE).init, jax.random.key(0), jnp.zeros((1, 2, D)))


def test_experts_keep_the_layout_of_their_stack_on_tpus_until_a_layer_gathers_them():
    """Otherwise XLA copies the experts of all layers at the start of a step."""
    sharding = sharding_of(MeshConfig(2, 4, 1))
    module = block(0, sharding=sharding, numerics=Numerics(platform=Platform("tpu")), **WIDE)
    x = jax.ShapeDtypeStruct((ROWS, SEQ, D), jnp.float32, sharding=sharding)
    traced = jax.jit(module.apply).trace(shapes_of(), x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    part = rf"\(tensor<{EXPERTS // 4}x({D}x{F}|{F}x{D})xf32>\) ->"  # of a device
    assert len(re.findall(rf"@LayoutConstraint.*{part}", text)) == 3
    assert len(re.findall(rf"stablehlo.all_gather.*{part}", text)) == 3


def test_fewer_bytes_decide_between_rows_and_experts():
    """Qwen3-30B-A3B over 16 devices: 1.2 GB of experts a layer, 4,096 tokens, or 16 times as
    many."""
    sizes = {"d_model": 2048, "wide": 2.0, "kernel_bytes": 128 * 3 * 2048 * 768 * 2.0}
    for rows, devices, sends in ((8 * 4096, 16, True), (8 * 16 * 4096, 16, False), (8, 1, False)):
        assert experts.exchanges_less(rows, devices=devices, **sizes) == sends


def test_every_device_routes_its_own_tokens():
    """The whole gradient, counted by the compiler: an eighth on each of eight devices, on either
    kind of axis."""

    def flops(sharding: NamedSharding | None) -> float:
        module, variables = block(RANK, sharding=sharding, **WIDE), shapes_of(RANK)
        x = jax.ShapeDtypeStruct((ROWS, SEQ, D), jnp.float32, sharding=sharding)

        def loss(lora, x, variables):
            return jnp.sum(module.apply({**variables, "lora": lora}, x))

        made = (
            jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["lora"], x, variables).compile()
        )
        return float(made.cost_analysis()["flops"])

    whole = flops(None)
    assert flops(sharding_of(MeshConfig(2, 2, 2))) < 1.5 / 8 * whole


def test_experts_are_gathered_if_a_block_has_too_few_rows(monkeypatch):
    """Output, gradients and statistics of a mixture that sends rows, as on one device."""
    monkeypatch.setattr(experts, "SLACK", 0.5)
    monkeypatch.setattr(experts, "LEAST", 1)
    variables = variables_of(block())
    x = np.random.default_rng(0).normal(size=(ROWS, SEQ, 8)).astype(np.float32)

    def run(by_rows: NamedSharding | None) -> Any:
        module = block(stats=GateStatsConfig(2, 3), sharding=by_rows, experts="send")

        @jax.jit
        def step(x, variables):
            def loss(x, lora, taps):
                return jnp.sum(
                    jnp.sin(module.apply(variables | {"lora": lora, "gate_taps": taps}, x))
                )

            return jax.value_and_grad(loss, argnums=(0, 1, 2))(
                x, variables["lora"], taps_of(module)
            )

        return jax.device_get(step(x, variables))

    spread, single = run(sharding_of(MeshConfig(2, 2, 2))), run(None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), spread, single)


MIXTRAL = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL |= {"num_hidden_layers": 2, "intermediate_size": 32, "rms_norm_eps": 1e-5}
# With a shared expert in each layer.
GLM4_MOE = {"model_type": "glm4_moe", "n_routed_experts": 4, "moe_intermediate_size": 24}
GLM4_MOE |= {"n_shared_experts": 2, "first_k_dense_replace": 0}
# Latents that all devices have, and heads that they split.
DEEPSEEK = LATENT | {
    "model_type": "deepseek_v2",
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
}
# The second layer reads the keys of the first, and layers have embeddings.
GEMMA4 = {"model_type": "gemma4_text", "hidden_size": 32, "layer_types": ["full_attention"] * 2}
GEMMA4 |= {
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
}
GEMMA4 |= {"attention_k_eq_v": True, "num_kv_shared_layers": 1, "use_double_wide_mlp": True}
GEMMA4 |= {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 64}
LLAMA = {"model_type": "llama", "rope_theta": 1e4, "attention_bias": True, "mlp_bias": True}
GPT_OSS = {"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 6}
ADAPTED = {"dora": True, "dropout": 0.3}


@pytest.mark.parametrize(
    ("family", "mesh", "experts_way", "options"),
    [
        (LLAMA, MeshConfig(1, 4, 2), "auto", {}),
        (GPT_OSS, MeshConfig(2, 2, 2), "gather", ADAPTED),
        (GLM4_MOE, MeshConfig(2, 4, 1), "send", {"kind": "int8"}),
        (GLM4_MOE, MeshConfig(2, 2, 2), "gather", {"kind": "fp8"}),
        (GEMMA4, MeshConfig(2, 2, 2), "gather", {}),
        (DEEPSEEK, MeshConfig(2, 2, 2), "gather", {}),
    ],
    ids=lambda value: (
        value.get("model_type", str(value)) if isinstance(value, dict) else str(value)
    ),
)
def test_eight_devices_are_one(family, mesh, experts_way, options, monkeypatch):
    """Loss, gradients and statistics through the scan over layers; tests/mesh/test_context.py
    splits rows."""
    monkeypatch.setattr(experts, "SLACK", 4.0)
    monkeypatch.setattr(experts, "LEAST", 1)
    options = dict(options)
    kind, base = options.pop("kind", None), ModelConfig.from_hf(MIXTRAL | family)
    remat = "dots" if family is LLAMA else "none"
    checks = (
        GateChecks(1e-5) if family in (LLAMA, GPT_OSS) else None
    )  # of a dense block, and of experts
    rules = LoRARule("(ffn|attn|tail)/", RANK), LoRARule("", 0)
    spec = resolve(LoRAConfig(rules=rules, **options), projection_shapes(base), layer_numbers(base))
    params = init_params(base, jax.random.key(0))
    params = trees.map_named(
        lambda path, x: x + 0.3 if path.endswith(("bias", "sinks")) else x, params
    )
    lora = jax.tree.map(lambda x: x + 0.1, init_lora(base, spec, jax.random.key(1), params))
    if kind == "fp8":
        params = scaled_params(params)
    elif kind:
        params = quantize_params(params, kind)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (ROWS, SEQ)).astype(np.int32)
    shapes = {f"{path}/mask": shape for path, (shape, _) in gate_blocks(base).items()}
    masks = trees.unflatten(
        {path: jnp.float32(rng.uniform(size=shape)) for path, shape in shapes.items()}
    )

    def run(by_rows: NamedSharding | None) -> Any:
        stats = GateStatsConfig(stride=2, probe_stride=3, checks=checks, sharding=by_rows)
        given = {
            "remat": remat,
            "stats": stats,
            "shardings": Shardings(by_rows, by_rows),
            "experts": experts_way,
        }
        model = Decoder(base, spec, Numerics(), **given)
        placed, rows = params, tokens
        if by_rows is not None:
            places = sharding.shardings(params, by_rows.mesh, sharding.PARAM_RULES)
            placed, rows = jax.device_put(params, places), jax.device_put(tokens, by_rows)

        @jax.jit
        def step(lora, params, tokens):
            def loss(lora, taps):
                variables = {"params": params, "lora": lora, "gate_taps": taps, "gate_mask": masks}
                options = {"deterministic": False, "rngs": {"dropout": jax.random.key(7)}}
                hidden = model.apply(variables, tokens, **options)
                return jnp.mean(jnp.square(hidden)) + jnp.mean(hidden[..., 0])

            value, (grads, stats) = jax.value_and_grad(loss, argnums=(0, 1))(lora, taps_of(model))
            return {"loss": value, "grads": grads, "stats": stats}

        return jax.device_get(step(lora, placed, rows))

    def over_shards(path: str, value: Any) -> Any:
        return (np.max if path.rpartition("/")[2] in CHECKS else np.sum)(value, axis=1)

    spread, single = run(sharding_of(mesh)), run(None)
    spread["stats"] = trees.map_named(over_shards, spread["stats"])
    # Gemma 4 does not scale scores by the head's size, which amplifies rounding.
    rounding = 1e-3 if family is GEMMA4 else 3e-6
    ours, theirs = trees.flatten(spread), trees.flatten(single)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        name = path.rpartition("/")[2]
        if name in CHECKS:  # largest error of a part of the tokens, not of all
            assert np.all(ours[path] <= 1), path
            continue
        limit = rounding * max(1.0, float(np.max(np.abs(value))))
        if name == "occupancy":  # counts, of numbers whose rounding may take them over a cut
            limit = 2
        np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=limit, err_msg=path)
    assert {path.rpartition("/")[0] for path in trees.flatten(single["stats"])} == gate_blocks(
        base
    ).keys()


def test_evaluation_routes_by_shard_as_training_does(monkeypatch):
    """The model that a run evaluates, and the one that other verbs load."""
    base, mesh = ModelConfig.from_hf(MIXTRAL), distributed.make_mesh(MeshConfig(2, 2, 2))
    trained = build_model(
        RunConfig(compute=ComputeConfig(dtype="float32")), base, AdapterSpec(), mesh
    )
    evaluated = Assembly.eval_model.fget(SimpleNamespace(model=trained))
    loaded = SimpleNamespace(
        config=base, params=jax.eval_shape(init_params, base, jax.random.key(0)), processor=None
    )
    monkeypatch.setattr("nalora_jax.loading.adapted.load_model", lambda *_, **__: loaded)
    for model in (evaluated, load("some", mesh=mesh, resolved=loaded).module):
        assert model.shardings.rows is None
        assert model.shardings.routed.spec[0] == BATCH_AXES
