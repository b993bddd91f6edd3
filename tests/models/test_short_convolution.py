"""Models with gated short convolutions: gates, and the operations that `plan` counts (steps: `test_context`)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.estimates import attention_flops
from nalora_jax.method.low_rank import find_gates
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import gate_blocks
from nalora_jax.ops.causal_conv import causal_conv
from nalora_jax.train.program import assemble
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
CONFIG = RunConfig(lora=LoRAConfig(rules=(LoRARule("ffn/(gate|down)_proj", 4), LoRARule("conv/", 3))))
RELEASED = Path(__file__).parents[2] / "nalora_jax/cli/planning/released/LFM2-1.2B.json"


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
