"""Adapters that must not be read, requests that must not be written: one error that names the field, nothing left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.common.trees import map_named
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export
from tests.weights.conftest import COMMON
from tests.weights.in_peft import write_adapter

FFN = {f"ffn/{name}_proj": ((4, 4, 4), (8.0, 8.0, 8.0)) for name in ("gate", "up", "down")}
LLAMA = ModelConfig.from_hf(COMMON | {"model_type": "llama"})


@pytest.fixture
def good(random_lora, tmp_path):
    """The folder of an adapter, its settings and its tensors."""
    adapter, folder = random_lora(LLAMA, FFN), tmp_path / "good"
    export_adapter(*adapter, LLAMA, folder, base_model_name="org/base", fingerprint="abc")
    settings = json.loads((folder / "adapter_config.json").read_text())
    return folder, settings, load_file(folder / "adapter_model.safetensors")


MISSING = object()
INDICES = "trainable_token_indices"
PATTERNS = {f"layers.{i}.mlp": 4 for i in range(100_000)}
BAD_CONFIGS = [
    ({"r": MISSING}, "r: expected a whole number from 1 to 1048576, found nothing"),
    ({"r": 0}, "r: expected"),
    ({"r": 8}, "shape"),
    ({"r": 10**400}, "r: expected a whole number from 1 to 1048576"),
    ({"lora_alpha": MISSING}, "lora_alpha: expected a finite number above 0, found nothing"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number above 0"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "expected the trained lm_head of modules_to_save, found nothing"),
    ({"modules_to_save": ["score"]}, "modules_to_save: expected some of embed_tokens, lm_head"),
    ({INDICES: [1, 2]}, "token_adapter.trainable_tokens_delta: expected the trained rows of embed_to"),
    ({INDICES: [47, 48]}, f"{INDICES}: expected token ids of the 48 rows .* found 48;"),
    ({INDICES: [1, 1]}, f"{INDICES}: expected a list of different token ids"),
    ({INDICES: {"lm_head": "5"}}, f"{INDICES}: expected a list of different token ids"),
    ({INDICES: {"wte": [5]}}, "expected token ids of embed_tokens and lm_head .* found wte"),
    (
        {INDICES: [5], "modules_to_save": ["model.embed_tokens"]},
        f"{INDICES}: expected rows of tables that modules_to_save does not name",
    ),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"some_future_feature": 1}, "some_future_feature"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": ["gate_proj", "up_proj"]}, "cover model.layers.0.mlp.down_proj"),
    ({"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}, "layers.0.self_attn.q_proj"),
    ({"target_modules": "(gate"}, "regular expression"),
    ({"target_modules": "mlp{99999999999}"}, "target_modules: expected a regular expression"),
    ({"target_modules": {"gate_proj": 1}}, "target_modules"),
    ({"target_modules": "all-linear"}, "self_attn.q_proj"),
    ({"target_modules": r".*mlp.*", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_to_transform": [0, 1]}, "cover model.layers.2.mlp.down_proj"),
    ({"layers_to_transform": [0], "layers_pattern": ["lay(ers"]}, "layers_pattern: expected a regular"),
    ({"layers_to_transform": [0], "layers_pattern": ["(?P<idx>layers)"]}, "layers_pattern"),
    ({"layers_pattern": list(PATTERNS)}, "layers_pattern: expected at most 4,096 patterns, found 100,000"),
    ({"exclude_modules": ["up_proj"]}, "cover model.layers.0.mlp.up_proj"),
    ({"rank_pattern": {"up_proj": 3}}, r"up_proj \(a\): expected shape \(3, 16\)"),
    ({"rank_pattern": {"up_proj": None}}, "rank_pattern: up_proj"),
    ({"rank_pattern": {"up_proj": 10**30}}, "rank_pattern: up_proj: expected a whole number from 1 to"),
    ({"rank_pattern": {"(" * 5000 + ")" * 5000: 2}}, "rank_pattern: expected a regular expression"),
    ({"rank_pattern": PATTERNS}, "rank_pattern: expected at most 4,096 patterns, found 100,000"),
    ({"alpha_pattern": {"up_proj": -(10**400)}}, "alpha_pattern: up_proj"),
    ({"alpha_pattern": PATTERNS}, "alpha_pattern: expected at most 4,096 patterns, found 100,000"),
    ({"use_dora": True}, "lora_magnitude_vector"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_bad_configs_are_refused_by_name(change, message, good, tmp_path):
    _, settings, tensors = good
    settings = {key: value for key, value in (settings | change).items() if value is not MISSING}
    with pytest.raises(NaloraError, match=message):
        import_adapter(write_adapter(tmp_path / "bad", settings, tensors), LLAMA)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
MAGNITUDE = KEY.replace("lora_A.weight", "lora_magnitude_vector")
BAD_TENSORS = [
    (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "another prefix"),
    (lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()}, "save_pretrained"),
    (
        lambda t: {k.replace("model.layers", "transformer.layers"): v for k, v in t.items()},
        "unknown module",
    ),
    (lambda t: t | {KEY.replace("layers.1", "layers.9"): t[KEY]}, r"layers\.9"),
    (
        lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[KEY]},
        "lm_head.lora_.*found an adapter of the embedding or the head; train",
    ),
    (lambda t: t | {"base_model.model.lm_head.weight": t[KEY]}, "lm_head"),
    (lambda t: {k: v for k, v in t.items() if k != KEY}, "lora_A"),
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}, "layers.1.mlp.up_proj"),
    (lambda t: {}, "layers.0.mlp"),
    (lambda t: t | {KEY: t[KEY][:, :-1].copy()}, "another base model"),
    (lambda t: t | {KEY: t[KEY].T.copy()}, "shape"),
    (lambda t: t | {KEY: t[KEY].astype(np.int32)}, "I32"),
    (lambda t: t | {KEY: t[KEY] * np.float32("nan")}, "NaN"),
    (lambda t: t | {MAGNITUDE: np.ones(24, np.float32)}, "magnitude"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_bad_tensors_are_refused_by_name(change, message, good, tmp_path):
    _, settings, tensors = good
    with pytest.raises(NaloraError, match=message):
        import_adapter(write_adapter(tmp_path / "bad", settings, change(tensors)), LLAMA)


def test_bad_files_are_refused(good, tmp_path):
    folder, *_ = good

    def refused(message: str, folder: Path = folder, config: ModelConfig = LLAMA, **options: Any) -> None:
        with pytest.raises(NaloraError, match=message):
            import_adapter(folder, config, **options)

    refused("abc", fingerprint="another")
    import_adapter(folder, LLAMA, fingerprint="abc")
    refused("another base model", config=dataclasses.replace(LLAMA, d_ff=32))
    data = (folder / "adapter_model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (folder / "adapter_model.safetensors").write_bytes(data[:size])
        refused("complete safetensors file")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused("pickle")
    for text in ("", "[1, 2]", "{", "\xff\xfe", '{"r": ' + "[" * 100_000):
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused("JSON")
    refused(r"adapter_config\.json", tmp_path / "nothing")


def test_an_earlier_adapter_is_replaced_on_request_and_nothing_else(random_lora, tmp_path):
    lora, spec = random_lora(LLAMA, FFN)

    def export(lora: Any, **options: Any) -> None:
        export_adapter(lora, spec, LLAMA, tmp_path / "a", base_model_name="b", **options)

    export(lora)
    with pytest.raises(NaloraError, match=r"holds adapter_config\.json"):
        export(lora)
    lora = map_named(lambda _, leaf: leaf * 2, lora)
    export(lora, overwrite=True)
    verify_export(tmp_path / "a", lora, spec, LLAMA)
    (tmp_path / "a/notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match=r"notes\.txt"):
        export(lora, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


GATE = {"ffn/gate_proj": FFN["ffn/gate_proj"]}


@pytest.mark.parametrize(
    ("family", "targets", "dora", "options", "message"),
    [
        ("phi3", GATE, True, {}, r"mlp\.gate_up_proj"),  # half of a fused module
        ("mixtral", FFN, True, {}, "experts"),
        ("llama", FFN, True, {"target": "vllm"}, "use_dora"),
        ("llama", FFN, False, {"target": "vllm", "max_lora_rank": 3}, "max_lora_rank"),
    ],
)
def test_what_no_tool_could_read_is_not_written(
    family, targets, dora, options, message, tiny_model, random_lora, tmp_path
):
    _, config = tiny_model(family)
    lora, spec = random_lora(config, targets, dora=dora)
    with pytest.raises(NaloraError, match=message):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", **options)
    spec = AdapterSpec((*spec.targets, ("layers/ffn/extra_proj", spec.targets[0][1])))
    with pytest.raises(NaloraError, match="extra_proj"):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b")
    assert not list(tmp_path.iterdir())
