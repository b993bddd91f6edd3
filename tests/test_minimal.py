"""docs/nalora_minimal.py trains as the library does."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax import config as cfg
from nalora_jax.common import trees
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.program import assemble
from tests import tiny

STEPS, ROWS, TOKENS, RATE, WARMUP = 12, 4, 17, 4e-3, 3


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    path = Path(__file__).parent.parent / "docs" / "nalora_minimal.py"
    module = ModuleType("nalora_minimal")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def library_adapters(page: Any, rule: str, params: Any, lora: Any, batches: list[np.ndarray]) -> Any:
    """Returns the adapters after training with the library, in float32 with plain XLA."""
    config = cfg.RunConfig(
        lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn/", page.rank, page.alpha),)),
        optimizer=cfg.OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_share=0.0),
        train=cfg.TrainConfig(batch_size=ROWS),
        steps=STEPS,
        compute=cfg.ComputeConfig(dtype="float32", implementation="xla", stats_stride=1, probe_stride=1),
        mechanisms=(f"{rule}:warmup={WARMUP}",),
    )
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = (page.vocab, page.d_model, page.d_ff, page.layers, page.heads)
    fields = tiny.HF | dict(zip(names, sizes, strict=True))
    fields |= {"num_key_value_heads": page.heads, "rope_theta": page.rope_theta, "rms_norm_eps": page.eps}
    assembly = assemble(config, ModelConfig.from_hf(fields), params, tiny.one_device())
    state = assembly.begin(jax.tree.map(jnp.array, lora), 0)
    for tokens in batches:
        batch = tiny.whole_batch(0, (1, ROWS, TOKENS - 1))
        batch |= {"tokens": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
        state, _ = assembly.step(assembly.params, state, batch)
    return state.lora


@pytest.mark.parametrize("rule", ["squared", "homogeneity", "curvature_cap"])
def test_the_page_makes_the_updates_of_the_library(minimal: ModuleType, rule: str) -> None:
    page = minimal.Config(rule=rule, warmup=WARMUP)
    params, lora = minimal.init(jax.random.key(0), page)
    params["embed"]["embedding"] *= 0.3
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, page.vocab, (ROWS, TOKENS), dtype=np.int32) for _ in range(STEPS)]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))
    step = jax.jit(functools.partial(minimal.train_step, optimizer=optimizer, config=page))
    state = minimal.init_state(lora, optimizer, page)
    with jax.numpy_rank_promotion("allow"):  # the page is written for reading
        for tokens in batches:
            state, _ = step(params, state, tokens)
    theirs = trees.flatten(library_adapters(page, rule, params, lora, batches))
    ours = trees.flatten(state.lora)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        start = trees.flatten(lora)[path]
        change = np.abs(np.asarray(value) - start).max()
        np.testing.assert_allclose(ours[path], value, rtol=0, atol=2e-3 * change, err_msg=path)
