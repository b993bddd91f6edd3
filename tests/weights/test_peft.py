from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.merge import merge
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export
from tests.weights.in_peft import load, logits, our_logits, save, wrap
from tests.weights.test_merge import GLM

FFN = {
    "ffn/gate_proj": ((4, 4, 4), (8.0, 8.0, 8.0)),
    "ffn/up_proj": ((4, 4, 4), (8.0, 8.0, 8.0)),
    "ffn/down_proj": ((4, 4, 4), (8.0, 8.0, 8.0)),
}
ATTENTION = {f"attn/{n}_proj": ((4, 4, 4), (8.0, 8.0, 8.0)) for n in "qkvo"}
MIXED = {
    "ffn/gate_proj": ((4, 2, 4), (8.0, 8.0, 3.0)),
    "ffn/up_proj": ((3, 3, 3), (8.0, 8.0, 8.0)),
    "ffn/down_proj": ((0, 4, 0), (1.0, 5.0, 1.0)),
    "attn/q_proj": ((1, 2, 5), (1.5, 2.5, 3.5)),
    "attn/v_proj": ((4, 4, 4), (8.0, 8.0, 8.0)),
}
DENSE_BETWEEN = {
    "group0/block0/ffn/gate_proj": ((4,), (8.0,)),
    "group0/block1/ffn/gate_proj": ((2,), (3.0,)),
    "group0/block1/ffn/down_proj": ((2,), (4.0,)),
}


@pytest.fixture
def merge_equally(params_of):
    """``merge_equally(params, lora, spec, config, model in PEFT)``: both merge the adapter into the same weights."""

    def check(params: Any, lora: Any, spec: AdapterSpec, config: ModelConfig, wrapped: Any) -> None:
        theirs = flatten(params_of(wrapped.merge_and_unload(), config))
        for path, leaf in flatten(merge(params, lora, spec)).items():
            np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-5, err_msg=path)

    return check


def write(
    folder: Path, settings_: dict[str, Any], tensors: dict[str, np.ndarray], metadata: Any = None
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


# ---------------------------------------------------------------- PEFT -> here


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "regex": {"r": 2, "lora_alpha": 3, "target_modules": r".*\.(0|2)\..*(up|q)_proj"},
    "regex of whole names": {"r": 2, "lora_alpha": 3, "target_modules": r".*mlp\.up_proj|.*q_pro"},
    "patterns of whole parts": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj"],
        "rank_pattern": {"p_proj": 2, "layers.1": 2, "mlp.up": 2, "0.mlp.up_proj": 3},
        "alpha_pattern": {"roj": 1, "model": 1},
    },
    "all linear": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "gate_proj", "mlp.down_proj"],
        "rank_pattern": {
            "model.layers.1.mlp.gate_proj": 2,
            "q_proj": 3,
            r"^model\.layers\.[02].*down_proj": 5,
        },
        "alpha_pattern": {"gate_proj": 5, "layers.2.self_attn.q_proj": 7.5},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["gate_proj"],
        "rank_pattern": {"layers.1.mlp.gate_proj": 2},
        "alpha_pattern": {"layers.0.mlp.gate_proj": 1},
        "use_rslora": True,
    },
    "some layers": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj", "o_proj"],
        "layers_to_transform": [0, 2],
    },
    "one layer": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "excluded": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj", "o_proj"],
        "exclude_modules": ["layers.1.mlp.up_proj"],
    },
    "excluded regex": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj"],
        "exclude_modules": r".*\.1\..*",
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj"], "use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_equals_peft(variant, tiny_model, params_of, merge_equally, tmp_path):
    model, config = tiny_model("llama")
    params, wrapped = params_of(model, config), wrap(model, **VARIANTS[variant])
    lora, spec = import_adapter(save(wrapped, tmp_path), config)
    assert spec.dropout == VARIANTS[variant].get("lora_dropout", 0.0)
    merge_equally(params, lora, spec, config, wrapped)


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("qwen3_5_text", "all-linear", 2 * 8 + 7),
        ("qwen3_next", ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"], 2 * 3 + 1),
    ],
)
def test_import_adapters_of_linear_attention(
    family, targets, count, tiny_model, params_of, merge_equally, tmp_path
):
    model, config = tiny_model(family)
    params, wrapped = params_of(model, config), wrap(model, r=2, lora_alpha=6, target_modules=targets)
    lora, spec = import_adapter(save(wrapped, tmp_path), config)
    assert sum(map(bool, (rank for _, target in spec.targets for rank in target.ranks))) == count
    merge_equally(params, lora, spec, config, wrapped)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "mlp.gate_proj.weight"]},
        {"target_modules": [], "target_parameters": ["up_proj.weight"]},
    ],
    ids=str,
)
def test_adapters_on_weights_mean_what_they_mean_in_peft(targets, tiny_model, params_of, tmp_path):
    model, config = tiny_model("llama")
    params, wrapped = params_of(model, config), wrap(model, r=4, **targets)
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    expected = logits(wrapped)
    np.testing.assert_allclose(our_logits(config, params, lora, spec), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - our_logits(config, params)).max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_import_low_precision(dtype, tiny_model, params_of, merge_equally, tmp_path):
    model, config = tiny_model("llama")
    params, wrapped = params_of(model, config), wrap(model, **VARIANTS["plain"])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    save(wrapped, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, dtype)}
    lora, spec = import_adapter(tmp_path, config)
    assert {leaf.dtype for leaf in flatten(lora).values()} == {np.dtype("float32")}
    merge_equally(params, lora, spec, config, wrapped.float())


