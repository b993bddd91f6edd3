"""Rows that the mesh axis "context" splits train as whole rows on one device do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax.assembly.program import Assembly, check_context
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
)
from nalora_jax.data.items import CompletionItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate import likelihood
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.kinds.record import run_kind
from nalora_jax.mesh import distributed, sharding
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import stacks
from tests import tiny
from tests.models.family_fields import LATENT
from tests.param_trees import init_params

RAW = tiny.GROUPED | {"head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128}
DENSE = ModelConfig.from_hf(RAW | {"model_type": "llama"})
DELTA_NET = {
    "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
WINDOWS = {
    "model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
CONVOLUTION = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}


def hybrid() -> ModelConfig:
    """Returns a model with every kind of layer: a short convolution, a delta rule, sinks with
    experts."""
    base = ModelConfig.from_hf(RAW | WINDOWS)
    kinds: list[Any] = [()]
    for raw in (CONVOLUTION, DELTA_NET):
        of_family = ModelConfig.from_hf(RAW | raw)
        mixer = next(
            stack.config.mixer for stack in stacks(of_family) if stack.config.mixer is not None
        )
        kinds.append((("mixer", mixer), ("n_experts", 0), ("up_limit", 0.0), ("ffn_bias", False)))
    windows = (GLOBAL_WINDOW, GLOBAL_WINDOW, *base.windows)
    return replace(base, n_layers=4, windows=windows, kinds=tuple(kinds), layer_kinds=(1, 2, 0, 0))


def latent() -> ModelConfig:
    """Returns a model with latent attention."""
    return ModelConfig.from_hf(RAW | LATENT | {"model_type": "youtu", "q_lora_rank": None})


ROWS, SEQ, STEPS = 2, 64, 2
CONFIG = RunConfig(
    steps=8,
    lora=LoRAConfig(rules=(LoRARule("ffn/(gate|down)_proj", 4), LoRARule("attn/(q|v)_proj", 2))),
    mechanisms=("soft:power=2,warmup=1",),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    compute=ComputeConfig(dtype="float32"),
)


def batch_of(assembly: Assembly, seed: int) -> Any:
    batch = {name: value[None] for name, value in tiny.packed_batch(seed, ROWS, SEQ).items()}
    return distributed.make_global_batch(batch, assembly.mesh, rows_axis=1)


def trained(base: ModelConfig, mesh: MeshConfig) -> tuple[Any, list[Any]]:
    """Returns the state after some steps of a run on ``base``, and their metrics."""
    assembly, params = tiny.assembled(CONFIG, base, mesh, **run_kind(CONFIG).parts(CONFIG))
    state, history = assembly.state, []
    for i in range(STEPS):
        state, metrics = assembly.step(params, state, batch_of(assembly, i))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.mark.parametrize("model", [hybrid, latent])
def test_split_rows_train_as_whole_rows(
    model: Callable[[], ModelConfig], capfd: pytest.CaptureFixture[str]
) -> None:
    state, history = trained(model(), MeshConfig(1, 1, 2, 2))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    expected, of_one = trained(model(), MeshConfig(1, 1, 1))
    for ours, theirs in zip(history, of_one, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6, atol=2e-6)
        assert ours["target_tokens"] == theirs["target_tokens"]
    for path, leaf in trees.flatten(expected.lora).items():
        error = np.max(np.abs(trees.flatten(state.lora)[path] - leaf))
        assert error <= 1e-3 * np.max(np.abs(leaf)), (path, error)
    ours = trees.flatten(state.gate)
    for path, leaf in trees.flatten(expected.gate).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=2e-4, atol=1e-6, err_msg=path)


ALONE = MeshConfig(1, 1, 1, 8)


def test_layers_of_split_rows_exchange_keys_and_values_only() -> None:
    """Both passes gather keys and values, and their gradients are summed; all other collectives are
    of weights."""
    assembly, params = tiny.assembled(CONFIG, DENSE, ALONE, **run_kind(CONFIG).parts(CONFIG))
    text = assembly.step.lower(params, assembly.state, batch_of(assembly, 0)).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    collectives = [line for line in text.splitlines() if re.search(rf" ({names})(-start)?\(", line)]
    of_layers = [line for line in collectives if "_through_layers" in line]
    of_rows = [line for line in of_layers if "shard_map" in line]
    kinds = Counter(re.findall(r"shard_map/(\w+)", line)[0] for line in of_rows)
    assert kinds == {"all_gather": 4, "reduce_scatter": 2}
    of_tokens = rf"f32\[({ROWS}|{ROWS * 8}),{SEQ // 8},"  # activations, local or of all shards
    assert not [line for line in of_layers if line not in of_rows and re.search(of_tokens, line)]


def test_models_and_rows_that_cannot_be_split_are_refused() -> None:
    dropout, tokens = "attention dropout of llama", "at most 6 for rows of 12 tokens.*found 7"
    for raw, context, message in (({"attention_dropout": 0.1}, 8, dropout), ({}, 7, tokens)):
        base = ModelConfig.from_hf(RAW | {"model_type": "llama"} | raw)
        made = distributed.make_mesh(replace(ALONE, context=context), jax.devices()[:context])
        config = replace(CONFIG, data=replace(CONFIG.data, max_length=12))
        with pytest.raises(NaloraError, match=f"--mesh.context: expected .*{message}"):
            check_context(config, base, made)


def test_held_out_losses_of_split_rows_are_those_of_whole_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "_LEAST_BLOCK", 4)
    params, results = init_params(DENSE, jax.random.key(1)), []
    items = [CompletionItem([5, 6, 7], list(range(8, 68)), "", "")] * 2
    for mesh in (None, distributed.make_mesh(ALONE)):
        placed = params
        if mesh is not None:
            placed = jax.device_put(params, sharding.shardings(params, mesh, sharding.PARAM_RULES))
        evaluator = TextEvaluator(Decoder(DENSE), None, items, mesh=mesh)
        results.append(evaluator.measure(placed, None)["loss"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)
