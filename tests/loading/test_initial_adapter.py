"""What a run takes over from an adapter on disk, before any weight is read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import flatten
from nalora_jax.config import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRARule,
    PreferenceConfig,
    RunConfig,
    VisionConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.kinds.text import write_adapter
from nalora_jax.loading.initial_adapter import lora_rules, read_initial, take_adapter_settings
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.base import load_model
from nalora_jax.weights.model_files import LoadedModel
from tests import tiny

RULES = (
    LoRARule("layers/1/ffn/up_proj", 3, 5.0),
    LoRARule("ffn", 4, 6.0),
    LoRARule("q_proj", 2, 2.0),
)
LORA = LoRAConfig(rules=RULES, rslora=True, dropout=0.25, modules_to_save=("embed_tokens",))
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(
        str(tiny.make_model(tmp_path_factory.mktemp("base") / "model")), dtype="float32"
    )


@pytest.fixture(scope="module")
def adapter(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter of random values."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    spec = adapter_spec(RunConfig(lora=LORA), loaded.config)
    rng = np.random.default_rng(0)
    fresh = init_lora(loaded.config, spec, jax.random.key(0), loaded.params)
    lora = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype("float32"), fresh)
    write_adapter(folder, loaded, lora, spec)
    return folder


def test_a_run_has_the_adapter_s_base_settings_digest_and_values(loaded, adapter) -> None:
    """Here rsLoRA and a trained table; DoRA and trained rows are in tests/test_run.py."""
    config = take_adapter_settings(RunConfig(adapter=str(adapter)))
    assert config.model == loaded.source
    assert config.adapter_sha256 == hashlib.sha256((adapter / TENSORS).read_bytes()).hexdigest()
    assert replace(config.lora, rules=RULES) == LORA
    spec = adapter_spec(config, loaded.config)
    assert spec == adapter_spec(replace(config, lora=LORA), loaded.config)
    assert take_adapter_settings(config) == config
    values = flatten(read_initial(config, loaded))
    fresh = init_lora(loaded.config, spec, jax.random.key(0), loaded.params)
    assert values.keys() == flatten(fresh).keys()
    assert np.abs(values["layers/ffn/up_proj/b"]).max() > 0.1


def test_named_settings_stay(adapter: Path) -> None:
    lora = LoRAConfig(dropout=0.5, plus_ratio=4.0, rules=RULES)
    config = take_adapter_settings(RunConfig(adapter=str(adapter), lora=lora, seed=3))
    assert config.lora == replace(LORA, dropout=0.5, plus_ratio=4.0)
    assert (
        take_adapter_settings(RunConfig(adapter=str(adapter)), named={"lora.dropout"}).lora.dropout
        == 0.0
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora": LoRAConfig(rules=(LoRARule("1/ffn/up_proj", 3, 6.0), *RULES[1:]))}, r"alpha 5 at .*1\],.*alpha 6"),
        ({"lora": LoRAConfig(init="pissa")}, r"--lora\.init: expected default with --adapter"),
        ({"adalora": AdaLoRAConfig(target_rank=4)}, r"--adalora\.target-rank: expected 0 with --adapter"),
        ({"preference": PreferenceConfig(loss="dpo")}, "--preference.loss: expected none .*nalora merge"),
        ({"vision": VisionConfig(task="classify")}, r"--vision\.task: .* or chat with --adapter"),
        ({"adapter_sha256": "0" * 64}, "expected tensors with SHA-256 0000000000000000"),
    ],
)  # fmt: skip
def test_settings_that_differ_from_the_adapter_are_one_error(adapter, changes, match) -> None:
    with pytest.raises(NaloraError, match=match):
        take_adapter_settings(check_run_config(replace(RunConfig(adapter=str(adapter)), **changes)))


def copied(adapter: Path, folder: Path) -> Path:
    """A copy of the adapter with its base's tokenizer."""
    shutil.copytree(adapter, folder)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    shutil.copy(Path(base) / "tokenizer.json", folder)
    return folder


def without_tensors(adapter: Path, loaded: LoadedModel, folder: Path) -> Path:
    copied(adapter, folder).joinpath(TENSORS).unlink()
    return folder


def with_rows_without_tokens(adapter: Path, loaded: LoadedModel, folder: Path) -> Path:
    file = copied(adapter, folder) / TENSORS
    tensors = load_file(file)
    for name in tensors:
        if "embed_tokens" in name:
            tensors[name] = np.resize(tensors[name], (32, 16))
    save_file(tensors, file)
    return folder


def with_rows_of_other_tokens(adapter: Path, loaded: LoadedModel, folder: Path) -> Path:
    lora = LoRAConfig(RULES, trainable_token_indices=(3, 5))
    spec = adapter_spec(RunConfig(lora=lora), loaded.config)
    spec = replace(spec, token_indices=(("embed_tokens", (3, 5)), ("lm_head", (3, 7))))
    values = init_lora(loaded.config, spec, jax.random.key(0), loaded.params)
    write_adapter(folder, loaded, values, spec)
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_tensors, f"{TENSORS}: expected the adapter's tensors, found No such file"),
        (
            with_rows_without_tokens,
            "expected added tokens whose ids follow .*found no added tokens, and tables of 32 rows",
        ),
        (
            with_rows_of_other_tokens,
            "trainable_token_indices: expected the same rows of every table",
        ),
    ],
)
def test_an_adapter_that_a_run_cannot_continue_is_refused(
    change: Callable[[Path, LoadedModel, Path], Path],
    match: str,
    adapter: Path,
    loaded: LoadedModel,
    tmp_path: Path,
) -> None:
    folder = change(adapter, loaded, tmp_path / "copy")
    with pytest.raises(NaloraError, match=match):
        take_adapter_settings(RunConfig(adapter=str(folder)))


# Layers of different kinds, whose projections are in several stacks.
MIXED = tiny.HF | {
    "model_type": "qwen3_moe", "num_hidden_layers": 5, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip


def test_rules_select_exactly_the_adapters_that_they_were_made_of() -> None:
    base = ModelConfig.from_hf(MIXED)
    rng = np.random.default_rng(0)
    for _ in range(8):
        targets = {}
        for path, depth in depths(base).items():
            ranks = rng.choice([0, 2, 3], depth) if rng.random() < 0.5 else [2] * depth
            alphas = [
                float(rng.choice([1, 2.5, 22.6274169979695])) if rank else 1.0 for rank in ranks
            ]
            targets[path] = TargetSpec(tuple(map(int, ranks)), tuple(alphas))
        spec = AdapterSpec(tuple((path, t) for path, t in sorted(targets.items()) if max(t.ranks)))
        found = adapter_spec(RunConfig(lora=LoRAConfig(lora_rules(spec, base))), base)
        for (path, meant), (path_of_found, resolved) in zip(
            spec.targets, found.targets, strict=True
        ):
            assert (path, meant.ranks) == (path_of_found, resolved.ranks)
            np.testing.assert_allclose(
                resolved.scales(rslora=False), meant.scales(rslora=False), rtol=1e-7
            )