# ---------------------------------------------------------------- here -> PEFT


# Options; the families are in tests/weights/test_merge.py.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama rslora": ("llama", FFN | ATTENTION, {"rslora": True}),
    "llama mixed": ("llama", MIXED, {"dropout": 0.25}),
    "llama dora": ("llama", MIXED, {"dora": True}),
    "phi3 mixed": ("phi3", MIXED, {}),
    "phi3 dora": ("phi3", FFN | ATTENTION, {"dora": True}),
    "mixtral mixed": ("mixtral", MIXED, {"rslora": True}),
    "gpt_oss mixed": ("gpt_oss", MIXED, {"rslora": True}),
    "qwen3_moe gate": ("qwen3_moe", {"ffn/gate_proj": FFN["ffn/gate_proj"]}, {"dropout": 0.5}),
    "qwen3_moe dense layer": ("qwen3_moe", DENSE_BETWEEN, {}),
}
CHANGES = {"qwen3_moe dense layer": {"mlp_only_layers": [1]}}


@pytest.mark.parametrize("case", CASES)
def test_export_loads_in_peft(case, tiny_model, params_of, random_lora, merge_equally, tmp_path):
    family, targets, variant = CASES[case]
    model, config = tiny_model(family, **CHANGES.get(case, {}))
    params = params_of(model, config)
    lora, spec = random_lora(config, targets, **variant)
    folder = tmp_path / "adapter"

    export_adapter(lora, spec, config, folder, base_model_name="org/base")

    wrapped = load(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    merge_equally(params, lora, spec, config, wrapped)
    verify_export(folder, lora, spec, config)
    # And back: what was exported is what is imported, bit for bit where no scale was folded.
    again, spec_again = import_adapter(folder, config)
    if config.model_type != "phi3" and not config.n_experts:
        assert spec_again == spec
        for path, _target in spec.targets:
            for name in ("a", "b"):
                np.testing.assert_array_equal(
                    flatten(again)[f"{path}/{name}"], flatten(lora)[f"{path}/{name}"]
                )


def test_folded_scales_keep_everything_else(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("phi3")
    lora, spec = random_lora(config, MIXED)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="org/base")
    assert 0 < verify_export(tmp_path / "a", lora, spec, config) < 2**-21
    lora, spec = random_lora(config, FFN)
    export_adapter(lora, spec, config, tmp_path / "b", base_model_name="org/base")
    assert verify_export(tmp_path / "b", lora, spec, config) == 0.0
    assert import_adapter(tmp_path / "b", config)[1] == spec


def test_config_file_is_the_contract(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, FFN | {"attn/q_proj": ((0, 4, 0), (1.0, 8.0, 1.0))}, dropout=0.1)
    export_adapter(
        lora, spec, config, tmp_path / "a", base_model_name="org/base", extra={"revision": "main"}
    )
    assert json.loads((tmp_path / "a/adapter_config.json").read_text()) == {
        "alpha_pattern": {},
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "revision": "main",
        "target_modules": ["down_proj", "gate_proj", "model.layers.1.self_attn.q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[key], flatten(lora)["layers/ffn/down_proj/a"][2].T)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" not in tensors


def test_equal_adapters_are_equal_bytes(tiny_model, random_lora, tmp_path):
    """The safetensors library's own writer differs from call to call."""
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, MIXED)
    options = {
        "base_model_name": "base",
        "fingerprint": "f" * 64,
        "rope_scaling": "yarn:4",
        "base_weights": "w",
    }
    for i in range(6):
        export_adapter(lora, spec, config, tmp_path / str(i), **options)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(6)}) == 1


