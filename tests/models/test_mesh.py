"""Decoders and experts on a mesh: eight devices are one, and each does an eighth of the work."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.layout import distributed
from nalora_jax.method import statistics
from nalora_jax.method.ffn import Adapters
from nalora_jax.method.measurement import CHECKS, GateChecks, GateStatsConfig
from nalora_jax.models import experts
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.stacks import gate_blocks, layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops.dispatch import Numerics, Platform
from nalora_jax.ops.quantize import quantize
from nalora_jax.ops.reductions import count
from nalora_jax.train.adapted import load
from nalora_jax.train.program import Assembly, build_model
from tests.models.family_fields import TINY
from tests.observed import taps_of
from tests.param_trees import init_params

EXPERTS, D, F, RANK, ROWS, SEQ = 4, 64, 128, 3, 8, 12
STATS = GateStatsConfig(stride=2, probe_stride=3, checks=GateChecks(1e-5))
NAMES = (*statistics.STANDARD, "excess", "delta", "delta_squared")


GPT_OSS = {"use_bias": True, "router_bias": True, "up_limit": 1.0, "activation": "clamped_swish(1.702,1.0)"}


def block(
    sharding: NamedSharding | None = None,
    *,
    by_shard: bool = False,
    experts: str = "gather",
    **options: Any,
) -> MoEFFN:
    names = ("gate_proj", "up_proj", "down_proj")
    variant = GPT_OSS if options.pop("gpt_oss", False) else {}
    adapters = Adapters(tuple((name, RANK) for name in names), **options)
    stats = replace(STATS, sharding=sharding) if by_shard else STATS
    return MoEFFN(
        D, F, EXPERTS, 2, adapters=adapters, stats=stats, sharding=sharding, experts=experts, **variant
    )


def over_shards(sums: Any, axis: int) -> Any:
    def reduced(path: str, value: Any) -> Any:
        return (np.max if path.rpartition("/")[2] in CHECKS else np.sum)(value, axis=axis)

    return trees.map_named(reduced, sums)


def variables_of(module: MoEFFN, kind: str = "") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, D)))
    lora = {
        name: {**leaf, "b": rng.normal(size=leaf["b"].shape) * 0.2} for name, leaf in made["lora"].items()
    }
    params = dict(made["params"])
    for name in params:
        if "bias" in params[name]:
            params[name] = {**params[name], "bias": rng.normal(size=params[name]["bias"].shape)}
    for name in lora if kind else ():
        params[name] = {**params[name], "kernel": quantize(params[name]["kernel"], kind)}
    if not kind:  # as PiSSA leaves them
        gate = {
            "start_a": made["lora"]["gate_proj"]["a"],
            "start_b": 0.1 * rng.normal(size=(EXPERTS, RANK, F)),
        }
        params["gate_proj"] = {**params["gate_proj"], **gate}
    mask = {"mask": rng.uniform(size=(EXPERTS, F))}
    return jax.tree.map(
        lambda x: x if np.issubdtype(x.dtype, np.integer) else jnp.asarray(x, jnp.float32),
        {"params": params, "lora": lora, "gate_mask": mask},
    )


def results(module: MoEFFN, variables: dict[str, Any], *, dropout: bool) -> dict[str, Any]:
    """Output, gradients, and statistics of both passes; where the module has a mesh, the arrays are laid out on it."""
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(v, jnp.float32) for v in rng.normal(size=(2, ROWS, SEQ, D)))
    lengths = rng.integers(1, SEQ + 1, (ROWS, 1))
    weights = jnp.asarray(np.arange(SEQ) < lengths, jnp.float32)
    if module.sharding is not None:
        mesh = module.sharding.mesh
        x, g, weights = (jax.device_put(v, module.sharding) for v in (x, g, weights))
        places = distributed.shardings(variables["params"], mesh, distributed.PARAM_RULES)
        variables = variables | {"params": jax.device_put(variables["params"], places)}

    @jax.jit
    def run(lora, taps, x, variables):
        def loss(lora, taps, x):
            y = module.apply(
                {**variables, "lora": lora, "gate_taps": taps},
                x,
                {"gate_proj": 2.0, "up_proj": 1.5, "down_proj": jnp.float32(0.5)},
                token_weights=weights,
                deterministic=not dropout,
                rngs={"dropout": jax.random.key(7)},
            )
            return jnp.sum(y * g), y

        grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(lora, taps, x)
        return {"y": y, "lora": grads[0], "taps": grads[1], "x": grads[2]}

    found: dict[str, Any] = jax.device_get(run(variables["lora"], taps_of(module, NAMES), x, variables))
    if count(module.stats.sharding) > 1:
        found["taps"] = over_shards(found["taps"], axis=0)
    return found


def sharding_of(mesh: MeshConfig) -> NamedSharding:
    return NamedSharding(distributed.make_mesh(mesh), P(BATCH_AXES))


def assert_close(spread: Any, single: Any, rounding: float = 3e-6) -> None:
    ours, theirs = trees.flatten(spread), trees.flatten(single)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        limit = rounding * max(1.0, float(np.max(np.abs(value))))
        if path.rpartition("/")[2] in CHECKS:  # largest error of a part of the tokens, not of all
            assert np.all(ours[path] <= 1), path
            continue
        np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=limit, err_msg=path)


@pytest.mark.parametrize(
    ("mesh", "kind", "options"),
    [
        (MeshConfig(1, 4, 2), "int8", {}),
        (MeshConfig(2, 2, 2), "", {"gpt_oss": True, "dora": True, "dropout": 0.3}),
        (
            MeshConfig(1, 2, 4),
            "nf4",
            {},
        ),  # F holds two blocks of 64: no four parts of it, so every device has all
    ],
    ids=str,
)
def test_eight_devices_are_one(mesh, kind, options):
    single = block(**options)
    variables = variables_of(single, kind)
    dropout = "dropout" in options
    by_shard = kind in ("", "nf4")  # as a step has them; else as whoever calls a model on a mesh
    spread = results(block(sharding_of(mesh), by_shard=by_shard, **options), variables, dropout=dropout)
    assert_close(spread, results(single, variables, dropout=dropout))


@pytest.mark.parametrize(
    ("mesh", "kind", "slack", "options"),
    [
        (MeshConfig(2, 4, 1), "", 4.0, {"gpt_oss": True, "dora": True}),
        (MeshConfig(1, 4, 2), "int8", 4.0, {}),
        (MeshConfig(2, 2, 2), "", 0.5, {}),  # blocks are too small, so that all devices gather the experts
    ],
    ids=str,
)
def test_experts_that_rows_are_sent_to_are_those_of_one_device(mesh, kind, slack, options, monkeypatch):
    monkeypatch.setattr(experts, "SLACK", slack)
    monkeypatch.setattr(experts, "LEAST", 1)
    single = block(**options)
    variables = variables_of(single, kind)
    spread = results(
        block(sharding_of(mesh), by_shard=not kind, experts="send", **options), variables, dropout=False
    )
    assert_close(spread, results(single, variables, dropout=False))


def test_experts_keep_the_layout_of_their_stack_on_tpus_until_a_layer_gathers_them():
    """Otherwise XLA copies the experts of all layers at the start of a step."""
    sharding = sharding_of(MeshConfig(2, 4, 1))
    module = block(sharding).clone(numerics=Numerics(platform=Platform("tpu")))
    variables = jax.eval_shape(lambda: variables_of(block()))
    x = jax.ShapeDtypeStruct((ROWS, SEQ, D), jnp.float32, sharding=sharding)
    traced = jax.jit(lambda variables, x: module.apply(variables, x)).trace(variables, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    part = rf"\(tensor<{EXPERTS // 4}x({D}x{F}|{F}x{D})xf32>\) ->"  # of a device
    assert len(re.findall(rf"@LayoutConstraint.*{part}", text)) == 3
    assert len(re.findall(rf"stablehlo.all_gather.*{part}", text)) == 3


def test_fewer_bytes_decide_between_rows_and_experts():
    """Qwen3-30B-A3B over 16 devices: 1.2 GB of experts a layer, rows of 4,096 tokens, of 16 times as many, of one."""
    kernels, least = (
        128 * 3 * 2048 * 768 * 2.0,
        partial(experts.exchanges_less, d_model=2048, wide=2.0),
    )
    assert least(8 * 4096, kernel_bytes=kernels, devices=16)
    assert not least(8 * 16 * 4096, kernel_bytes=kernels, devices=16)
    assert least(8, kernel_bytes=kernels, devices=16)
    assert not least(8, kernel_bytes=kernels, devices=1)


def test_every_device_routes_its_own_tokens():
    """The whole gradient, counted by the compiler: an eighth on each of eight devices, on either kind of axis."""

    def flops(sharding: NamedSharding | None) -> float:
        module = block(sharding)
        variables = jax.eval_shape(lambda: variables_of(block()))
        x = jax.ShapeDtypeStruct((ROWS, SEQ, D), jnp.float32, sharding=sharding)

        def loss(lora, x, variables):
            return jnp.sum(module.apply({**variables, "lora": lora}, x))

        made = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["lora"], x, variables).compile()
        return float(made.cost_analysis()["flops"])

    whole = flops(None)
    assert flops(sharding_of(MeshConfig(2, 2, 2))) < 1.2 / 8 * whole


MIXTRAL = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL |= {"num_hidden_layers": 2, "intermediate_size": 32, "rms_norm_eps": 1e-5}


# A dense layer, and one with experts and a shared expert.
GLM4_MOE = {
    "model_type": "glm4_moe",
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
}


# Every feature of the released sizes at once.
GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "sliding_window": 6,
}
LLAMA = {"model_type": "llama", "rope_theta": 1e4, "attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("family", "mesh", "experts"),
    [
        (LLAMA, MeshConfig(1, 4, 2), "auto"),
        (GLM4_MOE, MeshConfig(2, 2, 2), "send"),
        (GEMMA4, MeshConfig(2, 2, 2), "gather"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_loss_gradients_and_statistics_of_a_decoder(family, mesh, experts):
    """Through the scan over layers and rematerialization; tests/layout/test_context.py splits rows."""
    base = ModelConfig.from_hf(MIXTRAL | family)
    rules = LoRARule("(ffn|attn|tail)/", RANK), LoRARule("", 0)
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(base), layer_numbers(base))
    params, lora = init_params(base, jax.random.key(0)), init_lora(base, spec, jax.random.key(1))
    params = trees.map_named(lambda path, x: x + 0.3 if path.endswith(("bias", "sinks")) else x, params)
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, SEQ)).astype(np.int32)

    def run(sharding: NamedSharding | None) -> Any:
        stats = replace(STATS, sharding=sharding)
        model = Decoder(
            base, spec, Numerics(), remat="dots", stats=stats, activation_sharding=sharding, experts=experts
        )
        placed = params
        rows = tokens
        if sharding is not None:
            placed = jax.device_put(
                params, distributed.shardings(params, sharding.mesh, distributed.PARAM_RULES)
            )
            rows = jax.device_put(tokens, sharding)

        @jax.jit
        def step(lora, params, tokens):
            def loss(lora, taps):
                hidden = model.apply({"params": params, "lora": lora, "gate_taps": taps}, tokens)
                return jnp.mean(jnp.square(hidden)) + jnp.mean(hidden[..., 0])

            value, (grads, stats) = jax.value_and_grad(loss, argnums=(0, 1))(lora, taps_of(model))
            return {"loss": value, "grads": grads, "stats": stats}

        return jax.device_get(step(lora, placed, rows))

    spread, single = run(sharding_of(mesh)), run(None)
    # Gemma 4 does not scale scores by the head's size, which amplifies rounding.
    rounding = 1e-3 if family is GEMMA4 else 3e-6
    assert_close(spread | {"stats": over_shards(spread["stats"], axis=1)}, single, rounding)
    assert {path.rpartition("/")[0] for path in trees.flatten(single["stats"])} == gate_blocks(base).keys()


def test_evaluation_routes_by_shard_as_training_does(monkeypatch):
    """The model that a run evaluates, and the one that other verbs load."""
    base, mesh = ModelConfig.from_hf(MIXTRAL), distributed.make_mesh(MeshConfig(2, 2, 2))
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn/", RANK),)), projection_shapes(base), base.n_layers)
    trained = build_model(RunConfig(compute=ComputeConfig(dtype="float32")), base, spec, mesh)
    evaluated = Assembly.eval_model.fget(SimpleNamespace(model=trained))
    loaded = SimpleNamespace(config=base, params=init_params(base, jax.random.key(0)))
    monkeypatch.setattr(import_module("nalora_jax.train.adapted"), "load_model", lambda *_, **__: loaded)
    for model in (evaluated, load("some", mesh=mesh, resolved=loaded).module):
        assert model.activation_sharding is None
        assert model.routing_sharding.spec[0] == BATCH_AXES
