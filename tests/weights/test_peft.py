"""Adapters of PEFT read here and written as PEFT reads them, and what is refused; families are in
test_merge.py."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import flatten, map_named
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.weights.origin import fingerprint
from nalora_jax.weights.peft_config import TENSORS_NAME
from nalora_jax.weights.peft_export import export_adapter, verify_export
from nalora_jax.weights.peft_import import import_adapter
from tests.weights.conftest import COMMON
from tests.weights.in_peft import merge_equally, save, wrap, write_adapter
from tests.weights.test_merge import TARGETS

FFN = {f"ffn/{name}_proj": ((4, 4, 4), (8.0, 8.0, 8.0)) for name in ("gate", "up", "down")}
MODULES = ["gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMPORTED = {
    "a regex": ("llama", {"target_modules": r".*\.(0|2)\..*(up|q)_proj"}),
    "a regex of whole names": ("llama", {"target_modules": r".*mlp\.up_proj|.*q_pro"}),
    "all linear": ("llama", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "patterns and rsLoRA": (
        "llama",
        {
            "target_modules": ["q_proj", "gate_proj", "mlp.down_proj", "up_proj"],
            "rank_pattern": {
                "model.layers.1.mlp.gate_proj": 2,
                "q_proj": 3,
                "p_proj": 2,
                "mlp.up": 2,
            }
            | {r"^model\.layers\.[02].*down_proj": 5, "0.mlp.up_proj": 3},
            "alpha_pattern": {
                "gate_proj": 5,
                "layers.2.self_attn.q_proj": 7.5,
                "roj": 1,
                "model": 1,
            },
            "use_rslora": True,
        },
    ),
    "some layers": (
        "llama",
        {
            "target_modules": ["up_proj", "o_proj"],
            "layers_to_transform": [0, 2],
            "exclude_modules": ["layers.0.mlp.up_proj"],
        },
    ),
    "one layer": (
        "llama",
        {
            "target_modules": ["up_proj", "o_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
            "exclude_modules": r".*\.o_.*",
        },
    ),
    "DoRA": ("llama", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    "weights": (
        "llama",
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["q_proj.weight", "mlp.gate_proj.weight"],
        },
    ),
    "linear attention": ("qwen3_5_text", {"target_modules": "all-linear"}),
    "fused linear attention": (
        "qwen3_next",
        {"target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]},
    ),
    "latent attention": (
        "deepseek_v2",
        {"target_modules": r".*\.self_attn\.(q_[ab]|kv_a|kv_b|o)_proj(_with_mqa)?"},
    ),
    "latent attention without low-rank queries": (
        "deepseek_v3",
        {"target_modules": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    ),
    "DoRA of latent attention": (
        "youtu",
        {"target_modules": "all-linear", "use_dora": True},
    ),
    "experts": ("glm4_moe", {"target_modules": [], "target_parameters": STACKS}),
    "experts with biases": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "gate and up of experts": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": STACKS[:1]},
    ),
    "one matrix of experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": STACKS[1:]},
    ),
    "experts as modules": ("qwen3_moe", {"target_modules": [*MODULES, "o_proj"]}),
    "experts of old names": ("mixtral", {"target_modules": ["w1", "w2", "w3"]}),
    "dense layers named like experts": (
        "lfm2_moe",
        {"target_modules": ["w1", "w2", "w3", "in_proj"]},
    ),
}


# Experts are written as parameters, whatever they were.
REWRITTEN = ("experts as modules", "experts of old names")


@pytest.mark.parametrize("case", IMPORTED)
def test_imported_adapters_merge_as_in_peft_and_are_written_as_they_were(
    case, tiny_model, params_of, tmp_path
):
    family, settings = IMPORTED[case]
    model, config = tiny_model(family)
    params, wrapped = (
        params_of(model, config),
        wrap(model, **({"r": 3, "lora_alpha": 8} | settings)),
    )
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    assert spec.dropout == settings.get("lora_dropout", 0.0)
    merge_equally(params, lora, spec, config, wrapped, params_of)
    if case in REWRITTEN:
        return
    export_adapter(lora, spec, config, tmp_path / "ours", base_model_name="org/base")
    theirs, ours = (load_file(tmp_path / of / TENSORS_NAME) for of in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_low_precision_is_read_as_float32(good):
    folder, _, tensors = good
    save_file(
        {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}, folder / TENSORS_NAME
    )
    leaves = flatten(import_adapter(folder, LLAMA)[0])
    expected = tensors[KEY].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(leaves["layers/ffn/up_proj/a"][1].T, expected, strict=True)


# ---------------------------------------------------------------- here -> PEFT


def test_verify_export_notices_any_change(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("llama")
    lora, spec = random_lora(config, TARGETS, dora=True)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="org/base")
    file, settings = tmp_path / "a/adapter_model.safetensors", tmp_path / "a/adapter_config.json"
    tensors, text = load_file(file), settings.read_text()
    for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        changed = {k: t.copy() for k, t in tensors.items()}
        changed[f"base_model.model.model.layers.1.mlp.gate_proj.{kind}"].flat[3] *= 1.0001
        save_file(changed, file)
        with pytest.raises(NaloraError, match="layers/ffn/gate_proj, layer 1"):
            verify_export(tmp_path / "a", lora, spec, config)
    save_file(tensors, file)
    settings.write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(NaloraError, match="another one"):
        verify_export(tmp_path / "a", lora, spec, config)


# ---------------------------------------------------------------- forms of files that PEFT or
# transformers had


SIZES = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = SIZES | {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
VISION = {"model_type": "llava", "vision_config": TOWER, "image_token_index": 3}
VISION["text_config"] = COMMON | {"model_type": "llama"}

PREFIXES = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")


def test_fingerprints_of_vision_language_models_stay():
    """Recorded when the field of the config was named "sight"; without tensors."""
    config = ModelConfig.from_hf(VISION, images=True)
    recorded = "all:e4123af724370c93f545b87afd73f3b0bbc3c803efbb62c9f5ad35a0950bc1f8"
    assert fingerprint(config, SimpleNamespace(shapes=dict)) == recorded


@pytest.mark.parametrize(
    "earlier",
    [
        ("model.vision_tower.vision_model.", *PREFIXES[1:]),
        ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."),
    ],
)
def test_vision_language_models_have_the_names_of_transformers_4(earlier, tmp_path):
    """Names of 4.52 to 4.57, and up to 4.51; patterns are matched against the names that the file
    has."""
    config = ModelConfig.from_hf(VISION, images=True)
    rules = (LoRARule("in_proj|up_proj", 2),)
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(config), layer_numbers(config))
    lora = map_named(
        lambda path, leaf: leaf + len(path), init_lora(config, spec, jax.random.key(0))
    )
    folder = export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b")

    tensors = load_file(folder / TENSORS_NAME)
    for now, then in zip(PREFIXES, earlier, strict=True):
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = f"({'|'.join(earlier)}).*(fc1|linear_1|up_proj)"
    found, _ = import_adapter(write_adapter(tmp_path / "b", settings, tensors), config)
    for path, leaf in flatten(lora).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf, err_msg=path)


# ---------------------------------------------------------------- what is refused


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
    ({"r": 8}, "shape"),
    ({"lora_alpha": MISSING}, "lora_alpha: expected a finite number above 0, found nothing"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"peft_type": "LOHA"}, "peft_type"),
    ({"bias": "lora_only"}, "bias"),
    (
        {"modules_to_save": ["lm_head"]},
        "expected the trained lm_head of modules_to_save, found nothing",
    ),
    (
        {"modules_to_save": ["pooler"]},
        "modules_to_save: expected some of embed_tokens, lm_head",
    ),
    (
        {INDICES: [1, 2]},
        "token_adapter.trainable_tokens_delta: expected the trained rows of embed_to",
    ),
    ({INDICES: [47, 48]}, f"{INDICES}: expected token ids of the 48 rows .* found 48;"),
    ({INDICES: [1, 1]}, f"{INDICES}: expected a list of different token ids"),
    ({INDICES: {"wte": [5]}}, "expected token ids of embed_tokens and lm_head .* found wte"),
    (
        {INDICES: [5], "modules_to_save": ["model.embed_tokens"]},
        f"{INDICES}: expected rows of tables that modules_to_save does not name",
    ),
    ({"some_future_feature": 1}, "some_future_feature"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": ["gate_proj", "up_proj"]}, "cover model.layers.0.mlp.down_proj"),
    (
        {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
        "layers.0.self_attn.q_proj",
    ),
    ({"target_modules": "(gate"}, "regular expression"),
    ({"target_modules": r".*mlp.*", "layers_to_transform": [0]}, "layers_to_transform"),
    (
        {"layers_to_transform": [0], "layers_pattern": ["lay(ers"]},
        "layers_pattern: expected a regular",
    ),
    ({"rank_pattern": {"up_proj": 3}}, r"up_proj \(a\): expected shape \(3, 16\)"),
    (
        {"rank_pattern": {"up_proj": 10**30}},
        "rank_pattern: up_proj: expected a whole number from 1 to",
    ),
    ({"alpha_pattern": PATTERNS}, "alpha_pattern: expected at most 4,096 patterns, found 100,000"),
    ({"use_dora": True}, "lora_magnitude_vector"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
    ({"target_modules": [5]}, "target_modules: expected a list of names, found"),
    ({"alpha_pattern": [3]}, "alpha_pattern: expected an object of pattern: value, found"),
    ({"revision": "x" * (5 << 20)}, "adapter_config.json: expected at most 4194304 bytes"),
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
    (
        lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()},
        "save_pretrained",
    ),
    (
        lambda t: {k.replace("model.layers", "transformer.layers"): v for k, v in t.items()},
        "unknown module",
    ),
    (
        lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[KEY]},
        "lm_head.lora_.*found an adapter of the embedding or the head; train",
    ),
    (lambda t: t | {KEY.replace("layers.1", "layers.9"): t[KEY]}, r"layers\.9"),
    (lambda t: {k: v for k, v in t.items() if k != KEY}, "lora_A"),
    (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}, "layers.1.mlp.up_proj"),
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


def test_an_adapter_without_one_of_the_experts_is_refused(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("mixtral")
    lora, spec = random_lora(config, FFN)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", target="vllm")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    settings["target_modules"] = r".*experts\.[012]\.w[123]"
    tensors = load_file(tmp_path / "a" / TENSORS_NAME)
    kept = {key: tensor for key, tensor in tensors.items() if ".experts.3." not in key}
    with pytest.raises(NaloraError, match=r"experts of layer 0: expected adapters on all 4"):
        import_adapter(write_adapter(tmp_path / "bad", settings, kept), config)


def test_experts_of_one_layer_may_differ_in_rank_and_alpha(tiny_model, random_lora, tmp_path):
    _, config = tiny_model("mixtral")
    lora, spec = random_lora(config, FFN)
    folder = tmp_path / "a"
    export_adapter(lora, spec, config, folder, base_model_name="b", target="vllm")
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / TENSORS_NAME)
    settings["alpha_pattern"] = {r".*experts\.2\.w2": 5}
    settings["rank_pattern"] = {r".*experts\.3\.w2": 2}
    for key in [key for key in tensors if key.endswith("experts.3.w2.lora_A.weight")]:
        tensors[key] = tensors[key][:2].copy()
        other = key.replace("lora_A", "lora_B")
        tensors[other] = tensors[other][:, :2].copy()
    found, read = import_adapter(write_adapter(tmp_path / "b", settings, tensors), config)
    leaves = flatten(found)
    scales = [2.0, 2.0, 5 / 4, 8 / 2]  # alpha / r
    for path, layer, expert in itertools.product(["layers/ffn/down_proj"], range(3), range(4)):
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w2"
        a, b = (tensors[f"{stem}.lora_{name}.weight"].astype(np.float64) for name in "AB")
        ours = leaves[f"{path}/a"][layer, expert] @ leaves[f"{path}/b"][layer, expert]
        np.testing.assert_allclose(
            read.scales(path)[layer] * ours, scales[expert] * (b @ a).T, rtol=1e-5, atol=1e-6
        )


def test_magnitudes_of_experts_are_refused(tiny_model, tmp_path):
    family, settings = IMPORTED["one matrix of experts"]
    model, config = tiny_model(family)
    folder = save(wrap(model, r=2, **settings), tmp_path / "a")
    written = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    tensors = load_file(folder / TENSORS_NAME)
    for key in [key for key in tensors if key.endswith("lora_B.weight")]:
        magnitude = np.ones(len(tensors[key]), np.float32)
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    with pytest.raises(NaloraError, match="use_dora: expected false for experts"):
        import_adapter(write_adapter(tmp_path / "bad", written, tensors), config)


def test_bad_files_are_refused(good, tmp_path):
    folder, *_ = good

    def refused(message: str, folder: Path = folder, **options: Any) -> None:
        with pytest.raises(NaloraError, match=message):
            import_adapter(folder, LLAMA, **options)

    refused("abc", fingerprint="another")
    import_adapter(folder, LLAMA, fingerprint="abc")
    data = (folder / "adapter_model.safetensors").read_bytes()
    for size in (0, len(data) - 1):
        (folder / "adapter_model.safetensors").write_bytes(data[:size])
        refused("complete safetensors file")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused("pickle")
    for text in ("", "[1, 2]", "{"):
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused("JSON")
    refused(r"adapter_config\.json", tmp_path / "nothing")


DAMAGE = f"{TENSORS_NAME}: expected .*the digest .*found .*damaged: restore it from a copy"


def test_a_flipped_bit_of_an_adapter_is_refused(good):
    folder, *_ = good
    file = folder / TENSORS_NAME
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    bits = np.random.default_rng(0)
    in_header = bits.integers(0, 8 * header, 50)
    in_tensors = bits.integers(8 * header, 8 * len(data), 50)
    for bit in (*in_header, *in_tensors):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        message = DAMAGE if bit >= 8 * header else re.escape(str(file))
        with pytest.raises(NaloraError, match=message):
            import_adapter(folder, LLAMA)
    file.write_bytes(data)
    import_adapter(folder, LLAMA)


@pytest.mark.parametrize(
    "field", ["nalora.content_sha256", "nalora.digest", "nalora.base_fingerprint"]
)
def test_damaged_metadata_of_an_adapter_is_refused(field, good):
    file = good[0] / TENSORS_NAME
    data = file.read_bytes()
    start = data.index(field.encode())
    for at in range(start, start + len(field) + 4):
        damaged = bytearray(data)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(NaloraError, match=re.escape(str(file))):
            import_adapter(good[0], LLAMA)


def test_an_adapter_without_a_digest_is_read(good):
    folder, _, tensors = good
    expected = flatten(import_adapter(folder, LLAMA)[0])
    save_file(tensors, folder / TENSORS_NAME, {"format": "pt", "nalora.base_fingerprint": "abc"})
    for path, leaf in flatten(import_adapter(folder, LLAMA, fingerprint="abc")[0]).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_an_earlier_adapter_is_replaced_on_request_and_nothing_else(good):
    folder, *_ = good
    (lora, spec), options = import_adapter(folder, LLAMA), {"base_model_name": "b"}
    with pytest.raises(NaloraError, match=r"holds adapter_config\.json"):
        export_adapter(lora, spec, LLAMA, folder, **options)
    lora = map_named(lambda _, leaf: leaf * 2, lora)
    export_adapter(lora, spec, LLAMA, folder, overwrite=True, **options)
    verify_export(folder, lora, spec, LLAMA)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(NaloraError, match=r"notes\.txt"):
        export_adapter(lora, spec, LLAMA, folder, overwrite=True, **options)
    assert list(folder.parent.iterdir()) == [folder]


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
