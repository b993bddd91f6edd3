"""Rows that the mesh axis "context" splits train as whole rows on one device do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax import distributed, trees
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, MeshConfig, OptimizerConfig, RunConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import init_params
from nalora_jax.train.assembly import Assembly, assemble

RAW = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RAWS = {"llama": {**RAW, "model_type": "llama"}}
ROWS, SEQ, STEPS = 2, 64, 5
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", 4), LoRARule("attn/(q|k|v|o)_proj", 2))),
    mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    compute=ComputeConfig(dtype="float32"),
)


def batch_of(seed: int, seq: int = SEQ) -> dict[str, np.ndarray]:
    """Returns rows of three segments, which end within blocks, and padding."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(3, seq - 4, (ROWS, 2)), axis=1)
    ends = np.concatenate([cuts, rng.integers(seq - 3, seq + 1, (ROWS, 1))], axis=1)
    place = np.arange(seq)[None]
    number = (place[..., None] >= ends[:, None]).sum(-1)
    first = np.take_along_axis(np.pad(ends, ((0, 0), (1, 0))), number, axis=1)
    segments = np.where(number < 3, number + 1, 0).astype(np.int32)
    weights = (rng.uniform(size=segments.shape) < 0.6) & (segments > 0)
    tokens, targets = rng.integers(0, 96, (2, ROWS, seq)).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments,
        "positions": np.where(segments > 0, place - first, 0).astype(np.int32),
    }


def assembled(name: str, config: RunConfig, mesh: MeshConfig) -> tuple[Assembly, Any]:
    base = ModelConfig.from_hf(RAWS[name])
    sizes = [size for size in (mesh.data, mesh.fsdp, mesh.context, mesh.tensor) if size]
    made = distributed.make_mesh(mesh, jax.devices()[: int(np.prod(sizes))])
    params = init_params(base, jax.random.key(1))
    params = jax.device_put(params, distributed.shardings(params, made, distributed.PARAM_RULES))
    assembly = assemble(config, base, params, made)
    rng = np.random.default_rng(3)

    def moved(path: str, x: jax.Array) -> jax.Array:
        if not path.endswith("/b"):
            return x
        return jax.device_put(jnp.asarray(rng.normal(size=x.shape) * 0.2, jnp.float32), x.sharding)

    lora = trees.map_named(moved, assembly.state.lora)
    return replace(assembly, state=assembly.state._replace(lora=lora)), params


def trained(
    name: str, mesh: MeshConfig, *, config: RunConfig = CONFIG, accumulate: int = 1, **more: Any
) -> tuple[Any, list[Any]]:
    """Returns the state and the metrics after `STEPS` steps."""
    assembly, params = assembled(name, config, mesh)
    state, history = assembly.state, []
    for i in range(STEPS):
        flat = batch_of(i) | {key: make(i) for key, make in more.items()}
        batch = {k: v.reshape(accumulate, v.shape[0] // accumulate, *v.shape[1:]) for k, v in flat.items()}
        state, metrics = assembly.step(params, state, distributed.make_global_batch(batch, assembly.mesh, rows_axis=1))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@cache
def on_one_device(name: str) -> tuple[Any, list[Any]]:
    return trained(name, MeshConfig(1, 1, 1))


def assert_equal_runs(spread: tuple[Any, list[Any]], single: tuple[Any, list[Any]]) -> None:
    (state, history), (expected, of_one) = spread, single
    for ours, theirs in zip(history, of_one, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)
        assert ours["target_tokens"] == theirs["target_tokens"]
    for path, leaf in trees.flatten(expected.lora).items():
        error = np.max(np.abs(trees.flatten(state.lora)[path] - leaf))
        assert error <= 1e-3 * np.max(np.abs(leaf)), (path, error)
    for path, leaf in trees.flatten(expected.gate).items():
        np.testing.assert_allclose(trees.flatten(state.gate)[path], leaf, rtol=2e-4, atol=1e-6, err_msg=path)


MESHES = {
    "context2": MeshConfig(1, 1, 1, 2),
    "context4": MeshConfig(1, 1, 1, 4),
    "context8": MeshConfig(1, 1, 1, 8),
    "fsdp2_context4": MeshConfig(1, 2, 1, 4),
    "data2_context2_tensor2": MeshConfig(2, 1, 2, 2),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_split_rows_train_as_whole_rows(mesh: MeshConfig) -> None:
    assert_equal_runs(trained("llama", mesh), on_one_device("llama"))
