"""Models with gated short convolutions: a train step on a mesh, gates, and the operations that `plan` counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common import trees
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, MeshConfig, OptimizerConfig, RunConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.estimates import attention_flops
from nalora_jax.method.transform import find_gates
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import gate_blocks
from nalora_jax.ops.causal_conv import causal_conv
from nalora_jax.train.assembly import assemble
from tests.param_trees import init_params

BASE = ModelConfig.from_hf(
    {
        "model_type": "lfm2",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    }
)
# SGD moves adapters by their gradients; Adam would divide small gradients by their noise.
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(
        rules=(LoRARule("ffn/(gate|down)_proj", 4), LoRARule("conv/", 3), LoRARule("attn/q_proj", 2))
    ),
    mechanisms=("soft:power=2,warmup=1",),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.5, clip_norm=0.0, schedule="constant"),
    compute=ComputeConfig(dtype="float32", probe_stride=1, remat="none"),
)
RELEASED = Path(__file__).parents[2] / "nalora_jax/plan/released/LFM2-1.2B.json"


def batch() -> dict[str, np.ndarray]:
    """Two packed sequences and padding in every row."""
    rng, place = np.random.default_rng(0), np.arange(16)[None]
    cut, end = rng.integers(2, 7, (8, 1)), rng.integers(9, 17, (8, 1))
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    tokens, targets = rng.integers(0, 96, (2, 8, 16)).astype(np.int32)
    arrays = {"tokens": tokens, "targets": targets, "segment_ids": segments}
    arrays |= {"positions": np.where(place < cut, place, place - cut).astype(np.int32)}
    return {name: x[None] for name, x in arrays.items()} | {
        "loss_weights": (segments > 0).astype(np.float32)[None]
    }


def trained(mesh: MeshConfig, remat: str):
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    devices_in_mesh = distributed.make_mesh(mesh, devices)
    params = init_params(BASE, jax.random.key(1))
    params = jax.device_put(params, distributed.shardings(params, devices_in_mesh, distributed.PARAM_RULES))
    assembly = assemble(
        replace(CONFIG, compute=replace(CONFIG.compute, remat=remat)), BASE, params, devices_in_mesh
    )
    state, losses = assembly.state, []
    for _ in range(3):
        state, metrics = assembly.step(
            params, state, distributed.make_global_batch(batch(), assembly.mesh, rows_axis=1)
        )
        losses.append(float(metrics["loss"]))
    return trees.flatten(jax.device_get((state.lora, state.gate))), losses


def test_eight_devices_and_rematerialization_train_as_one_device():
    alone, losses = trained(MeshConfig(1, 1, 1), "none")
    spread, spread_losses = trained(MeshConfig(2, 2, 2), "dots")
    assert losses[2] < losses[0]
    np.testing.assert_allclose(spread_losses, losses, rtol=1e-5)
    for path, leaf in alone.items():
        np.testing.assert_allclose(spread[path], leaf, rtol=1e-4, atol=2e-6, err_msg=path)


def test_gates_are_those_of_the_feed_forward_blocks():
    devices = distributed.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    lora = assemble(CONFIG, BASE, init_params(BASE, jax.random.key(1)), devices).state.lora
    assert set(find_gates(lora).values()) == set(gate_blocks(BASE))
    assert any("/conv/bcx_proj/" in path for path in trees.flatten(lora))


def test_operations_of_a_convolution_are_those_of_its_program():
    base, seq = ModelConfig.from_hf(json.loads(RELEASED.read_text())), 64
    one = replace(base, kinds=(), layer_kinds=(), n_layers=1, mixer=dict(base.kinds[1])["mixer"])

    def taps(u, kernel):
        return causal_conv(u, kernel, jnp.ones((1, seq), jnp.int32))

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, seq, one.d_model), (3, one.d_model)]
    ]
    gates, selects = 2 * seq * one.d_model, 2 * seq * one.d_model  # one select for each earlier token
    compiled = gates - selects + jax.jit(taps).lower(*shapes).compile().cost_analysis()["flops"]
    assert attention_flops(one, seq) == one.mixer.flops(one, seq)
    assert 0.95 < compiled / attention_flops(one, seq) < 1.05