def test_verify_export_notices_any_change(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, MIXED, dora=True)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="org/base")
    file, settings_ = tmp_path / "a/adapter_model.safetensors", tmp_path / "a/adapter_config.json"
    tensors, text = load_file(file), settings_.read_text()
    for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        changed = {k: t.copy() for k, t in tensors.items()}
        changed[f"base_model.model.model.layers.1.mlp.gate_proj.{kind}"].flat[3] *= 1.0001
        save_file(changed, file)
        with pytest.raises(NaloraError, match="layers/ffn/gate_proj, layer 1"):
            verify_export(tmp_path / "a", lora, spec, config)
    save_file(tensors, file)
    settings_.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(NaloraError, match="another one"):
        verify_export(tmp_path / "a", lora, spec, config)


# ---------------------------------------------------------------- mixtures of experts, as PEFT itself writes them


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("style", ["parameters", "one parameter", "modules"])
def test_import_experts_from_peft(family, style, tiny_model, params_of, merge_equally, tmp_path):
    model, config = tiny_model(family)
    params = params_of(model, config)
    old_names = {"mixtral": ["w1", "w2", "w3"], "gpt_oss": ["q_proj"]}.get(
        family, ["gate_proj", "up_proj", "down_proj"]
    )
    targets = {
        "parameters": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        "one parameter": {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
        "modules": {"target_modules": [*old_names, "o_proj"]},
    }[style]
    wrapped = wrap(model, r=3, lora_alpha=5, **({"target_modules": []} | targets))
    lora, spec = import_adapter(save(wrapped, tmp_path), config)
    merge_equally(params, lora, spec, config, wrapped)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("gate_up_proj",)])
def test_adapters_of_stacks_compute_the_logits_of_peft(names, family, tiny_model, params_of, tmp_path):
    """Gate and up read from one parameter share A, so they are written again with PEFT's own rank."""
    model, config = tiny_model(family)
    params = params_of(model, config)
    stacks = [f"mlp.experts.{name}" for name in names]
    wrapped = wrap(model, r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=stacks)
    wrapped.save_pretrained(tmp_path / "theirs")

    lora, spec = import_adapter(tmp_path / "theirs", config)
    ours = our_logits(config, params, lora, spec)
    export_adapter(lora, spec, config, tmp_path / "ours", base_model_name="org/base")

    expected = logits(wrapped)
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
    theirs, written = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert theirs.keys() == written.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_import_experts_of_transformers_4(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("mixtral")
    lora, spec = random_lora(config, FFN)
    leaves = flatten(lora)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    stem = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.lora_{}.weight"
    tensors = {
        stem.format(layer, e, theirs, kind.upper()): leaves[f"layers/ffn/{ours}/{kind}"][layer, e].T.copy()
        for ours, theirs in names.items()
        for layer in range(config.n_layers)
        for e in range(config.n_experts)
        for kind in "ab"
    }
    settings_ = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"]}
    settings_ |= {"alpha_pattern": {"layers.1.block_sparse_moe.experts.2.w3": 4}}
    write(tmp_path, settings_, tensors)

    found, found_spec = import_adapter(tmp_path, config)

    leaves["layers/ffn/up_proj/b"][1, 2] /= 2
    assert found_spec == spec
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_A.weight"]
    del tensors["base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"]
    write(tmp_path, settings_, tensors)
    with pytest.raises(NaloraError, match=r"experts\.2\.w3"):
        import_adapter(tmp_path, config)


# ---------------------------------------------------------------- vLLM


@pytest.mark.parametrize(
    ("prefixes", "target"),
    [
        (
            ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model."),
            "fc1",
        ),
        (("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."), "fc1"),
        (
            ("vision_tower.vision_model.", "", "language_model.model."),
            r"(vision_tower|language_model\.model)\..*(fc1|up_proj)",
        ),
    ],
)
def test_import_models_that_see_of_transformers_4(prefixes, target, tmp_path):
    """Names of 4.52 to 4.57, and up to 4.51; patterns are matched against the names that the file has."""
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
    }
    tower |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    text = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
    }
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    raw = {"model_type": "llava", "text_config": text, "vision_config": tower, "image_token_index": 3}
    config = ModelConfig.from_hf(raw, images=True)
    rng, seen, projector, words = np.random.default_rng(0), *prefixes
    sizes = {f"{seen}encoder.layers.{i}.mlp.fc1": (32, 48) for i in range(2)}
    sizes |= {f"{words}layers.{i}.mlp.up_proj": (24, 40) for i in range(2)}
    sizes |= {f"{projector}linear_1": (32, 24)} if projector else {}
    tensors = {}
    for name, (d_in, d_out) in sizes.items():
        for factor, shape in (("lora_A", (2, d_in)), ("lora_B", (d_out, 2))):
            tensors[f"base_model.model.{name}.{factor}.weight"] = rng.standard_normal(shape).astype(
                np.float32
            )
    targets = target if "(" in target else ["fc1", "up_proj", "linear_1"]
    settings_ = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    write(tmp_path / "adapter", settings_, tensors)
    lora, spec = import_adapter(tmp_path / "adapter", config)
    found = flatten(lora)
    paths = {
        "image/layers/ffn/in_proj": f"{seen}encoder.layers.1.mlp.fc1",
        "layers/ffn/up_proj": f"{words}layers.1.mlp.up_proj",
    }
    paths |= {"projector/ffn/in_proj": f"{projector}linear_1"} if projector else {}
    assert {path for path, _ in spec.targets} == set(paths)
    for path, name in paths.items():
        for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
            expected = tensors[f"base_model.model.{name}.{theirs}.weight"].T
            np.testing.assert_array_equal(found[f"{path}/{ours}"][-1], expected, err_msg=path)


