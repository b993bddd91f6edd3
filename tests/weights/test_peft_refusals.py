"""Adapters that must not be read, requests that must not be written: one error that names the field, nothing left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import map_named
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export

FFN = {f"ffn/{name}_proj": ((4, 4, 4), (8.0, 8.0, 8.0)) for name in ("gate", "up", "down")}


def write(
    folder: Path, settings_: dict[str, Any], tensors: dict[str, np.ndarray], metadata: Any = None
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


@pytest.fixture
def good(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, FFN)
    export_adapter(lora, spec, config, tmp_path / "good", base_model_name="org/base", fingerprint="abc")
    settings_ = json.loads((tmp_path / "good/adapter_config.json").read_text())
    return config, tmp_path / "good", settings_, load_file(tmp_path / "good/adapter_model.safetensors")


MISSING = object()
BAD_CONFIGS = [
    ({"r": MISSING}, "r: expected a whole number from 1 to 1048576, found nothing"),
    ({"r": 0}, "r: expected"),
    ({"r": 8}, "shape"),
    ({"lora_alpha": MISSING}, "lora_alpha: expected a finite number above 0, found nothing"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"task_type": "SEQ_CLS"}, "task_type"),
    ({"bias": "lora_only"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "expected the trained lm_head of modules_to_save, found nothing"),
    ({"modules_to_save": ["score"]}, "modules_to_save: expected some of embed_tokens, lm_head"),
    (
        {"trainable_token_indices": [1, 2]},
        "token_adapter.trainable_tokens_delta: expected the trained rows of embed_to",
    ),
    (
        {"trainable_token_indices": [47, 48]},
        "trainable_token_indices: expected token ids of the 48 rows .* found 48;",
    ),
    (
        {"trainable_token_indices": [-1]},
        "trainable_token_indices: expected token ids of the 48 rows .* found -1;",
    ),
    (
        {"trainable_token_indices": [1, 1]},
        "trainable_token_indices: expected a list of different token ids",
    ),
    (
        {"trainable_token_indices": {"lm_head": "5"}},
        "trainable_token_indices: expected a list of different token ids",
    ),
    (
        {"trainable_token_indices": {"wte": [5]}},
        "expected token ids of embed_tokens and lm_head .* found wte",
    ),
    (
        {"trainable_token_indices": [5], "modules_to_save": ["model.embed_tokens"]},
        "trainable_token_indices: expected rows of tables that modules_to_save does not name",
    ),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"some_future_feature": 1}, "some_future_feature"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": ["gate_proj", "up_proj"]}, "cover model.layers.0.mlp.down_proj"),
    (
        {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
        "model.layers.0.self_attn.q_proj",
    ),
    ({"target_modules": "(gate"}, "regular expression"),
    ({"target_modules": {"gate_proj": 1}}, "target_modules"),
    ({"target_modules": "all-linear"}, "self_attn.q_proj"),
    ({"target_modules": r".*mlp.*", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_to_transform": [0, 1]}, "cover model.layers.2.mlp.down_proj"),
    ({"exclude_modules": ["up_proj"]}, "cover model.layers.0.mlp.up_proj"),
    ({"rank_pattern": {"up_proj": 3}}, r"up_proj \(a\): expected shape \(3, 16\)"),
    ({"rank_pattern": {"up_proj": None}}, "rank_pattern: up_proj"),
    ({"r": 10**400}, "r: expected a whole number from 1 to 1048576"),
    (
        {"rank_pattern": {"up_proj": 10**30}},
        "rank_pattern: up_proj: expected a whole number from 1 to 1048576",
    ),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number above 0"),
    ({"alpha_pattern": {"up_proj": -(10**400)}}, "alpha_pattern: up_proj"),
    ({"target_modules": "mlp{99999999999}"}, "target_modules: expected a regular expression"),
    (
        {"layers_to_transform": [0], "layers_pattern": ["lay(ers"]},
        "layers_pattern: expected a regular expression",
    ),
    ({"layers_to_transform": [0], "layers_pattern": ["(?P<idx>layers)"]}, "layers_pattern"),
    ({"rank_pattern": {"(" * 5000 + ")" * 5000: 2}}, "rank_pattern: expected a regular expression"),
    ({"use_dora": True}, "lora_magnitude_vector"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    BAD_CONFIGS,
    ids=[str(next(iter(c))) + str(i) for i, (c, _) in enumerate(BAD_CONFIGS)],
)
def test_bad_configs_are_refused_by_name(change, message, good, tmp_path):
    config, _, settings_, tensors = good
    settings_ = {key: value for key, value in (settings_ | change).items() if value is not MISSING}
    write(tmp_path / "bad", settings_, tensors)
    with pytest.raises(NaloraError, match=message):
        import_adapter(tmp_path / "bad", config)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
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
    (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_A.weight": t[KEY]},
        "embed_tokens.lora_.*found an adapter of the embedding or the head; train",
    ),
    (lambda t: t | {"base_model.model.lm_head.weight": t[KEY]}, "lm_head"),
    (lambda t: {k: v for k, v in t.items() if k != KEY}, "lora_A"),
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}, "layers.1.mlp.up_proj"),
    (lambda t: {}, "layers.0.mlp"),
    (lambda t: t | {KEY: t[KEY][:, :-1].copy()}, "another base model"),
    (lambda t: t | {KEY: t[KEY].T.copy()}, "shape"),
    (lambda t: t | {KEY: t[KEY].astype(np.int32)}, "I32"),
    (lambda t: t | {KEY: t[KEY] * np.float32("nan")}, "NaN"),
    (
        lambda t: t | {KEY.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(24, np.float32)},
        "magnitude",
    ),
]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "layers_pattern"])
def test_more_patterns_than_a_model_has_modules_are_refused(name, good, tmp_path):
    config, _, settings_, tensors = good
    patterns = {f"layers.{i}.mlp": 4 for i in range(100_000)}
    write(
        tmp_path / "bad",
        {**settings_, name: list(patterns) if name == "layers_pattern" else patterns},
        tensors,
    )
    with pytest.raises(NaloraError, match=rf"{name}: expected at most 4,096 patterns, found 100,000"):
        import_adapter(tmp_path / "bad", config)


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_bad_tensors_are_refused_by_name(change, message, good, tmp_path):
    config, _, settings_, tensors = good
    write(tmp_path / "bad", settings_, change(tensors))
    with pytest.raises(NaloraError, match=message):
        import_adapter(tmp_path / "bad", config)


def test_bad_files_are_refused(good, tiny_model, tmp_path):
    config, folder, *_ = good
    with pytest.raises(NaloraError, match="abc"):
        import_adapter(folder, config, fingerprint="another")
    import_adapter(folder, config, fingerprint="abc")
    with pytest.raises(NaloraError, match="another base model"):
        import_adapter(folder, tiny_model("llama", intermediate_size=32)[1])
    data = (folder / "adapter_model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (folder / "adapter_model.safetensors").write_bytes(data[:size])
        with pytest.raises(NaloraError, match="complete safetensors file"):
            import_adapter(folder, config)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(NaloraError, match="pickle"):
        import_adapter(folder, config)
    for text in ("", "[1, 2]", "{", "\xff\xfe", '{"r": ' + "[" * 100_000):
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(NaloraError, match="JSON"):
            import_adapter(folder, config)
    with pytest.raises(NaloraError, match=r"adapter_config\.json"):
        import_adapter(tmp_path / "nothing", config)


def test_an_earlier_adapter_is_replaced_on_request_and_nothing_else(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, FFN)

    def export(lora: Any, **options: Any) -> None:
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", **options)

    export(lora)
    with pytest.raises(NaloraError, match=r"holds adapter_config\.json"):
        export(lora)
    lora = map_named(lambda _, leaf: leaf * 2, lora)
    export(lora, overwrite=True)
    verify_export(tmp_path / "a", lora, spec, config)
    (tmp_path / "a/notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match=r"notes\.txt"):
        export(lora, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_adapter_of_an_unknown_projection_is_refused(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, FFN)
    spec = AdapterSpec((*spec.targets, ("layers/ffn/extra_proj", spec.targets[0][1])))
    with pytest.raises(NaloraError, match="extra_proj"):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b")


def test_dora_of_half_a_fused_module_is_refused(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("phi3")
    lora, spec = random_lora(config, {"ffn/gate_proj": FFN["ffn/gate_proj"]}, dora=True)
    with pytest.raises(NaloraError, match=r"mlp\.gate_up_proj"):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b")
    _, config = tiny_model("mixtral")
    lora, spec = random_lora(config, FFN, dora=True)
    with pytest.raises(NaloraError, match="experts"):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b")
