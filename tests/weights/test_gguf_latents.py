"""GGUF files of families with latent attention, beside llama.cpp itself (xllamacpp): descriptions,
logits, adapters and tokens."""

from __future__ import annotations

import itertools
import json
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import xllamacpp

from nalora_jax.common.trees import map_named
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import load
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import layer_numbers, projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.base import load_model
from nalora_jax.weights.gguf import GGUFFile, read_tokenizer
from nalora_jax.weights.gguf_export import verify_adapter_gguf, write_adapter_gguf
from nalora_jax.weights.model_files import JoinedLatents
from nalora_jax.weights.tensors import whole
from tests import tiny
from tests.param_trees import tensors_from_params
from tests.weights.gguf_files import WORDS, finish, random_params
from tests.weights.test_gguf_llama_cpp import IDS, llama_cpp, ours, server_params
from tests.weights.test_gguf_tokenizer import CORPUS, TEXTS

YOUTU: dict[str, Any] = {
    "model_type": "youtu",
    "vocab_size": len(WORDS),
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
V3 = YOUTU | EXPERTS | {"model_type": "deepseek_v3", "n_group": 2, "topk_group": 1}
V3 |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True}
V2 = YOUTU | EXPERTS | {"model_type": "deepseek_v2", "topk_method": "greedy"}
V2 |= {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# llama.cpp assumes queries of full rank in models of 27 layers, as DeepSeek-V2-Lite.
LITE = V2 | {"q_lora_rank": None, "num_hidden_layers": 27}
MODELS = {
    "DeepSeek-V3": V3,
    "DeepSeek-V3 with YaRN": V3 | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "DeepSeek-V2": V2,
    "DeepSeek-V2-Lite": LITE | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "Youtu": YOUTU,
}


def describe(writer: gguf.GGUFWriter, raw: dict[str, Any], tokens: list[str]) -> None:
    """Adds the metadata that llama.cpp's converter writes of a ``config.json``."""
    rotated, rank = raw["qk_rope_head_dim"], raw["kv_lora_rank"]
    layers = raw["num_hidden_layers"]
    fields: dict[str, Any] = {
        "block_count": layers,
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "head_count": raw["num_attention_heads"],
        "head_count_kv": 1,
        "layer_norm_rms_eps": raw["rms_norm_eps"],
        "rope_freq_base": raw["rope_theta"],
        "rope_dimension_count": rotated,
        "vocab_size": len(tokens),
        "kv_lora_rank": rank,
        "key_length": rank + rotated,
        "value_length": rank,
        "key_length_mla": raw["qk_nope_head_dim"] + rotated,
        "value_length_mla": raw["v_head_dim"],
        "leading_dense_block_count": raw.get("first_k_dense_replace", layers),
        "expert_feed_forward_length": raw.get("moe_intermediate_size", raw["intermediate_size"]),
        "expert_shared_count": raw.get("n_shared_experts", 0),
        "file_type": gguf.LlamaFileType.ALL_F32,
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [2, 3, 3, *[1] * (len(tokens) - 3)],
        "add_bos_token": False,
        **{"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    if raw["q_lora_rank"]:
        fields["q_lora_rank"] = raw["q_lora_rank"]
    if "n_routed_experts" in raw:
        gating = gguf.ExpertGatingFuncType
        is_v3 = raw["model_type"] == "deepseek_v3"
        fields |= {
            "expert_count": raw["n_routed_experts"],
            "expert_used_count": raw["num_experts_per_tok"],
            "expert_weights_scale": raw["routed_scaling_factor"],
            "expert_weights_norm": raw.get("norm_topk_prob", False),
            "expert_group_count": raw["n_group"],
            "expert_group_used_count": raw["topk_group"],
            "expert_gating_func": gating.SIGMOID if is_v3 else gating.SOFTMAX,
        }
    if scaling := raw.get("rope_scaling"):
        fields |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": scaling["factor"],
            "rope_scaling_orig_ctx_len": scaling["original_max_position_embeddings"],
            "rope_scaling_yarn_log_mul": 0.1 * scaling["mscale_all_dim"],
        }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def write(
    path: Path,
    raw: dict[str, Any],
    *,
    split: bool = True,
    tokens: list[str] = WORDS,
    merges: tuple[str, ...] = ("a b", "Ġ a"),
    pre: str = "deepseek-v3",
) -> Path:
    """Writes a random model; the latents' projection in llama.cpp's two tensors, or in one, as
    earlier files have it."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    describe(writer, raw, tokens)
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges(list(merges))
    params = map_named(lambda path, leaf: 0.3 * leaf + path.endswith("/scale"), random_params(raw))
    nope = raw["qk_nope_head_dim"]
    for name, tensor in tensors_from_params(ModelConfig.from_hf(raw), params, "gguf"):
        tensor = np.ascontiguousarray(tensor, np.float32)
        if split and name.endswith("attn_kv_b.weight"):
            heads = tensor.reshape(raw["num_attention_heads"], -1, raw["kv_lora_rank"])
            keys = np.ascontiguousarray(heads[:, :nope].swapaxes(1, 2))
            writer.add_tensor(name.replace("_kv_b", "_k_b"), keys)
            writer.add_tensor(name.replace("_kv_b", "_v_b"), np.ascontiguousarray(heads[:, nope:]))
        else:
            writer.add_tensor(name, tensor)
    return finish(writer, path)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_llama_cpp_s(tmp_path, name):
    raw = MODELS[name]
    path = write(tmp_path / "m.gguf", raw)
    model = load(str(path), dtype="float32")
    assert model.base.config == ModelConfig.from_hf(raw)
    np.testing.assert_allclose(llama_cpp(path), ours(model), atol=5e-5)


def test_files_with_one_tensor_of_latents_are_read(tmp_path):
    """As converters wrote them before llama.cpp absorbed its products."""
    split = load_model(str(write(tmp_path / "split.gguf", V3)), dtype="float32")
    joined = load_model(str(write(tmp_path / "joined.gguf", V3, split=False)), dtype="float32")
    for theirs, leaf in zip(
        jax.tree.leaves(joined.params), jax.tree.leaves(split.params), strict=True
    ):
        np.testing.assert_array_equal(leaf, theirs)


def test_slices_of_joined_latents_are_those_of_the_whole(tmp_path):
    split = JoinedLatents(GGUFFile(write(tmp_path / "split.gguf", V3)))
    joined = GGUFFile(write(tmp_path / "joined.gguf", V3, split=False))
    name = "blk.1.attn_kv_b.weight"
    expected = joined.read(name, whole(joined.shapes()[name]))
    assert split.shapes()[name] == expected.shape == (224, 32)
    split.check_readable(name)
    assert split.stored(name).format == "F32"
    for index in np.s_[0:224, 0:32], np.s_[50:60, 3:9], np.s_[56:112, 0:1], np.s_[100:223, 0:32]:
        np.testing.assert_array_equal(split.read(name, index), expected[index])


def adapter(config: ModelConfig, *rules: LoRARule) -> tuple[Any, Any]:
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(config), layer_numbers(config))
    fresh = init_lora(config, spec, jax.random.key(0))
    return jax.device_get(jax.tree.map(lambda leaf: leaf + 0.03, fresh)), spec


def test_adapters_have_llama_cpp_s_effect(tmp_path):
    """On the output projection, experts, shared experts and dense layers."""
    path = write(tmp_path / "m.gguf", V3)
    model = load(str(path), dtype="float32")
    config = model.base.config
    lora, spec = adapter(config, LoRARule("o_proj", 2), LoRARule("ffn", 4, 3.0))
    file = write_adapter_gguf(tmp_path / "lora.gguf", config, lora, spec)
    verify_adapter_gguf(file, config, lora, spec)
    variables = {"params": model.base.params, "lora": lora}
    logits = tiny.logits_of(Decoder(config, spec), variables, np.array([IDS]))
    expected = np.asarray(jax.nn.log_softmax(logits[0, -1]), np.float64)
    assert np.abs(expected - ours(model)).max() > 0.1
    np.testing.assert_allclose(llama_cpp(path, file), expected, atol=5e-5)


@pytest.mark.parametrize("name", ["q_a_proj", "q_b_proj", "kv_a_proj"])
def test_llama_cpp_ignores_the_adapters_that_are_refused(tmp_path, name, monkeypatch):
    path = write(tmp_path / "m.gguf", V3)
    config = ModelConfig.from_hf(V3)
    lora, spec = adapter(config, LoRARule(name, 4))
    refusal = f"GGUF adapter: expected no adapter that llama.cpp ignores.*layers/attn/{name}"
    with pytest.raises(NaloraError, match=refusal):
        write_adapter_gguf(tmp_path / "lora.gguf", config, lora, spec)
    monkeypatch.setattr("nalora_jax.weights.gguf_export.uniform_path", lambda path: "")
    file = write_adapter_gguf(tmp_path / "lora.gguf", config, lora, spec)
    np.testing.assert_array_equal(llama_cpp(path, file), llama_cpp(path))


def test_values_of_another_shape_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek2")
    describe(writer, V3, WORDS)
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_tensor("token_embd.weight", np.ones((len(WORDS), 256), np.float32))
    writer.add_tensor("blk.0.attn_k_b.weight", np.ones((4, 32, 24), np.float32))
    writer.add_tensor("blk.0.attn_v_b.weight", np.ones((4, 32, 16), np.float32))
    path = finish(writer, tmp_path / "m.gguf")
    expected = r"blk.0.attn_v_b.weight: expected \[heads, values, latents\] of .*\(4, 32, 16\)"
    with pytest.raises(NaloraError, match=expected):
        load_model(str(path), dtype="float32")


@pytest.mark.parametrize("pre", ["deepseek-v3", "glm4"])
def test_texts_have_llama_cpp_s_tokens(tmp_path, pre):
    """With merges of every pair that a text has, each rule of splitting shows."""
    alphabet = sorted(set(WORDS[3:]) | set(gguf_alphabet()))
    merges = [("Ġ", "a"), ("1", "2"), ("12", "3"), ("e", "r"), ("t", "h"), ("th", "e")]
    merges += [(".", "."), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("!", "a"), ("a", "1"), ("'", "s"), ("Ġ", "(")]
    for text in (*CORPUS, *TEXTS):
        characters = [BYTES[byte] for byte in text.encode()]
        merges += list(itertools.pairwise(characters))
    merges = list(dict.fromkeys(merges))
    tokens = [*WORDS[:3], *alphabet]
    tokens += [token for token in ("".join(pair) for pair in merges) if token not in tokens]
    tokens = list(dict.fromkeys(tokens))
    raw = YOUTU | {"vocab_size": len(tokens), "num_hidden_layers": 1}
    listed = tuple(" ".join(pair) for pair in merges)
    path = write(tmp_path / "m.gguf", raw, tokens=tokens, merges=listed, pre=pre)
    tokenizer = read_tokenizer(GGUFFile(path))
    server = xllamacpp.Server(server_params(path))
    for text in (*CORPUS, *TEXTS):
        if "\x00" in text or not text:
            continue
        body = json.dumps({"content": text, "add_special": False, "parse_special": False})
        asked = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            assert tokenizer.encode(text) == json.load(answer)["tokens"], text


def gguf_alphabet() -> list[str]:
    """The characters of byte-level vocabularies."""
    return list(BYTES.values())


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's characters of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = _bytes_to_characters()
