"""A mixture with a shared expert: names of its projections and gates, and the router's groups."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from nalora_jax.config import LoRAConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.routing import RouterSpec, choose
from nalora_jax.models.stacks import gate_blocks, layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.peft_settings import rules_of

GLM = ModelConfig.from_hf(
    {
        "model_type": "glm4_moe",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
    }
)


def test_a_layer_has_a_gate_of_experts_and_a_gate_of_the_shared_expert():
    assert gate_blocks(GLM) == {
        "layers/group0/block0/ffn": ((1, 24), "silu"),
        "layers/group1/block0/ffn/experts_ffn": ((2, 4, 8), "silu"),
        "layers/group1/block0/ffn/shared_ffn": ((2, 16), "silu"),
    }


def test_the_default_rules_adapt_dense_layers_experts_and_shared_experts():
    shapes = projection_shapes(GLM)
    adapted = {path for path, _ in resolve(LoRAConfig(), shapes, layer_numbers(GLM)).targets}
    assert adapted == {path for path in shapes if "/attn/" not in path}
    assert sum("ffn/" in path for path in adapted) == 9
    assert rules_of(rank=2, alpha=4, targets=["gate_proj"]) == ["ffn/gate_proj:2:4"]  # matches all three


def test_experts_are_chosen_within_the_best_groups():
    """Group 0 has the highest score, group 1 the highest sum of two; the weights do not have the correction."""
    scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.2, 0.2]])
    logits, spec = (
        jnp.asarray(np.log(scores / (1 - scores)), jnp.float32),
        RouterSpec("sigmoid", groups=3, groups_kept=1),
    )
    weights, chosen = choose(logits, 2, spec)
    assert chosen.tolist() == [[2, 3]]
    np.testing.assert_allclose(weights, [[6 / 11, 5 / 11]], rtol=1e-6)
    corrected = jnp.asarray([0, 0, 0, 0, 1.0, 0.5])
    weights, chosen = choose(logits, 2, RouterSpec("sigmoid", False, True, 3, 1, 2.5), corrected)
    assert chosen.tolist() == [[4, 5]]
    np.testing.assert_allclose(weights, [[0.5, 0.5]], rtol=1e-6)
