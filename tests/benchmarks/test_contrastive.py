from __future__ import annotations

import pytest

from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from nalora_jax.layout import distributed
from nalora_jax.layout.figures import figures
from nalora_jax.models.vision.config import DualConfig


def test_the_contrastive_step_gathers_features_and_nothing_else(script, tmp_path):
    """Each device receives what it lacks of both towers' features once; the rest are sums of gradients and counts."""
    rows, width, side, rank = 64, 32, 64, 4
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 2}
    raw = {"model_type": "clip", "projection_dim": width, "text_config": tower | words}
    raw["vision_config"] = tower | {"image_size": side, "patch_size": 16}
    config = RunConfig(
        lora=LoRAConfig(rules=(LoRARule("ffn", rank),)),
        mesh=MeshConfig(data=8),
        train=TrainConfig(batch_size=rows),
        compute=ComputeConfig(dtype="float32"),
        vision=VisionConfig("contrast"),
    )
    step, arguments = script("contrastive").contrastive_step(
        config, DualConfig.from_hf(raw), distributed.make_mesh(config.mesh), seq=8
    )
    found = figures(step, arguments, cache=tmp_path)
    gathered = [c for c in found.collectives if "gather" in c.kind]
    assert sum(c.total for c in gathered) == pytest.approx(2 * rows * width * 4 * 7 / 8)
    adapters = 2 * 2 * 2 * rank * (64 + 96) * 4  # towers, layers, projections
    gates = 2 * 2 * 96 * 4  # towers, layers, channels
    assert found.moved() < 2 * 2 * rows * width * 4 + 2 * adapters + 40 * gates
    assert found.moved() < rows * side * side * 3 / 4  # far less than images, or than anything of a tower