def vllm_accepts(folder: Path, max_lora_rank: int = 16) -> dict[str, Any]:
    """vLLM's own adapter checks (vllm/lora/peft_helper.py and lora_model.py), stated as rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["r"] <= max_lora_rank
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        prefix, _, rest = key.rpartition(".lora_")
        assert prefix.startswith("base_model.model.model.layers.")
        assert rest in ("A.weight", "B.weight")
        assert prefix.rpartition(".")[2] in config["target_modules"]
        assert tensor.shape[0 if rest[0] == "A" else 1] == config["r"]
    return config


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "glm4_moe"])
def test_vllm_export(family, tiny_model, params_of, random_lora, merge_equally, tmp_path):
    model, config = tiny_model(family)
    params = params_of(model, config)
    lora, spec = random_lora(config, GLM if family == "glm4_moe" else MIXED, rslora=True, dropout=0.1)

    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="org/base", target="vllm")

    settings_ = vllm_accepts(tmp_path / "a")
    assert settings_["use_rslora"] is False
    assert settings_["r"] == {"phi3": 9, "glm4_moe": 4}.get(family, 5)
    verify_export(tmp_path / "a", lora, spec, config)
    if family != "glm4_moe":  # PEFT would take the shared expert's modules for experts
        with warnings.catch_warnings():
            # PEFT warns of its own patterns for fused experts.
            warnings.filterwarnings("ignore", r".*gate_up_proj'\]", RuntimeWarning)
            wrapped = load(model, tmp_path / "a")
        merge_equally(params, lora, spec, config, wrapped)
    if config.n_experts:  # vLLM packs gate, up and down of every expert: all or none
        names = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "a/adapter_model.safetensors")}
        mixtures = config.n_layers - (family == "glm4_moe")
        assert sum(".experts." in name for name in names) == 3 * mixtures * config.n_experts


def test_vllm_export_of_stacked_experts(tiny_model, params_of, random_lora, merge_equally, tmp_path):
    """vLLM reads gpt-oss's experts as PEFT writes them, if both parameters of every layer are there."""
    model, config = tiny_model("gpt_oss")
    params = params_of(model, config)
    targets = {"ffn/up_proj": ((0, 4, 2), (1.0, 8.0, 6.0)), "attn/q_proj": ((3, 0, 3), (3.0, 1.0, 3.0))}
    lora, spec = random_lora(config, targets)

    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="org/base", target="vllm")

    settings_ = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (settings_["r"], settings_["rank_pattern"], settings_["alpha_pattern"]) == (4, {}, {})
    shapes = {
        key: tensor.shape for key, tensor in load_file(tmp_path / "a/adapter_model.safetensors").items()
    }
    for layer in range(config.n_layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        assert shapes[f"{stem}.base_layer.lora_A.weight"] == (4 * config.n_experts, config.d_model)
        assert shapes[f"{stem}.lora_A.weight"] == (4 * config.n_experts, config.d_ff)
    merge_equally(params, lora, spec, config, load(model, tmp_path / "a"))


def test_vllm_refusals_name_the_rule(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, FFN, dora=True)
    with pytest.raises(NaloraError, match="use_dora"):
        export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", target="vllm")
    lora, spec = random_lora(config, FFN)
    with pytest.raises(NaloraError, match="max_lora_rank"):
        export_adapter(
            lora, spec, config, tmp_path / "a", base_model_name="b", target="vllm", max_lora_rank=3
        )
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", target="vllm", max_lora_rank=4)
